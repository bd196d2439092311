"""What one writes first: TensorProto messages, tf.make_ndarray, a tf.function, a server of threads."""

from __future__ import annotations

import concurrent.futures
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grpc
import models
import tensorflow as tf
import workloads
from tensorflow.core.framework import attr_value_pb2

# The list of TensorProto that TensorFlow itself has.
Tensors = attr_value_pb2.AttrValue.ListValue


def _handler(name: str) -> Any:
    model = getattr(models, name)()

    def predict(request: Any, context: object) -> Any:
        *flat, x = (tf.make_ndarray(tensor) for tensor in request.tensor)
        predictions = model.predict_on_batch((tuple(flat), ()), x, training=False)
        return Tensors(tensor=[tf.make_tensor_proto(predictions.numpy())])

    return grpc.unary_unary_rpc_method_handler(
        predict, request_deserializer=Tensors.FromString, response_serializer=Tensors.SerializeToString
    )


def serve() -> None:
    names = {workload.model for workload in workloads.WORKLOADS.values()}
    server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(32),
        options=[("grpc.max_receive_message_length", 2**30), ("grpc.max_send_message_length", 2**30)],
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("naive", {name: _handler(name) for name in names}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    serve()
