"""The device that runs the models."""

from __future__ import annotations

import os
import re

import tensorflow as tf

from forwardpass_server.errors import DeviceNotFound


def choose(wanted: str) -> str:
    """The TensorFlow name of a device, with memory growth on for GPUs.

    wanted: "auto" for the first GPU, or else the CPU; "cpu", "gpu", or one of several as "gpu:1".
    Raises DeviceNotFound, naming the devices that there are. Call it before TensorFlow runs anything: memory growth
    cannot be set later.
    """
    match = re.fullmatch(r"(auto|cpu|gpu)(?::(\d+))?", wanted.lower())
    if match is None:
        raise DeviceNotFound(f"device: expected auto, cpu, gpu or gpu:N, got {wanted!r}")
    for gpu in tf.config.list_physical_devices("GPU"):
        # Without it TensorFlow takes all of the GPU's memory at the first call.
        tf.config.experimental.set_memory_growth(gpu, True)
    kind, index = match.groups()
    if kind == "auto":
        kind = "gpu" if tf.config.list_logical_devices("GPU") else "cpu"
    found = [device.name for device in tf.config.list_logical_devices(kind.upper())]
    if int(index or 0) >= len(found):
        raise DeviceNotFound(f"device: expected one of {_all_names()}, got {wanted!r}")
    return found[int(index or 0)]


def use_cores(count: int) -> None:
    """Has TensorFlow spread its work over so many cores. Call it before TensorFlow runs anything.

    By itself it counts those that the process may run on, and knows nothing of a container's quota: more threads than
    that use up its time sooner, and then all of them are stopped. What TensorFlow's own variables say stays.
    """
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(count)
    if "TF_NUM_INTEROP_THREADS" not in os.environ:
        tf.config.threading.set_inter_op_parallelism_threads(count)


def _all_names() -> list[str]:
    return [device.name.removeprefix("/device:").lower() for device in tf.config.list_logical_devices()]
