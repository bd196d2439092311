"""Traced functions as TensorFlow's runtime has them, without the Python objects of their graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import context, core
from tensorflow.python.eager.polymorphic_function import atomic_function

from forwardpass_server.models import graphs


class RuntimeFunction:
    """A concrete function that can be called for as long as this object exists.

    Of a Keras network of 17 layers there stay 500 Python objects instead of 8,700 and half of the memory, and they
    are gone without the garbage collector once nobody uses them: a graph is one tangle of references.
    """

    def __init__(self, concrete: Any) -> None:
        self._name: bytes = concrete.name
        self._context = context.context()
        self._num_results = len(concrete.outputs)
        functions = _called(concrete.inference_fn)
        # The runtime counts by name who holds a function. The type matters to calls from Python alone.
        self._held = [
            atomic_function.AtomicFunction(name, self._context, function_type=None)
            for name, function in functions.items()
            if not _is_of_tensorflow_1(function)
        ]
        self._held_of_tensorflow_1 = list(filter(_is_of_tensorflow_1, functions.values()))
        # TensorFlow ties Python code that a function calls to the graph in which it was traced, the thread's own.
        self._traced_in = concrete.graph.outer_graph if graphs.calls_python(concrete) else None

    def __call__(self, tensors: Sequence[Any]) -> list[Any]:
        """Runs the function on eager tensors, and returns its results in order.

        The function's own name is the operation. StatefulPartitionedCall takes as long, but then TensorFlow keeps the
        kernel in the eager context's cache for good: it drops with a function only the kernels that carry the
        function's name (EagerContext::AddKernelToCache and RemoveFunction), 0.6 MiB for each load of a small model.
        """
        try:
            results: list[Any] = pywrap_tfe.TFE_Py_Execute(
                self._context._handle, self._context.device_name, self._name, tensors, (), self._num_results
            )
        except core._NotOkStatusException as error:
            raise core._status_to_exception(error) from None
        return results


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
