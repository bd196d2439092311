"""What weights by id, batching and pipelines are worth: beside the floors and the peers, in one run, as Markdown.

    python benchmarks/targets.py [--seconds 2] [--rounds 3]

Peers: TensorFlow's own remote execution and TFF's executor, with the weights resident; MLServer, with the weights in
the model; NVIDIA Triton with a model in Python, weights as inputs. All but the first have environments of their own.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import peers
import run
import timing
import workloads

import forwardpass_client

MODELS = ("mlp", "scale", "mlp_100", "corner_1", "corner_100")
OURS = [
    *("-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "-1"),
    *("--max-message-mib", "1024", *(f"--factory={name}=models:{name}" for name in MODELS)),
]


class Bench:
    """Measurements, each the median of some rounds in which the kinds take turns."""

    def __init__(self, addresses: dict[str, str], seconds: float, rounds: int) -> None:
        self._addresses = addresses
        self._seconds = seconds
        self._rounds = rounds

    def measure(self, workload: str, callers: int, *kinds: str) -> list[dict[str, float]]:
        return timing.in_turns(kinds, self._rounds, lambda kind: self._once(kind, workload, callers))

    def _once(self, kind: str, workload: str, callers: int) -> dict[str, float]:
        if kind in peers.PEERS:
            return peers.PEERS[kind].measure(workload, self._addresses[kind], callers, self._seconds)
        # "id off" is the kind "id" on the server without batching.
        name, _, server = kind.partition(" ")
        address = self._addresses[f"ours {server}".strip() if name in ("value", "id", "pipeline") else _SERVER[name]]
        return run.measure(name, workload, address, callers, self._seconds)


PEERS = {"tensorflow": "TensorFlow", **{kind: peer.title for kind, peer in peers.PEERS.items()}}
"""Every peer's title, by its kind."""

_SERVER = {"local": "echo", "echo": "echo", "echo-id": "echo", "echo-stream": "echo", "tensorflow": "tensorflow"}


def targets(bench: Bench, address: str) -> Iterator[tuple[str, str, str, float, str]]:
    """Rows: name, what was measured, the figures, the ratio, the target."""
    local, echo, ours, *others = (
        one["p50_ms"] for one in bench.measure("small-1", 1, "local", "echo-id", "id", *PEERS)
    )
    figures = f"ours {ours:.2f}, echo {echo:.2f}, local {local:.3f} ms; {_of_peers(others, '.2f')}"
    yield "P1", "small unary call by id, p50 / (echo + local)", figures, ours / (echo + local), "at most 1.25"
    kinds = ("echo-id", "id", "id off", "pipeline", *PEERS)
    echo, ours, off, pipeline, *others = (one["calls_per_s"] for one in bench.measure("small-1", 32, *kinds))
    best, figures = max(others), _of_peers(others, ",.0f")
    yield "P2", "32 callers, unary, batched / echo", f"{ours:,.0f} and {echo:,.0f}/s", ours / echo, "at least 0.8"
    yield "P2", "the same / the best peer", figures, ours / best, "at least 4"
    yield "P3", "32 callers on a pipeline / unary echo", f"{pipeline:,.0f} and {echo:,.0f}/s", pipeline / echo, "1.5"
    yield "P3", "the same / the best peer", figures, pipeline / best, "at least 10"
    for workload in ("large", "larger"):
        unary, stream, ours_ = bench.measure(workload, 1, "echo-id", "echo-stream", "id")
        megabytes = ours_["request_bytes"] / 1e6
        rates = [megabytes / one["p50_ms"] * 1e3 for one in (unary, stream, ours_)]
        figures = f"ours {rates[2]:,.0f}, echo {rates[0]:,.0f}, in chunks {rates[1]:,.0f} MB/s each way"
        yield (
            "P4",
            f"{workloads.WORKLOADS[workload].title}, / the faster echo",
            figures,
            rates[2] / max(rates[:2]),
            "0.8",
        )
    costs = [bench.measure(workload, 1, "id")[0]["p50_ms"] for workload in ("named-1", "named-100")]
    figures = f"{costs[1]:.2f} and {costs[0]:.2f} ms, of a model that reads a few of them"
    yield "P5", "100 MB of weights by id / 1 MB", figures, costs[1] / costs[0], "at most 1.05"
    ours_, triton_ = bench.measure("heavy", 1, "id", "triton")
    figures = f"{ours_['calls_per_s']:,.0f} and {triton_['calls_per_s']:,.2f}/s"
    ratio = ours_["calls_per_s"] / triton_["calls_per_s"]
    yield "P6", "100 MB of weights by id / Triton, which gets them anew", figures, ratio, "at least 25"
    yield "P7", "batching on / off, 32 callers", f"{ours:,.0f} and {off:,.0f}/s", ours / off, "at least 2.5"
    (one,) = bench.measure("small-1", 1, "id")
    put_many(address, 10_000)
    (many,) = bench.measure("small-1", 1, "id")
    figures = f"{many['p50_ms']:.2f} and {one['p50_ms']:.2f} ms"
    yield "P12", "p50 with 10,000 sets of weights / with one", figures, many["p50_ms"] / one["p50_ms"], "at most 1.1"


def _of_peers(figures: Iterable[float], form: str) -> str:
    return ", ".join(f"{title} {figure:{form}}" for title, figure in zip(PEERS.values(), figures, strict=True))


def put_many(address: str, count: int) -> None:
    """Sets that share all tensors but the smallest, as personalised models do."""
    (w1, b1, w2, _), non_trainable = workloads.weights("mlp")
    with forwardpass_client.connect(address) as client:
        model = client.model("mlp")
        for index in range(count):
            model.put_weights(((w1, b1, w2, workloads.vector(index, 10)), non_trainable))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    servers: dict[str, Any] = {
        "echo": ["echo_server.py"],
        "tensorflow": ["tensorflow_server.py"],
        "ours": OURS,
        "ours off": [*OURS, "--no-batching"],
    }
    print("| | measured | figures | ratio | target |\n|---|---|---|---|---|")
    with contextlib.ExitStack() as stack:
        addresses = {name: stack.enter_context(run.server(command)) for name, command in servers.items()}
        addresses |= {kind: stack.enter_context(peer.server()) for kind, peer in peers.PEERS.items()}
        bench = Bench(addresses, options.seconds, options.rounds)
        for name, measured, figures, ratio, target in targets(bench, addresses["ours"]):
            print(f"| {name} | {measured} | {figures} | **{ratio:.2f}** | {target} |", flush=True)


if __name__ == "__main__":
    main()
