"""One measurement: callers that call one server as fast as it answers, for some seconds. Prints JSON.

One caller is a synchronous client; several are tasks of one grpc.aio client, so that what is measured is the server and
not a fight of threads over the client's Python.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grpc
import workloads

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import messages
from forwardpass.wire.structures import Structure

OPTIONS = [("grpc.max_receive_message_length", 2**30), ("grpc.max_send_message_length", 2**30)]


def request_bytes(name: str) -> int:
    """The length of our request for a workload."""
    trainable, non_trainable = workloads.weights(workloads.WORKLOADS[name].model)
    parts = {
        "model_weights.trainable": Structure.of(trainable),
        "model_weights.non_trainable": Structure.of(non_trainable),
        "x": Structure.of(workloads.batch(name)),
    }
    selector = v1.ModelSelector(name=workloads.WORKLOADS[name].model, version=1)
    return len(messages.encode(v1.PredictOnBatchRequest(model=selector), parts))


def echo_request(name: str) -> bytes:
    """As many bytes as our request; the answer is as long as the predictions."""
    outputs = {"mlp": 10, "cnn": 62, "scale": 1024}[workloads.WORKLOADS[name].model]
    answer = workloads.WORKLOADS[name].examples * outputs * 4 + 80
    return os.urandom(request_bytes(name) - 8) + answer.to_bytes(8, "little")


def naive_call(channel: Any, name: str) -> Callable[[], Any]:
    """A call of the naive server: TensorProto out, TensorProto in."""
    import tensorflow as tf
    from naive_server import Tensors

    model = workloads.WORKLOADS[name].model
    arrays = [*workloads.weights(model)[0], workloads.batch(name)]
    method = channel.unary_unary(f"/naive/{model}", Tensors.SerializeToString, Tensors.FromString)

    def request() -> Any:
        return Tensors(tensor=[tf.make_tensor_proto(array) for array in arrays])

    if isinstance(channel, grpc.aio.Channel):

        async def call_async() -> None:
            tf.make_ndarray((await method(request())).tensor[0])

        return call_async
    return lambda: tf.make_ndarray(method(request()).tensor[0])


def local_call(name: str) -> Callable[[], Any]:
    """The model in this process by the shortest way: numpy in, numpy out, no gRPC."""
    import models

    from forwardpass.wire.description import Function
    from forwardpass_server.models import tracing
    from forwardpass_server.models.execution import Execution

    traced = tracing.trace(getattr(models, workloads.WORKLOADS[name].model)())
    execution = Execution(traced.functions, "/device:CPU:0")
    leaves = [*traced.initial_weights, workloads.batch(name)]
    return lambda: execution.run(Function.PREDICT_ON_BATCH, False, leaves)


def repeat(call: Callable[[], Any], seconds: float) -> list[float]:
    """The seconds of each call, for so long."""
    for _ in range(5):
        call()
    taken = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        call()
        taken.append(time.perf_counter() - started)
    return taken


async def repeat_async(call: Callable[[], Awaitable[Any]], callers: int, seconds: float) -> list[float]:
    taken = []

    async def caller() -> None:
        for _ in range(2):
            await call()
        while True:
            started = time.perf_counter()
            await call()
            taken.append(time.perf_counter() - started)
            if time.perf_counter() > end:
                break

    end = time.perf_counter() + seconds
    await asyncio.gather(*(caller() for _ in range(callers)))
    return taken


def measure(kind: str, address: str, name: str, seconds: float) -> list[float]:
    """One caller."""
    if kind == "local":
        return repeat(local_call(name), seconds)
    if kind == "ours":
        model_name = workloads.WORKLOADS[name].model
        weights, x = workloads.weights(model_name), workloads.batch(name)
        with forwardpass_client.connect(address) as client:
            model = client.model(model_name)
            return repeat(lambda: model.predict_on_batch(weights, x, training=False), seconds)
    with grpc.insecure_channel(address, OPTIONS) as channel:
        if kind == "naive":
            return repeat(naive_call(channel, name), seconds)
        method, request = channel.unary_unary("/floor/Echo"), echo_request(name)
        return repeat(lambda: method(request), seconds)


async def measure_async(kind: str, address: str, name: str, callers: int, seconds: float) -> list[float]:
    """Several callers."""
    if kind == "ours":
        model_name = workloads.WORKLOADS[name].model
        weights, x = workloads.weights(model_name), workloads.batch(name)
        async with forwardpass_client.connect_async(address) as client:
            model = await client.model(model_name)
            return await repeat_async(lambda: model.predict_on_batch(weights, x, training=False), callers, seconds)
    async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
        if kind == "naive":
            return await repeat_async(naive_call(channel, name), callers, seconds)
        method, request = channel.unary_unary("/floor/Echo"), echo_request(name)
        return await repeat_async(lambda: method(request), callers, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["local", "echo", "naive", "ours"])
    parser.add_argument("workload", choices=list(workloads.WORKLOADS))
    parser.add_argument("--address", default="")
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    if options.callers == 1:
        taken = measure(options.kind, options.address, options.workload, options.seconds)
    else:
        taken = asyncio.run(
            measure_async(options.kind, options.address, options.workload, options.callers, options.seconds)
        )
    taken.sort()
    print(
        json.dumps(
            {
                "calls_per_s": options.callers * len(taken) / sum(taken),
                "p50_ms": taken[len(taken) // 2] * 1e3,
                "p99_ms": taken[int(len(taken) * 0.99)] * 1e3,
                "request_bytes": request_bytes(options.workload),
            }
        )
    )


if __name__ == "__main__":
    main()
