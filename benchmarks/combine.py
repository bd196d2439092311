"""What arithmetic on weights by id is worth: combining sets on the server, or fetching them and averaging, as Markdown.

    python benchmarks/combine.py [--sets 64] [--rounds 5]

Sets of an MLP 784-128-10 and of a CNN with 1M parameters. No two share a tensor. The other way fetches each set
and averages in NumPy, in float32, as a client without `combine` does; it is measured without putting the average again.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import run
import timing

import forwardpass_client

MODELS = {"mlp": "MLP 784-128-10", "cnn": "CNN, 1M parameters"}
OURS = [
    *("-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "-1", "--weights-mib", "1024"),
    *(f"--factory={name}=models:{name}" for name in MODELS),
]
KINDS = ("fetch", "combine", "float64")


class Bench:
    """The ways to combine the sets of one model."""

    def __init__(self, client: Any, name: str, count: int) -> None:
        self._client = client
        self._model = client.model(name)
        likeness = self._model.initial_weights
        self.size_bytes = count * sum(leaf.nbytes for part in likeness for leaf in part)
        rng = np.random.default_rng(0)
        self._handles = [
            self._model.put_weights(
                [[rng.standard_normal(leaf.shape, np.float32) for leaf in part] for part in likeness]
            )
            for _ in range(count)
        ]
        # Handles without arrays: nothing is put again.
        self._handles = [self._model.weights_handle(handle.id) for handle in self._handles]
        self._round = 0

    def once(self, kind: str) -> dict[str, float]:
        # Other coefficients each time: the sum is computed, hashed and published anew.
        self._round += 1
        terms = [(handle, (self._round + index) / 1000) for index, handle in enumerate(self._handles)]
        ways: dict[str, Callable[[], Any]] = {
            "fetch": functools.partial(self._fetch, terms),
            "combine": functools.partial(self._client.combine, terms),
            "float64": functools.partial(self._client.combine, terms, float64=True),
        }
        started = time.perf_counter()
        found = ways[kind]()
        taken = time.perf_counter() - started
        if kind != "fetch":
            found.delete()
        return {"ms": taken * 1e3}

    def _fetch(self, terms: list[tuple[Any, float]]) -> list[Any]:
        sums: list[Any] = []
        for handle, number in terms:
            leaves = [leaf for part in self._model.get_weights(handle) for leaf in part]
            scaled = [leaf * np.float32(number) for leaf in leaves]
            sums = [np.add(one, other, out=one) for one, other in zip(sums, scaled, strict=True)] if sums else scaled
        return sums


def rows(client: Any, count: int, rounds: int) -> Iterator[tuple[str, str, str, float, str]]:
    """Target, what was measured, the figures, the ratio, what it should be."""
    for name, title in MODELS.items():
        bench = Bench(client, name, count)
        for kind in KINDS:
            bench.once(kind)
        fetch, combine, long = (one["ms"] for one in timing.in_turns(KINDS, rounds, bench.once))
        size = f"{count} sets, {bench.size_bytes / 1e6:,.0f} MB"
        is_target = name == "cnn"
        target = ("P14", "at least 50") if is_target else ("", "")
        yield (
            target[0],
            f"fetch and average / combine, {title}, {size}",
            _shown(fetch, combine),
            fetch / combine,
            target[1],
        )
        yield "", f"the same with float64, {title}", _shown(fetch, long), fetch / long, ""


def _shown(fetch: float, combine: float) -> str:
    return f"{fetch:,.0f} and {combine:,.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("| | measured | figures | ratio | target |\n|---|---|---|---|---|")
    with run.server(OURS) as address, forwardpass_client.connect(address) as client:
        for name, measured, figures, ratio, target in rows(client, options.sets, options.rounds):
            print(f"| {name} | {measured} | {figures} | **{ratio:.1f}** | {target} |", flush=True)


if __name__ == "__main__":
    main()
