"""Questions asked of a traced graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")


def unused_arguments(concrete: Any) -> frozenset[int]:
    """The positions of a concrete function's arguments that nothing in it reads, calls of functions looked into."""
    graph = concrete.graph.as_graph_def()
    library = {function.signature.name: function for function in graph.library.function}
    names = [tensor.op.name for tensor in concrete.inputs]
    outputs = [tensor.op.name for tensor in concrete.outputs]
    return _Usage(library).unused(names, graph.node, outputs)


class _Usage:
    """Finds unused arguments of functions that call each other; each function is looked at once."""

    def __init__(self, library: Mapping[str, Any]) -> None:
        self._library = library
        self._known: dict[str, frozenset[int]] = {}

    def unused(self, arguments: Sequence[str], nodes: Iterable[Any], outputs: Iterable[str]) -> frozenset[int]:
        """arguments, outputs: names of nodes. Positions of the arguments on which no output or effect depends."""
        consumers: dict[str, list[tuple[Any, int]]] = {}
        for node in nodes:
            for position, source in enumerate(name for name in node.input if not name.startswith("^")):
                consumers.setdefault(source.split(":")[0], []).append((node, position))
        returned = set(outputs)

        def is_read(name: str) -> bool:
            return name in returned or any(
                is_read(node.name) if node.op == "Identity" else position not in self._unused_inputs(node)
                for node, position in consumers.get(name, ())
            )

        return frozenset(index for index, name in enumerate(arguments) if not is_read(name))

    def _unused_inputs(self, node: Any) -> frozenset[int]:
        return self._of_function(node.attr["f"].func.name) if node.op in _CALLS else frozenset()

    def _of_function(self, name: str) -> frozenset[int]:
        if name not in self._known:
            function = self._library[name]
            self._known[name] = self.unused(
                [argument.name for argument in function.signature.input_arg],
                function.node_def,
                [source.split(":")[0] for source in function.ret.values()],
            )
        return self._known[name]
