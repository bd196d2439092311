"""Calls that fail while replicas behind a DNS name are replaced. Prints Markdown; needs redis-server.

    python benchmarks/rollouts.py [--calls 10000] [--case CASE]

16 callers of one client with the default policy call in every way, without a pause, while servers are replaced as
Kubernetes replaces them: new servers are ready and in DNS before the former ones drain. Each case lasts until so many
calls by value have ended after the drain began. The exit status is 1 where a call failed or an update was not counted
once.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

TESTS = str(pathlib.Path(__file__).parent.parent / "tests")
sys.path.append(TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))

from support.rolling_restart import Callers  # noqa: E402
from support.rollouts import Rollout  # noqa: E402
from support.servers import wait_until  # noqa: E402

# As the manifests have it.
DRAINING = ("--drain-delay", "10", "--drain-timeout", "20")

# Calls in a row without an event, so that the callers know every server.
SETTLING = 500


def restart_of_one(rollout: Rollout) -> None:
    """One replica, and another in its place."""
    (former, later) = rollout.hosts[:2]
    rollout.publish(later)
    rollout.stop(former)


def drain_of_a_node(rollout: Rollout) -> None:
    """Two replicas at once."""
    rollout.publish(*rollout.hosts[2:4])
    rollout.stop(*rollout.hosts[:2])


def start_shorter_than_the_drain(rollout: Rollout) -> None:
    """Two replicas, the second of which drains before the first has ended."""
    first, second, third, fourth = rollout.hosts
    rollout.publish(second, third)
    rollout.begin_stop(first)
    rollout.publish(third, fourth)
    rollout.stop(second)


CASES: dict[str, tuple[int, int, Callable[[Rollout], None]]] = {
    "one replica is restarted": (1, 2, restart_of_one),
    "both replicas of a node are drained": (2, 4, drain_of_a_node),
    "the second drains while the first does": (2, 4, start_shorter_than_the_drain),
}


def run(case: str, calls: int) -> bool:
    """One case, and its row. Returns whether no call failed and each update was counted once."""
    former, servers, event = CASES[case]
    with tempfile.TemporaryDirectory() as folder, Rollout(pathlib.Path(folder), servers, *DRAINING) as rollout:
        rollout.start(*rollout.hosts)
        rollout.publish(*rollout.hosts[:former])
        callers = Callers(rollout.target)
        callers.go_on(SETTLING)
        by_value = callers.seconds["by value"]
        wanted = len(by_value) + calls
        event(rollout)
        wait_until(lambda: bool(callers.failed) or len(by_value) >= wanted, 1800)
        callers.end()
    acknowledged, counted = (sum(column) for column in zip(*callers.updates, strict=True))
    longest_ms = max(max(taken) for taken in callers.seconds.values()) * 1e3
    total, failed = callers.completed, len(callers.failed)
    print(
        f"| {case} | {len(by_value)} | {total} | {failed} | {acknowledged}, {counted} | {longest_ms:.0f} |", flush=True
    )
    for error in callers.failed:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return not callers.failed and acknowledged == counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--case", choices=CASES, action="append", help="may be repeated; default: all")
    options = parser.parse_args()
    print("| case | calls by value | of all kinds | failed | updates: acknowledged, counted | longest call, ms |")
    print("|---|---|---|---|---|---|")
    # Every case, also after one that failed.
    failures = sum(not run(case, options.calls) for case in options.case or CASES)
    raise SystemExit(int(failures > 0))


if __name__ == "__main__":
    main()
