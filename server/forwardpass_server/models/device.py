"""Chooses the device that runs the models, and the cores that TensorFlow uses."""

from __future__ import annotations

import os
import re

import tensorflow as tf

from forwardpass_server.errors import DeviceNotFound


def choose(wanted: str) -> str:
    """The TensorFlow name of a device, with memory growth on for GPUs.

    wanted: "auto" for the first GPU, or else the CPU; "cpu", "gpu", or one of several as "gpu:1".
    Raises DeviceNotFound, which names the available devices. Call it before TensorFlow runs anything: memory growth
    cannot be set later.
    """
    match = re.fullmatch(r"(auto|cpu|gpu)(?::(\d+))?", wanted.lower())
    if match is None:
        raise DeviceNotFound(f"device: expected auto, cpu, gpu or gpu:N, got {wanted!r}")
    for gpu in tf.config.list_physical_devices("GPU"):
        # Without memory growth TensorFlow takes all memory of the GPU at the first call.
        tf.config.experimental.set_memory_growth(gpu, True)
    kind, index = match.groups()
    if kind == "auto":
        kind = "gpu" if tf.config.list_logical_devices("GPU") else "cpu"
    found = [device.name for device in tf.config.list_logical_devices(kind.upper())]
    if int(index or 0) >= len(found):
        raise DeviceNotFound(f"device: expected one of {_all_names()}, got {wanted!r}")
    return found[int(index or 0)]


def use_cores(count: int) -> None:
    """Limits TensorFlow to so many cores. Call it before TensorFlow runs anything.

    By default TensorFlow uses all cores of the process's affinity, and ignores the CPU quota of a container: more
    threads than the quota allows use it up sooner, and then the kernel stops all of them. TensorFlow's own environment
    variables take precedence.
    """
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(count)
    if "TF_NUM_INTEROP_THREADS" not in os.environ:
        tf.config.threading.set_inter_op_parallelism_threads(count)


def _all_names() -> list[str]:
    return [device.name.removeprefix("/device:").lower() for device in tf.config.list_logical_devices()]
