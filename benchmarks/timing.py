"""Calls made as fast as they are answered, for some seconds, and what they took.

One caller calls again and again; several are tasks of one event loop, or threads.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import json
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import workloads


def arguments(description: str | None, kinds: Sequence[str] = ()) -> argparse.Namespace:
    """The command line of every `load.py`. kinds: what it can measure, where that is more than one thing."""
    parser = argparse.ArgumentParser(description=description)
    if kinds:
        parser.add_argument("kind", choices=kinds)
    parser.add_argument("workload", choices=list(workloads.WORKLOADS))
    parser.add_argument("--address", default="")
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    return parser.parse_args()


def repeat(call: Callable[[], Any], seconds: float) -> list[float]:
    """The seconds of each call, for so long."""
    for _ in range(5):
        call()
    taken = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        call()
        taken.append(time.perf_counter() - started)
    return taken


async def repeat_async(call: Callable[[], Awaitable[Any]], callers: int, seconds: float) -> list[float]:
    taken = []

    async def caller() -> None:
        for _ in range(2):
            await call()
        while True:
            started = time.perf_counter()
            await call()
            taken.append(time.perf_counter() - started)
            if time.perf_counter() > end:
                break

    end = time.perf_counter() + seconds
    await asyncio.gather(*(caller() for _ in range(callers)))
    return taken


def on_threads(measure: Callable[[], list[float]], callers: int) -> list[float]:
    """What `measure` finds on so many threads at once."""
    with concurrent.futures.ThreadPoolExecutor(callers) as pool:
        return [one for found in [pool.submit(measure) for _ in range(callers)] for one in found.result()]


def show(taken: list[float], callers: int, **more: float) -> None:
    """Prints the figures as JSON."""
    taken.sort()
    figures = {
        "calls_per_s": callers * len(taken) / sum(taken),
        "p50_ms": taken[len(taken) // 2] * 1e3,
        "p99_ms": taken[int(len(taken) * 0.99)] * 1e3,
    }
    print(json.dumps(figures | more))


def in_turns(kinds: Sequence[str], rounds: int, once: Callable[[str], dict[str, float]]) -> list[dict[str, float]]:
    """The medians of the figures of some rounds, in each of which all kinds are measured once."""
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, found in taken.items():
            found.append(once(kind))
    return [{key: statistics.median(one[key] for one in found) for key in found[0]} for found in taken.values()]


def figures(command: list[str], **options: Any) -> dict[str, float]:
    """What a `load.py` shows. Ends the program with what it says where it fails. options: as `subprocess.run` has."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found
