"""What a durable session costs, and what an evaluation over one stream is worth: in one run, as Markdown.

    python benchmarks/sessions.py [--seconds 2] [--rounds 5]

Calls of MLP 784-128-10, weights by id, sessions in a SQLite file: alone, and with the session added; then batches
evaluated over a stream, and in a loop over the model itself, without a server.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import run
import session_load
import timing
import workloads

OURS = [
    *("-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "-1"),
    *(f"--factory={name}=models:{name}" for name in ("mlp", "cnn")),
]


class Bench:
    """Measurements, each the median of some rounds in which the kinds take turns."""

    def __init__(self, address: str, seconds: float, rounds: int) -> None:
        self._address = address
        self._seconds = seconds
        self._rounds = rounds

    def measure(self, workload: str, callers: int, *kinds: str) -> list[dict[str, float]]:
        return timing.in_turns(kinds, self._rounds, lambda kind: self._once(kind, workload, callers))

    def _once(self, kind: str, workload: str, callers: int) -> dict[str, float]:
        command = [sys.executable, "session_load.py", kind, workload, f"--callers={callers}"]
        command += [f"--seconds={self._seconds}", f"--address={self._address}"]
        return timing.figures(command, cwd=run.FOLDER, env=run.ENVIRONMENT)


def rows(bench: Bench) -> Iterator[tuple[str, str, str, float, str]]:
    """Target, what was measured, the figures, the ratio, what it should be."""
    for title, plain, added in (
        ("forward pass with a session added", "forward", "session-forward"),
        ("update of a session / of a state by value", "update", "session-update"),
    ):
        for callers in (1, 16, 32):
            one, other = bench.measure("small-1", callers, plain, added)
            ratio = other["p50_ms"] / one["p50_ms"]
            is_target = plain == "forward" and callers == 32
            measured = f"{title}, {callers} caller{'s' * (callers > 1)}, p50"
            figures = f"{shown(other)}; without {shown(one)}"
            yield ("P10" if is_target else "", measured, figures, ratio, "at most 1.4" if is_target else "")
    for workload, target in (("medium", 0.85), ("small-32", 0.55)):
        title = workloads.WORKLOADS[workload].title
        local, stream = (one["examples_per_s"] for one in bench.measure(workload, 1, "local", "evaluate"))
        figures = f"{stream:,.0f} and {local:,.0f} examples/s"
        yield "P9", f"evaluate / local loop, {title}", figures, stream / local, f"at least {target}"
    local, many = (one["examples_per_s"] for one in bench.measure("small-32", 1, "local", "evaluate-many"))
    figures = f"{many:,.0f} and {local:,.0f} examples/s, each counted once for each set"
    title = workloads.WORKLOADS["small-32"].title
    yield (
        "P9b",
        f"evaluate_many of {session_load.SETS} sets / as many local loops, {title}",
        figures,
        many / local,
        ("at least 1.5"),
    )


def shown(found: dict[str, float]) -> str:
    return f"{found['calls_per_s']:,.0f}/s ({found['p50_ms']:.2f}, {found['p99_ms']:.2f} ms)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("calls/s (p50, p99)\n\n| | measured | figures | ratio | target |\n|---|---|---|---|---|")
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = f"--session-store=sqlite://{folder}/sessions.sqlite3"
        bench = Bench(stack.enter_context(run.server([*OURS, store])), options.seconds, options.rounds)
        for name, measured, figures, ratio, target in rows(bench):
            print(f"| {name} | {measured} | {figures} | **{ratio:.2f}** | {target} |", flush=True)


if __name__ == "__main__":
    main()
