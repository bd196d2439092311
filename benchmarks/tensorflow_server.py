"""A peer: TensorFlow's own remote execution. The client holds the graph and the tensors' handles, this runs them."""

from __future__ import annotations

import os
import socket
import threading

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf


def serve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    server = tf.distribute.Server({"worker": [address]}, job_name="worker", task_index=0, protocol="grpc")
    print(f"listening on {address}", flush=True)
    threading.Event().wait()
    del server


if __name__ == "__main__":
    serve()
