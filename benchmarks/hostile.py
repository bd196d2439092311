"""How long an honest caller waits while another sends messages that cost the server the most. Prints Markdown.

    python benchmarks/hostile.py [--seconds 5] [--senders 5]

One server serves a small model. A process of its own calls it again and again, one example each. Meanwhile several
senders send one kind of message, each within the limits of its length: `--max-unary-mib` for one message, and
`--max-message-mib` for a request in pieces. They are not compressed: the server refuses compressed messages by default.
The exit status is 1 where an honest call took more than 0.2 s longer than the longest while nobody sent anything.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import run
import workloads

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import dtypes, fields, frames, messages, tensors
from forwardpass.wire.frames import Outbox
from forwardpass.wire.methods import METHODS
from forwardpass.wire.structures import Structure
from forwardpass.wire.trees import LEAF, Kind, TreeDef

COMMAND = [
    *("-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "-1"),
    "--factory=mlp=models:mlp",
]
BOUND_S = 0.2
LEAVES = 65_536
PIPELINE = METHODS["Pipeline"].path


def flat(count: int) -> TreeDef:
    return TreeDef(Kind.TUPLE, [LEAF] * count)


def strings(count: int) -> bytes:
    """A ForwardPassRequest with so many tensors of 2^20 empty strings."""
    tree = flat(count).encoded
    tensor = tensors.encode_header(dtypes.STRING.code, (2**20,), 2**22) + bytes(2**22)
    structure = fields.prefix(1, len(tree)) + tree + (fields.prefix(2, len(tensor)) + tensor) * count
    batch = fields.prefix(1, len(structure)) + structure
    header = v1.ForwardPassRequest(model=v1.ModelSelector(name="mlp")).SerializeToString()
    return header + fields.prefix(5, len(batch)) + batch


def forward_pass(structure: Structure, *places: str) -> bytes:
    header = v1.ForwardPassRequest(model=v1.ModelSelector(name="mlp"))
    return messages.encode(header, dict.fromkeys(places, structure))


EVERYWHERE = ("model_weights.trainable", "model_weights.non_trainable", "batch_input.x", "batch_input.y")


def put_weights() -> bytes:
    manifest = v1.WeightsManifest(tree=v1.TreeDef.FromString(flat(LEAVES).encoded))
    spec = v1.TensorSpec(data_type=v1.DataType.DATA_TYPE_FLOAT32, shape=[1])
    for index in range(LEAVES):
        manifest.tensors.add(digest=hashlib.sha256(b"%d" % index).digest(), spec=spec, size_bytes=4)
    return v1.PutWeightsRequest(manifest=manifest).SerializeToString()


def in_pieces(request: bytes, calls: int = 1) -> Iterator[bytes]:
    outbox = Outbox(answers=False)
    for call in range(1, calls + 1):
        outbox.put(call, frames.encode_call("ForwardPass", None, len(request)), request)
    while outbox:
        yield outbox.next_message()


def attacks() -> dict[str, Callable[[grpc.Channel], object]]:
    three, sixty, within = strings(3), strings(60), strings(1)
    structures = forward_pass(Structure(flat(LEAVES), [np.empty(0, np.float32)] * LEAVES), *EVERYWHERE)
    one = forward_pass(Structure(flat(LEAVES), [np.empty(0, np.float32)] * LEAVES), "batch_input.x")
    manifest = put_weights()

    def unary(method: str, request: bytes) -> Callable[[grpc.Channel], object]:
        call = METHODS[method].path
        return lambda channel: channel.unary_unary(call)(request, timeout=60)

    def pipelined(request: bytes, calls: int) -> Callable[[grpc.Channel], object]:
        return lambda channel: list(channel.stream_stream(PIPELINE)(in_pieces(request, calls), timeout=60))

    return {
        "3 tensors of 2^20 empty strings": unary("ForwardPass", three),
        "60 of these tensors in pieces": pipelined(sixty, 1),
        "2^20 empty strings": unary("ForwardPass", within),
        "4 structures of 65,536 leaves": unary("ForwardPass", structures),
        "a structure of 65,536 leaves": unary("ForwardPass", one),
        "5 of these on a pipeline": pipelined(one, 5),
        "a manifest of 65,536 tensors": unary("PutWeights", manifest),
    }


def honest(address: str, seconds: Any, begun: Any, stop: Any) -> None:
    """Puts the seconds of each call into a queue's list when it is told to stop."""
    taken = []
    with forwardpass_client.connect(address) as client:
        model = client.model("mlp")
        handle = model.put_weights(workloads.weights("mlp"))
        x = workloads.batch("small-1")
        while not stop.is_set():
            began = time.perf_counter()
            model.predict_on_batch(handle, x, training=False)
            taken.append(time.perf_counter() - began)
            begun.set()
    seconds.put(taken)


def measure(address: str, attack: Callable[[grpc.Channel], object] | None, senders: int, seconds: float) -> list[float]:
    """The seconds of each honest call while an attack goes on."""
    context = multiprocessing.get_context("spawn")
    taken, begun, stop = context.Queue(), context.Event(), context.Event()
    caller = context.Process(target=honest, args=(address, taken, begun, stop))
    caller.start()
    begun.wait()
    over = threading.Event()

    def send() -> None:
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(address, options) as channel:
            while not over.is_set():
                try:
                    assert attack is not None
                    attack(channel)
                except grpc.RpcError as error:
                    if error.code() not in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED):
                        raise

    with concurrent.futures.ThreadPoolExecutor(senders) as pool:
        sending = [pool.submit(send) for _ in range(senders if attack is not None else 0)]
        time.sleep(seconds)
        over.set()
        for one in sending:
            one.result()
    stop.set()
    found: list[float] = taken.get()
    caller.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--senders", type=int, default=5)
    options = parser.parse_args()
    is_bounded = True
    print("| meanwhile | honest calls | p50, ms | p99, ms | longest, ms |\n|---|---|---|---|---|")
    with run.server_process(COMMAND) as (address, _):
        quiet_s = 0.0
        for name, attack in {"nothing": None, **attacks()}.items():
            taken = measure(address, attack, options.senders, options.seconds)
            longest = max(taken)
            quiet_s = longest if attack is None else quiet_s
            is_bounded = is_bounded and longest - quiet_s <= BOUND_S
            p50, p99 = np.percentile(taken, [50, 99])
            print(f"| {name} | {len(taken)} | {p50 * 1e3:.2f} | {p99 * 1e3:.1f} | {longest * 1e3:.0f} |", flush=True)
    print(f"verdict: {'within' if is_bounded else 'beyond'} {BOUND_S} s")
    raise SystemExit(int(not is_bounded))


if __name__ == "__main__":
    main()
