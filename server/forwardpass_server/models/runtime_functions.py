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
        self._function = _without_graph(concrete.inference_fn)
        # TensorFlow ties Python code that a function calls to the graph in which it was traced, the thread's own.
        self._traced_in = concrete.graph.outer_graph if graphs.calls_python(concrete) else None


def _without_graph(function: Any) -> Any:
    """The same function of the runtime, which counts who holds it; with those that it calls."""
    children = [_without_graph(child) for child in function.children]
    # The type matters to calls from Python alone.
    return atomic_function.AtomicFunction(function.name, context.context(), function_type=None, children=children)
