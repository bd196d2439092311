"""How fast the session stores replace records of 2 KB: in memory, in a SQLite file, in Redis. Prints Markdown.

    python benchmarks/session_stores.py [--seconds 3] [--rounds 3] [--folder .cache/benchmarks]

Callers are tasks of one event loop, each with a session of its own, as in a server. Redis is a process of its own that
writes every step to the disk before it answers (needs redis-server). Stores take turns; a figure is the median of its
rounds. The folder, where SQLite and Redis write, must be on a real disk: in memory the figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import peers
import redis
import run
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from forwardpass_server.sessions.store import SessionKey, SessionLimits, SessionStore
from forwardpass_server.sessions.stores.memory import MemorySessionStore
from forwardpass_server.sessions.stores.redis import RedisSessionStore
from forwardpass_server.sessions.stores.sqlite import SqliteSessionStore

RECORD = os.urandom(2048)
LIMITS = SessionLimits(max_sessions=1000, max_bytes=2**30, idle_expiry_s=3600.0, remember_s=3600.0)
CALLERS = (1, 16)


class NoObserver:
    def sessions_expired(self, count: int) -> None: ...

    def session_commit(self, seconds: float) -> None: ...


@contextlib.contextmanager
def redis_server(folder: str) -> Iterator[str]:
    """The url of a Redis."""
    (port,) = peers.free_ports(1)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
    durable = ["--appendonly", "yes", "--appendfsync", "always"]
    process = subprocess.Popen([*command, *durable], stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port, retry=Retry(ConstantBackoff(0.1), 100)) as client:
            client.ping()
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


async def measure(make: Callable[[], SessionStore], callers: int, seconds: float) -> dict[str, float]:
    taken: list[float] = []
    store = make()

    async def caller() -> None:
        key = SessionKey("", os.urandom(16))
        version = (await store.create(key, RECORD)).version
        while (started := time.perf_counter()) < end:
            assert await store.replace(key, version, RECORD)
            version += 1
            taken.append(time.perf_counter() - started)
        await store.delete(key)

    end = time.perf_counter() + seconds
    await asyncio.gather(*(caller() for _ in range(callers)))
    await store.close()
    taken.sort()
    p50, p99 = (taken[len(taken) * percent // 100] * 1e3 for percent in (50, 99))
    return {"updates_per_s": len(taken) / seconds, "p50_ms": p50, "p99_ms": p99}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, default=run.FOLDER.parent / ".cache" / "benchmarks")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, redis_server(folder) as url:
        path = pathlib.Path(folder) / "sessions.db"
        stores: dict[str, Callable[[], SessionStore]] = {
            "memory": lambda: MemorySessionStore(LIMITS, NoObserver()),
            "SQLite": lambda: SqliteSessionStore(path, LIMITS, NoObserver()),
            "Redis": lambda: RedisSessionStore(url, LIMITS, NoObserver()),
        }
        rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            for name, make in stores.items():
                for callers in CALLERS:
                    found = asyncio.run(measure(make, callers, options.seconds))
                    rounds.setdefault((name, callers), []).append(found)
    print("| store | callers | updates/s | p50, ms | p99, ms |\n|---|---|---|---|---|")
    for (name, callers), taken in rounds.items():
        one = run.median(taken)
        print(f"| {name} | {callers} | {one['updates_per_s']:,.0f} | {one['p50_ms']:.2f} | {one['p99_ms']:.2f} |")


if __name__ == "__main__":
    main()
