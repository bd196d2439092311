"""Traced functions as TensorFlow's runtime has them, without the Python objects of their graphs."""

from __future__ import annotations

from typing import Any

from tensorflow.python.eager import context
from tensorflow.python.eager.polymorphic_function import atomic_function

from forwardpass_server.models import graphs


class RuntimeFunction:
    """What the call operation needs of a concrete function: `name`, for as long as this is there.

    Of a Keras network of 17 layers there stay 500 Python objects instead of 8,700 and half of the memory, and they
    are gone without the garbage collector once nobody uses them: a graph is one tangle of references.
    """

    def __init__(self, concrete: Any) -> None:
        self.name: bytes = concrete.name
        # The runtime counts by name who holds a function. The type matters to calls from Python alone.
        self._held = [
            atomic_function.AtomicFunction(name, context.context(), function_type=None)
            for name in _names(concrete.inference_fn)
        ]
        # TensorFlow ties Python code that a function calls to the graph in which it was traced, the thread's own.
        self._traced_in = concrete.graph.outer_graph if graphs.calls_python(concrete) else None


def _names(function: Any) -> set[bytes]:
    """Of a function and of all that it calls, and they call."""
    names: set[bytes] = set()
    waiting = [function]
    while waiting:
        one = waiting.pop()
        if one.name not in names:
            names.add(one.name)
            waiting += one.children
    return names
