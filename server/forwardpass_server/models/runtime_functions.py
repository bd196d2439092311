"""Traced functions in TensorFlow's runtime, without the Python objects of their graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from forwardpass_server.models import graphs, private_tensorflow

# The functions of some ten small models, whose kernels take 6 MiB.
_MAX_STALE_KERNELS = 128


class _KernelCache:
    """TensorFlow's cache of kernels: one for each function and types of arguments that was called.

    The kernels outlive their functions: 0.6 MiB for each load of a small model. TensorFlow drops the kernels of a
    function with it only if they carry its name, as those of a call by name do; but such a call takes 100 us of
    processor time, and StatefulPartitionedCall takes 40. So this class clears the cache after many functions are gone.
    A running call holds its kernel, and the next call of each function makes a new one.
    """

    def __init__(self) -> None:
        self._stale = 0

    def add_stale(self) -> None:
        """Counts a function that was deleted."""
        self._stale += 1

    def clear_when_stale(self) -> None:
        """Clears the cache if it holds the kernels of many functions that were deleted."""
        if self._stale >= _MAX_STALE_KERNELS:
            self._stale = 0
            private_tensorflow.clear_kernel_cache()


KERNELS = _KernelCache()
"""There is one cache for the process."""


class RuntimeFunction:
    """A concrete function as the call operation needs it: its `name`, which is valid while this object exists.

    captured: the tensors that follow the arguments in each call. results: the specs of what it returns.

    It does not keep the graph. A Keras network of 17 layers then takes 500 Python objects instead of 8,700, and half of
    the memory. These objects are freed without the garbage collector; a graph has cycles of references.
    """

    def __init__(self, concrete: Any) -> None:
        self.name: bytes = concrete.name
        self.captured: list[Any] = list(concrete.captured_inputs)
        self.results: list[tf.TensorSpec] = [tf.TensorSpec(one.shape, one.dtype) for one in concrete.outputs]
        self._held = private_tensorflow.hold(concrete)
        # TensorFlow keeps Python code that a function calls in the graph in which it was traced, that of the thread.
        self._traced_in = concrete.graph.outer_graph if graphs.calls_python(concrete) else None

    def in_graph(self, arguments: Sequence[Any]) -> list[tf.Tensor]:
        """Calls the function in the graph that is being built, by its name. The graph must not outlive this object."""
        results = tf.raw_ops.StatefulPartitionedCall(
            args=[*arguments, *self.captured],
            Tout=[spec.dtype for spec in self.results],
            f=self.name.decode(),
        )
        for result, spec in zip(results, self.results, strict=True):
            result.set_shape(spec.shape)
        return list(results)

    def __del__(self) -> None:
        KERNELS.add_stale()
