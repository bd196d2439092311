"""All servers side by side: the floor, the naive one, ours. Prints a table, as Markdown.

    python benchmarks/run.py [--seconds 2] [--rounds 3] [--workloads small-1,large] [--callers 1,8]

Only ratios within one run mean anything: the machine's mood changes from run to run. Servers stay up throughout, and
take turns for each figure; a figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import timing
import workloads

FOLDER = pathlib.Path(__file__).parent
OURS = [
    *("-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "-1"),
    *(f"--factory={name}=models:{name}" for name in ("mlp", "cnn", "scale")),
]
SERVERS = {"echo": ["echo_server.py"], "naive": ["naive_server.py"], "ours": OURS}
PATHS = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "TF_CPP_MIN_LOG_LEVEL": "3"}


@contextlib.contextmanager
def server(command: list[str]) -> Iterator[str]:
    """Starts a server and gives its address, once it answers."""
    with server_process(command) as (address, _):
        yield address


@contextlib.contextmanager
def server_process(command: list[str]) -> Iterator[tuple[str, int]]:
    """As `server`; gives the process's id too."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=FOLDER,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = _line(process, "listening on ").strip()
        if "serve" in command:
            _line(process, "ready")
        yield address, process.pid
    finally:
        process.kill()
        process.wait()


def _line(process: subprocess.Popen[str], start: str) -> str:
    """What follows the start of the first line that begins so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line.removeprefix(start)
    raise SystemExit(f"the server ended: {process.args}")


def measure(kind: str, workload: str, address: str, callers: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "load.py", kind, workload, f"--callers={callers}", f"--seconds={seconds}"]
    return timing.figures([*command, f"--address={address}"], cwd=FOLDER, env=ENVIRONMENT)


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def row(workload: str, callers: int, found: dict[str, dict[str, float]], local: dict[str, float]) -> list[str]:
    echo, ours = found["echo"], found["ours"]
    megabytes = ours["request_bytes"] / 1e6
    return [
        workloads.WORKLOADS[workload].title,
        f"{megabytes:.3g}",
        str(callers),
        f"{local['p50_ms']:.3f}",
        *(f"{one['calls_per_s']:,.0f} ({one['p50_ms']:.2f}, {one['p99_ms']:.2f})" for one in found.values()),
        f"{ours['calls_per_s'] * megabytes:,.0f}",
        f"{ours['p50_ms'] / (echo['p50_ms'] + local['p50_ms']):.2f}",
        f"{ours['calls_per_s'] / echo['calls_per_s']:.2f}",
        f"{ours['calls_per_s'] / found['naive']['calls_per_s']:.1f}",
    ]


HEADER = [
    "workload",
    "request, MB",
    "callers",
    "local call, ms",
    "echo",
    "naive",
    "ours",
    "ours, MB/s",
    "p50 / (echo + local)",
    "calls/s / echo",
    "calls/s / naive",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", default="small-1,small-32,medium,tiny,large")
    parser.add_argument("--callers", default="1,8,32")
    options = parser.parse_args()
    print("echo, naive, ours: calls/s (p50, p99 in ms)\n")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    with contextlib.ExitStack() as stack:
        addresses = {kind: stack.enter_context(server(command)) for kind, command in SERVERS.items()}
        for workload in options.workloads.split(","):
            local = measure("local", workload, "", 1, options.seconds)
            for callers in map(int, options.callers.split(",")):
                rounds: dict[str, list[Any]] = {kind: [] for kind in SERVERS}
                for _ in range(options.rounds):
                    for kind, taken in rounds.items():
                        name = "value" if kind == "ours" else kind
                        taken.append(measure(name, workload, addresses[kind], callers, options.seconds))
                figures = {kind: median(taken) for kind, taken in rounds.items()}
                print(f"| {' | '.join(row(workload, callers, figures, local))} |", flush=True)


if __name__ == "__main__":
    main()
