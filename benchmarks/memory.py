"""What requests and responses take of a server's memory, for each of their bytes.

    python benchmarks/memory.py [--mib 200] [--callers 4]

For each kind of traffic a fresh server is called by one caller, and another by several at once. Printed is how far the
resident memory rose above that of the idle server, at its highest, and the same for each byte of the requests and
responses. `calls.memory_budget` takes the highest figure of a lone caller: of several, not all are at their highest
at the same moment.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import pathlib
import tempfile
from collections.abc import Callable

import grpc
import numpy as np
import run
import workloads

import forwardpass_client
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.methods import METHODS
from forwardpass_server.access import tokens
from forwardpass_server.access.tokens import Role

MIB = 2**20
LIMIT_MIB = 1024
SERVE = [
    *("-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "-1"),
    *("--max-concurrent-mib", "65536", "--max-message-mib", str(LIMIT_MIB), "--weights-mib", "8192"),
    *("--factory=scale=models:scale", "--factory=total=models:total"),
]
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Traffic:
    """Calls of one server, with requests of so many bytes."""

    def __init__(self, address: str, size_bytes: int) -> None:
        self._client = forwardpass_client.connect(address, max_message_bytes=LIMIT_MIB * MIB, timeout_s=600)
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        rows = size_bytes // 4096
        self.x, self.y = np.ones((rows, 1024), np.float32), np.ones(rows, np.float32)
        self.weights = workloads.weights("scale")

    def in_pieces(self, model: str) -> None:
        """The response of `scale` is as large as its request, that of `total` a few bytes for each KiB."""
        self._client.model(model).predict_on_batch(self.weights, self.x, training=False)

    def forward_pass(self) -> None:
        self._client.model("scale").forward_pass(self.weights, (self.x, self.y), training=False)

    def pipelined(self) -> None:
        with self._client.model("scale").pipeline(self.weights) as pipeline:
            pipeline.predict_on_batch(self.x, training=False).result()

    def in_one_message(self, model: str) -> None:
        # What a client with plain gRPC stubs sends.
        request = self._client.model(model)._calls.predict_on_batch(self.weights, self.x, False).request
        data = request.join() if isinstance(request, Pieces) else request
        self._channel.unary_unary(METHODS["PredictOnBatch"].path)(data, timeout=600)

    def refused(self) -> None:
        """To a server that wants a token."""
        try:
            self._channel.unary_unary(METHODS["PredictOnBatch"].path)(bytes(self.x.nbytes), timeout=600)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise

    def warm(self) -> None:
        for name in ("scale", "total"):
            self._client.model(name).forward_pass(self.weights, (self.x[:2], self.y[:2]), training=False)


# Bytes of request and response for each byte of x.
KINDS: dict[str, tuple[Callable[[Traffic], None], float]] = {
    "in pieces, response as large": (lambda traffic: traffic.in_pieces("scale"), 2),
    "in pieces, small response": (lambda traffic: traffic.in_pieces("total"), 1),
    "forward pass in pieces": (lambda traffic: traffic.forward_pass(), 2),
    "over a pipeline": (lambda traffic: traffic.pipelined(), 2),
    "one message, response as large": (lambda traffic: traffic.in_one_message("scale"), 2),
    "one message, small response": (lambda traffic: traffic.in_one_message("total"), 1),
    "one message, refused for its token": (lambda traffic: traffic.refused(), 1),
}


def resident_bytes(pid: int, name: str) -> int:
    """VmRSS, or VmHWM for the highest since it was reset."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(name))) * 1024


def measure(kind: str, size_bytes: int, callers: int) -> tuple[int, int]:
    """The memory of the idle server, and the highest with so many callers at once."""
    call, _ = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        command = SERVE
        if "token" in kind:
            _, token = tokens.create("somebody", [Role.CALL], tokens.parse_expiry("1d"))
            (file := pathlib.Path(folder, "tokens")).write_text(token.line() + "\n")
            command = [*SERVE, "--tokens", str(file)]
        with run.server_process(command) as (address, pid):
            traffic = Traffic(address, size_bytes)
            if "token" not in kind:
                traffic.warm()
            idle = resident_bytes(pid, "VmRSS")
            pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")
            with concurrent.futures.ThreadPoolExecutor(callers) as pool:
                for done in [pool.submit(call, traffic) for _ in range(callers)]:
                    done.result()
            return idle, resident_bytes(pid, "VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=200, help="of x in each request")
    parser.add_argument("--callers", type=int, default=4)
    options = parser.parse_args()
    print("| traffic | callers | idle, MiB | highest, MiB | for each byte |")
    print("|---|---|---|---|---|")
    for kind, (_, times) in KINDS.items():
        for callers in sorted({1, options.callers}):
            idle, highest = measure(kind, options.mib * MIB, callers)
            share = (highest - idle) / (callers * options.mib * MIB * times)
            print(f"| {kind} | {callers} | {idle / MIB:.0f} | {highest / MIB:.0f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
