"""What weights by id, batching and pipelines are worth: beside the floors and the peers, in one run, as Markdown.

    python benchmarks/targets.py [--seconds 2] [--rounds 3]

Peers: TensorFlow's own remote execution, with the weights resident; NVIDIA Triton with a model in Python, weights as
inputs, in an environment of its own that is made under .cache on the first run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import run
import workloads

import forwardpass_client

FOLDER = pathlib.Path(__file__).parent
TRITON = FOLDER.parent / ".cache" / "benchmarks" / "triton"
MODELS = ("mlp", "scale", "mlp_100", "corner_1", "corner_100")
OURS = [
    *("-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "-1"),
    *("--max-message-mib", "1024", *(f"--factory={name}=models:{name}" for name in MODELS)),
]


@contextlib.contextmanager
def triton() -> Iterator[str]:
    """A Triton server, from the package that brings its binaries."""
    if not (TRITON / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(TRITON)], check=True)
        pip = [str(TRITON / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "nvidia-pytriton", "tritonclient[grpc]"], check=True)
        (TRITON / "complete").touch()
    (site_packages,) = TRITON.glob("lib/python*/site-packages")
    home = site_packages / "pytriton" / "tritonserver"
    stub = home / "backends" / "python" / "triton_python_backend_stub"
    if not stub.exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub.symlink_to(home / "python_backend_stubs" / version / stub.name)
    ports = [free_port() for _ in range(3)]
    flags = zip(("--grpc-port", "--http-port", "--metrics-port"), map(str, ports), strict=True)
    process = subprocess.Popen(
        [
            str(home / "bin" / "tritonserver"),
            *("--model-repository", str(FOLDER / "triton"), "--backend-directory", str(home / "backends")),
            *(argument for flag in flags for argument in flag),
        ],
        env={**os.environ, "SITE_PACKAGES": str(site_packages)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(ports[0])
        yield f"127.0.0.1:{ports[0]}"
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def wait_for_port(port: int, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            time.sleep(1)
            return


class Bench:
    """Measurements, each the median of some rounds in which the kinds take turns."""

    def __init__(self, addresses: dict[str, str], seconds: float, rounds: int) -> None:
        self._addresses = addresses
        self._seconds = seconds
        self._rounds = rounds

    def measure(self, workload: str, callers: int, *kinds: str) -> list[dict[str, float]]:
        taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(self._rounds):
            for kind, found in taken.items():
                found.append(self._once(kind, workload, callers))
        return [{key: statistics.median(one[key] for one in found) for key in found[0]} for found in taken.values()]

    def _once(self, kind: str, workload: str, callers: int) -> dict[str, float]:
        if kind == "triton":
            command = [str(TRITON / "bin" / "python"), str(FOLDER / "triton" / "load.py"), workload]
            command += [f"--callers={callers}", f"--seconds={self._seconds}", f"--address={self._addresses[kind]}"]
            found: dict[str, float] = json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))
            return found
        # "id off" is the kind "id" on the server without batching.
        name, _, server = kind.partition(" ")
        address = self._addresses[f"ours {server}".strip() if name in ("value", "id", "pipeline") else _SERVER[name]]
        return run.measure(name, workload, address, callers, self._seconds)


_SERVER = {"local": "echo", "echo": "echo", "echo-id": "echo", "echo-stream": "echo", "tensorflow": "tensorflow"}


def targets(bench: Bench, address: str) -> Iterator[tuple[str, str, str, float, str]]:
    """Rows: name, what was measured, the figures, the ratio, the target."""
    local, echo, ours, remote, triton_ = bench.measure("small-1", 1, "local", "echo-id", "id", "tensorflow", "triton")
    floor = echo["p50_ms"] + local["p50_ms"]
    figures = f"ours {ours['p50_ms']:.2f}, echo {echo['p50_ms']:.2f}, local {local['p50_ms']:.3f} ms"
    figures += f"; TensorFlow {remote['p50_ms']:.2f}, Triton {triton_['p50_ms']:.2f}"
    yield "P1", "small unary call by id, p50 / (echo + local)", figures, ours["p50_ms"] / floor, "at most 1.25"
    kinds = ("echo-id", "id", "id off", "pipeline", "tensorflow", "triton")
    echo, ours, off, pipeline, remote, triton_ = (one["calls_per_s"] for one in bench.measure("small-1", 32, *kinds))
    peer = max(remote, triton_)
    peers = f"TensorFlow {remote:,.0f}, Triton {triton_:,.0f}"
    yield "P2", "32 callers, unary, batched / echo", f"{ours:,.0f} and {echo:,.0f}/s", ours / echo, "at least 0.8"
    yield "P2", "the same / the best peer", peers, ours / peer, "at least 4"
    yield "P3", "32 callers on a pipeline / unary echo", f"{pipeline:,.0f} and {echo:,.0f}/s", pipeline / echo, "1.5"
    yield "P3", "the same / the best peer", peers, pipeline / peer, "at least 10"
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
        addresses["triton"] = stack.enter_context(triton())
        bench = Bench(addresses, options.seconds, options.rounds)
        for name, measured, figures, ratio, target in targets(bench, addresses["ours"]):
            print(f"| {name} | {measured} | {figures} | **{ratio:.2f}** | {target} |", flush=True)


if __name__ == "__main__":
    main()
