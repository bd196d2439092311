"""One measurement: callers that call one server as fast as it answers, for some seconds. Prints JSON.

Kinds: a local call; the bare echo of our request with the weights by value, by id, and in chunks on a stream; the naive
server; TensorFlow's remote execution; ours.

One caller is a synchronous client; several are tasks of one grpc.aio client, so that what is measured is the server and
not a fight of threads over the client's Python.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grpc
import timing
import workloads
from timing import repeat, repeat_async

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import messages
from forwardpass.wire.chunks import CHUNK_BYTES
from forwardpass.wire.structures import Structure

# With the weights by value, by id, and by id over a pipeline.
OURS = ("value", "id", "pipeline")

OPTIONS = [("grpc.max_receive_message_length", 2**30), ("grpc.max_send_message_length", 2**30)]


def request_bytes(name: str, by_id: bool = False) -> int:
    """The length of our request for a workload, with the weights in it or their id."""
    parts = {"x": Structure.of(workloads.batch(name))}
    if not by_id:
        trainable, non_trainable = workloads.weights(workloads.WORKLOADS[name].model)
        parts["model_weights.trainable"] = Structure.of(trainable)
        parts["model_weights.non_trainable"] = Structure.of(non_trainable)
    selector = v1.ModelSelector(name=workloads.WORKLOADS[name].model, version=1)
    request = v1.PredictOnBatchRequest(model=selector, weights_id=bytes(32) if by_id else b"")
    return len(messages.encode(request, parts))


def echo_request(name: str, by_id: bool) -> bytes:
    """As many bytes as our request; the answer is as long as the predictions."""
    outputs = {"cnn": 62, "scale": 1024}.get(workloads.WORKLOADS[name].model, 10)
    answer = workloads.WORKLOADS[name].examples * outputs * 4 + 80
    return os.urandom(request_bytes(name, by_id) - 8) + answer.to_bytes(8, "little")


def tensorflow_call(address: str, name: str) -> Callable[[], Any]:
    """TensorFlow's remote execution: weights stay there, x goes, predictions come."""
    import models
    import tensorflow as tf

    tf.config.experimental_connect_to_host(address)
    model = getattr(models, workloads.WORKLOADS[name].model)()
    x = workloads.batch(name)
    with tf.device("/job:worker/replica:0/task:0/device:CPU:0"):
        weights = tf.nest.map_structure(tf.identity, model.initial_weights)
        concrete = tf.function(lambda x: model.predict_on_batch(weights, x, training=False)).get_concrete_function(
            tf.TensorSpec(x.shape, tf.float32)
        )

    def call() -> Any:
        with tf.device("/job:worker/replica:0/task:0/device:CPU:0"):
            return concrete(tf.constant(x)).numpy()

    workloads.check(name, call())
    return call


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


def measure(kind: str, address: str, name: str, seconds: float) -> list[float]:
    """One caller."""
    model_name = workloads.WORKLOADS[name].model
    x = workloads.batch(name)
    if kind == "local":
        return repeat(local_call(name), seconds)
    if kind == "tensorflow":
        return repeat(tensorflow_call(address, name), seconds)
    if kind in OURS:
        with forwardpass_client.connect(address, max_message_bytes=2**30, reuse_weights=False) as client:
            model = client.model(model_name)
            weights = workloads.weights(model_name)
            if kind == "value":
                return repeat(lambda: model.predict_on_batch(weights, x, training=False), seconds)
            handle = model.put_weights(weights)
            if kind == "id":
                return repeat(lambda: model.predict_on_batch(handle, x, training=False), seconds)
            with model.pipeline(handle) as pipeline:
                return repeat(lambda: pipeline.predict_on_batch(x, training=False).result(), seconds)
    with grpc.insecure_channel(address, OPTIONS) as channel:
        if kind == "naive":
            return repeat(naive_call(channel, name), seconds)
        request = echo_request(name, kind != "echo")
        if kind == "echo-stream":
            return repeat(lambda: echo_in_chunks(channel, request), seconds)
        method = channel.unary_unary("/floor/Echo")
        return repeat(lambda: method(request), seconds)


def echo_in_chunks(channel: grpc.Channel, request: bytes) -> None:
    pieces = (request[start : start + CHUNK_BYTES] for start in range(0, len(request), CHUNK_BYTES))
    for _ in channel.stream_stream("/floor/EchoStream")(pieces):
        pass


async def measure_async(kind: str, address: str, name: str, callers: int, seconds: float) -> list[float]:
    """Several callers."""
    if kind in OURS:
        model_name = workloads.WORKLOADS[name].model
        weights, x = workloads.weights(model_name), workloads.batch(name)
        async with forwardpass_client.connect_async(address, max_message_bytes=2**30, reuse_weights=False) as client:
            model = await client.model(model_name)
            if kind == "value":
                return await repeat_async(lambda: model.predict_on_batch(weights, x, training=False), callers, seconds)
            handle = await model.put_weights(weights)
            if kind == "id":
                return await repeat_async(lambda: model.predict_on_batch(handle, x, training=False), callers, seconds)
            async with await model.pipeline(handle) as pipeline:
                return await repeat_async(lambda: pipeline.predict_on_batch(x, training=False), callers, seconds)
    async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
        if kind == "naive":
            return await repeat_async(naive_call(channel, name), callers, seconds)
        method, request = channel.unary_unary("/floor/Echo"), echo_request(name, kind != "echo")
        return await repeat_async(lambda: method(request), callers, seconds)


KINDS = ("local", "echo", "echo-id", "echo-stream", "naive", "tensorflow", *OURS)


def main() -> None:
    options = timing.arguments(__doc__, KINDS)
    kind, address, name = options.kind, options.address, options.workload
    if kind == "tensorflow" and options.callers > 1:
        call = tensorflow_call(address, name)
        taken = timing.on_threads(lambda: repeat(call, options.seconds), options.callers)
    elif options.callers == 1:
        taken = measure(kind, address, name, options.seconds)
    else:
        taken = asyncio.run(measure_async(kind, address, name, options.callers, options.seconds))
    by_value = kind in ("echo", "naive", "value", "local")
    timing.show(taken, options.callers, request_bytes=request_bytes(name, not by_value))


if __name__ == "__main__":
    main()
