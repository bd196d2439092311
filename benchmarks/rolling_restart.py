"""What callers notice while two servers are restarted and killed. Prints Markdown; needs redis-server.

    python benchmarks/rolling_restart.py [--rounds 3] [--seconds 5]

Two servers share sessions in a Redis; 16 callers of one client with the default policy call by value, by weights id,
over pipelines, in sessions and evaluations, without a pause. In each round both servers are restarted, one after the
other, and one is killed with kill -9. The exit status is 1 where a call failed, or an update counted twice or not at
all.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
import time

TESTS = str(pathlib.Path(__file__).parent.parent / "tests")
sys.path.append(TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))

from support.rolling_restart import Callers, Replicas  # noqa: E402


def show(phase: str, callers: Callers, seconds: float) -> None:
    """Waits, and prints a row for each kind of call."""
    time.sleep(seconds)
    for kind, taken in sorted(callers.take_seconds().items()):
        taken.sort()
        p50, p99 = (taken[int(len(taken) * share)] * 1e3 for share in (0.5, 0.99))
        longest_ms = taken[-1] * 1e3
        print(f"| {phase} | {kind} | {len(taken)} | {p50:.1f} | {p99:.0f} | {longest_ms:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="between one event and the next")
    options = parser.parse_args()
    print("| phase | calls | number | p50, ms | p99, ms | longest, ms |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        with Replicas(pathlib.Path(folder), "--drain-delay", "1") as replicas:
            callers = Callers(replicas.addresses)
            show("nothing", callers, options.seconds)
            exits = []
            for _ in range(options.rounds):
                for index in range(2):
                    exits.append(replicas.stop(index))
                    replicas.start(index)
                show("restart of both", callers, options.seconds)
                replicas.kill(0)
                replicas.start(0)
                show("kill -9 of one", callers, options.seconds)
            callers.end()
    acknowledged, counted = (sum(column) for column in zip(*callers.updates, strict=True))
    print(f"\n{len(callers.failed)} callers met an error; exit codes {sorted(set(exits))}")
    print(f"updates of sessions: {acknowledged} acknowledged, {counted} counted")
    raise SystemExit(int(bool(callers.failed) or acknowledged != counted or any(exits)))


if __name__ == "__main__":
    main()
