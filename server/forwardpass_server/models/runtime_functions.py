"""Traced functions as TensorFlow's runtime has them, without the Python objects of their graphs."""

from __future__ import annotations

from typing import Any

from tensorflow.python.eager import context
from tensorflow.python.eager.polymorphic_function import atomic_function

from forwardpass_server.models import graphs

_MAX_STALE_KERNELS = 128
"""As of some ten small models, which take 6 MiB."""


class _KernelCache:
    """The kernels of calls that TensorFlow keeps, one for each function and types of arguments.

    They outlive their functions: 0.6 MiB for each load of a small model. TensorFlow drops with a function only the
    kernels that carry its name, as those of a call by name do; but such a call takes 100 us of processor time where
    StatefulPartitionedCall takes 40. So the cache is cleared now and then. A call under way holds its kernel, and the
    next call of each function makes it again.
    """

    def __init__(self) -> None:
        self._stale = 0

    def add_stale(self) -> None:
        """Counts a function that is gone."""
        self._stale += 1

    def clear_when_stale(self) -> None:
        """Clears the cache where it holds the kernels of many functions that are gone."""
        if self._stale >= _MAX_STALE_KERNELS:
            self._stale = 0
            context.context().clear_kernel_cache()


KERNELS = _KernelCache()
"""TensorFlow's: there is one for the process."""


class RuntimeFunction:
    """What the call operation needs of a concrete function: `name`, for as long as this is there.

    Of a Keras network of 17 layers there stay 500 Python objects instead of 8,700 and half of the memory, and they
    are gone without the garbage collector once nobody uses them: a graph is one tangle of references.
    """

    def __init__(self, concrete: Any) -> None:
        self.name: bytes = concrete.name
        functions = _called(concrete.inference_fn)
        # The runtime counts by name who holds a function. The type matters to calls from Python alone.
        self._held = [
            atomic_function.AtomicFunction(name, context.context(), function_type=None)
            for name, function in functions.items()
            if not _is_of_tensorflow_1(function)
        ]
        self._held_of_tensorflow_1 = list(filter(_is_of_tensorflow_1, functions.values()))
        # TensorFlow ties Python code that a function calls to the graph in which it was traced, the thread's own.
        self._traced_in = concrete.graph.outer_graph if graphs.calls_python(concrete) else None

    def __del__(self) -> None:
        KERNELS.add_stale()


def _called(function: Any) -> dict[bytes, Any]:
    """By name, a function and all that it calls, and they call."""
    functions: dict[bytes, Any] = {}
    waiting = [function]
    while waiting:
        one = waiting.pop()
        if one.name not in functions:
            functions[one.name] = one
            if not _is_of_tensorflow_1(one):
                waiting += one.children
    return functions


def _is_of_tensorflow_1(function: Any) -> bool:
    """Whether this is a Defun, as in tf.nn.ctc_loss: it is in the runtime for as long as its Python object exists.

    The function that calls it lists those that it calls in turn, too.
    """
    return not hasattr(function, "children")
