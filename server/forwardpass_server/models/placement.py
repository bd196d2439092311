"""Places arrays on a device, as tensors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire import errors
from forwardpass.wire.dtypes import Array
from forwardpass_server.models import arithmetic, private_tensorflow
from forwardpass_server.process import control_groups

_LOGGER = logging.getLogger(__name__)

CPU = "/device:CPU:0"

# The default share of weights. Models, messages and other processes of the control group need the host's memory too; no
# other process uses the GPU.
_HOST_SHARE = 0.25
_GPU_SHARE = 0.5
_UNKNOWN_GPU_BYTES = 8 * 2**30


def device_of(dtype: tf.DType, device: str) -> str:
    """The device for tensors of a type: only the CPU can hold strings."""
    return CPU if dtype == tf.string else device


class TensorFlowDevice:
    """A device that holds tensors: see `weights.store.Device`, and `process.liveness.TriedDevice`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_host = name == CPU

    def place(self, array: Array) -> Any:
        """An eager tensor. On a CPU it shares the memory of an array whose data is aligned to 64 bytes.

        So nobody may change the array. Strings are kept on the CPU, whatever the device is.
        """
        dtype = tf.dtypes.as_dtype(array.dtype)
        make = private_tensorflow.tensor_maker()
        return make(array, device_of(dtype, self._name), dtype.as_datatype_enum)

    def fetch(self, placed: Any) -> Array:
        """A placed array in the memory of the host, read-only. On a CPU it shares the memory of the tensor."""
        return array_of(placed)

    def add(self, total: Any | None, terms: Sequence[tuple[Any, float]], dtype: np.dtype[Any]) -> Any:
        """See `weights.store.Device`."""
        if self._is_host:
            # All have one dtype: comparing each one's would cost more than reading it.
            read = array_of if terms[0][0].dtype == tf.bfloat16 else np.asarray
            return arithmetic.add_on_host(total, [(read(tensor), number) for tensor, number in terms], dtype)
        with _refusing(), tf.device(self._name):
            return arithmetic.add_on_device(total, terms, dtype)

    def rounded(self, total: Any, dtype: np.dtype[Any]) -> Any:
        """See `weights.store.Device`."""
        if self._is_host:
            return self.place(arithmetic.round_on_host(total, dtype))
        with _refusing(), tf.device(self._name):
            return arithmetic.round_on_device(total, dtype)

    def try_out(self) -> None:
        """Adds two vectors and waits for the sum. Raises what TensorFlow raises, unless memory is full."""
        # A full device still works.
        with contextlib.suppress(tf.errors.ResourceExhaustedError), tf.device(self._name):
            # Copying the result to the host waits for it.
            np.asarray(tf.raw_ops.Add(x=self.place(np.ones(8, np.float32)), y=self.place(np.ones(8, np.float32))))

    def default_budget_bytes(self) -> int:
        """The default budget of the weight store: a share of the device's memory."""
        if self._name.startswith("/device:GPU"):
            return int(_gpu_memory_bytes() * _GPU_SHARE)
        return int(control_groups.memory_bytes() * _HOST_SHARE)


def array_of(tensor: Any) -> Array:
    """The elements of a tensor. On a CPU the array shares the memory of the tensor."""
    # np.asarray of a bfloat16 tensor without dimensions fails or returns a number instead of an array.
    return np.asarray(tensor.numpy() if tensor.dtype == tf.bfloat16 and not tensor.shape.rank else tensor)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Raises OutOfMemory where the device has too little memory."""
    try:
        yield
    except tf.errors.ResourceExhaustedError:
        raise errors.OutOfMemory() from None


def _gpu_memory_bytes() -> int:
    """The memory of the smallest GPU, as NVML reports it. TensorFlow has no public function for this number."""
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
