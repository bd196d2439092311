"""Arrays as tensors on a device."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire.dtypes import Array
from forwardpass_server.models import private_tensorflow
from forwardpass_server.process import control_groups

_LOGGER = logging.getLogger(__name__)

CPU = "/device:CPU:0"

# Of the host's memory that this process may take, which models, messages and everybody else in its control group need
# too; a GPU is the server's own.
_HOST_SHARE = 0.25
_GPU_SHARE = 0.5
_UNKNOWN_GPU_BYTES = 8 * 2**30


def device_of(dtype: tf.DType, device: str) -> str:
    """Where tensors of a type are kept: no device but the CPU holds strings."""
    return CPU if dtype == tf.string else device


class TensorFlowDevice:
    """A device that tensors are kept on: see `weights.store.Device`, and `process.liveness.TriedDevice`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def place(self, array: Array) -> Any:
        dtype = tf.dtypes.as_dtype(array.dtype)
        make = private_tensorflow.tensor_maker()
        return make(array, device_of(dtype, self._name), dtype.as_datatype_enum)

    def fetch(self, placed: Any) -> Array:
        return np.asarray(placed)

    def try_out(self) -> None:
        # One that is full of weights and batches works as it should.
        with contextlib.suppress(tf.errors.ResourceExhaustedError), tf.device(self._name):
            # The result is waited for where it is copied to the host.
            np.asarray(tf.raw_ops.Add(x=self.place(np.ones(8, np.float32)), y=self.place(np.ones(8, np.float32))))

    def default_budget_bytes(self) -> int:
        """The share of the device's memory that weights may take unless somebody says otherwise."""
        if self._name.startswith("/device:GPU"):
            return int(_gpu_memory_bytes() * _GPU_SHARE)
        return int(control_groups.memory_bytes() * _HOST_SHARE)


def _gpu_memory_bytes() -> int:
    """The memory of the smallest GPU. TensorFlow knows it, and does not tell."""
    try:
        import pynvml
    except ImportError:
        _LOGGER.warning(
            "the package nvidia-ml-py is not installed: the server assumes that the GPU has %d bytes",
            _UNKNOWN_GPU_BYTES,
        )
        return _UNKNOWN_GPU_BYTES
    pynvml.nvmlInit()
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return min(int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles)
    finally:
        pynvml.nvmlShutdown()
