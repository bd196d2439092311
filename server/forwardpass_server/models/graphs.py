"""Analyses of a traced graph: unused arguments, loops, Python calls, and a fingerprint."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LOOPS = {"While", "StatelessWhile", "For", "Enter"}
_PYTHON = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")


def unused_arguments(concrete: Any) -> frozenset[int]:
    """The positions of a concrete function's arguments that neither it nor a function that it calls reads."""
    graph, library = _definition(concrete)
    names = [tensor.op.name for tensor in concrete.inputs]
    outputs = [tensor.op.name for tensor in concrete.outputs]
    return _Usage(library).unused(names, graph.node, outputs)


def has_loops(concrete: Any) -> bool:
    """Whether a concrete function, or one that it calls, has a loop whose length its values decide."""
    return not _LOOPS.isdisjoint(operations(concrete))


def calls_python(concrete: Any) -> bool:
    """Whether a concrete function, or one that it calls, runs Python code of the process that traced it."""
    return not _PYTHON.isdisjoint(operations(concrete))


def operations(concrete: Any) -> set[str]:
    """The types of operations of a concrete function and of all functions that it calls."""
    graph, library = _definition(concrete)
    return {node.op for node in itertools.chain(graph.node, *(function.node_def for function in library.values()))}


def fingerprint(concrete: Any) -> bytes:
    """SHA-256 over the operations, attributes and edges of a concrete function, but no names.

    Names of nodes and functions depend on what the process traced before. Without them the hash is the same in every
    process.
    """
    graph, library = _definition(concrete)
    return _Fingerprints(library).of(
        [tensor.op.name for tensor in concrete.inputs], graph.node, [tensor.name for tensor in concrete.outputs]
    )


def _definition(concrete: Any) -> tuple[Any, dict[str, Any]]:
    graph = concrete.graph.as_graph_def()
    return graph, {function.signature.name: function for function in graph.library.function}


class _Fingerprints:
    """Hashes functions that call each other, each once."""

    def __init__(self, library: Mapping[str, Any]) -> None:
        self._library = library
        self._known: dict[str, bytes] = {}

    def of(self, arguments: Sequence[str], nodes: Iterable[Any], outputs: Iterable[str]) -> bytes:
        """arguments: names. outputs: references, as nodes' inputs are: "name:port" or "name:result:port"."""
        numbers = {name: index for index, name in enumerate(arguments)}
        for node in nodes:
            numbers.setdefault(node.name, len(numbers))

        def reference(source: str) -> str:
            control, name = ("^", source[1:]) if source.startswith("^") else ("", source)
            name, _, port = name.partition(":")
            return f"{control}{numbers[name]}:{port}"

        digest = hashlib.sha256()
        for node in nodes:
            digest.update(f"{node.op}({','.join(map(reference, node.input))})".encode())
            # Attributes that begin with an underscore are internal to TensorFlow.
            for key in sorted(key for key in node.attr if not key.startswith("_")):
                digest.update(key.encode() + b"=" + self._attribute(node.attr[key]))
        digest.update(",".join(map(reference, outputs)).encode())
        return digest.digest()

    def _attribute(self, value: Any) -> bytes:
        functions = [value.func] if value.HasField("func") else list(value.list.func)
        if not functions:
            encoded: bytes = value.SerializeToString(deterministic=True)
            return encoded
        return b"".join(self._of_function(function.name) for function in functions)

    def _of_function(self, name: str) -> bytes:
        if name not in self._known:
            function = self._library[name]
            self._known[name] = self.of(
                [argument.name for argument in function.signature.input_arg],
                function.node_def,
                [function.ret[result.name] for result in function.signature.output_arg],
            )
        return self._known[name]


class _Usage:
    """Finds unused arguments of functions that call each other, each function once."""

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
