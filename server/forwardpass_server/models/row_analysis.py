"""Follows a graph, and the functions that it calls, to find how each tensor depends on the batch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from forwardpass_server.models import (
    integer_rules,
    layout_rules,
    list_rules,
    private_tensorflow,
    product_rules,
    rounding,
    row_kinds,
    row_rules,
    sizes,
)
from forwardpass_server.models.row_kinds import (
    Counts,
    Elements,
    Free,
    GraphRefused,
    Inseparable,
    Kind,
    Nothing,
    Other,
    Rows,
    Values,
)
from forwardpass_server.models.row_rules import Rule, Step
from forwardpass_server.models.sizes import ROWS, Size

RULES: dict[str, Rule] = {**row_rules.RULES, **layout_rules.RULES, **product_rules.RULES, **list_rules.RULES}
"""The rule of each type of operation that is known to keep rows apart. Operations that call functions have none."""

_LOOPS = ("While", "StatelessWhile")
_BRANCHES = ("If", "StatelessIf")
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
CALLING = (*_LOOPS, *_BRANCHES, *_CALLS)
"""The operations that call functions of the graph. What these do is looked into."""

# They return their arguments, whatever these are.
_PASSING = ("Identity", "IdentityN", "StopGradient", "Snapshot", "PreventGradient")

# A table is filled before the graph runs. An operation that changes it is refused.
_READING = ("LookupTableFindV2",)

# The file may claim any shape for their results. Only a shape that follows from their arguments is used.
_CLAIMING = frozenset(
    (*CALLING, "PlaceholderWithDefault", "TensorListGetItem", "TensorListPopBack", "Merge", "Enter", "Case")
)


def outputs(graph: tf.Graph, inputs: Mapping[str, Kind], results: Sequence[Any]) -> list[Kind]:
    """The kinds of some tensors of a graph.

    inputs: kinds of its placeholders, by the names of their tensors; the others do not depend on the batch.
    A table is expected to give one value for each key.
    Raises Inseparable for an operation with an effect, wherever it is.
    """
    followed = _Graph(_Functions(graph), "", is_final=True)
    followed.follow(graph, inputs)
    return [followed.kinds[tensor.name] for tensor in results]


class _Functions:
    """The functions of a graph, each as a graph of its own."""

    def __init__(self, graph: tf.Graph) -> None:
        self._graph = graph
        self._known: dict[Any, Any] = {}
        self._followed = 0

    def count(self, operations: int) -> None:
        """Counts operations that are followed. Raises GraphRefused if they are too many, as in loops within loops."""
        self._followed += operations
        if self._followed > _MOST_OPERATIONS:
            raise GraphRefused("the graph has loops within loops that take too long to follow")

    def body(self, name: str, shapes: Sequence[tuple[int | None, ...] | None]) -> private_tensorflow.FunctionBody:
        """A function whose arguments have these shapes."""
        key = name, tuple(shapes)
        if key not in self._known:
            self._known[key] = private_tensorflow.function_body(self._graph, name, shapes)
        body: private_tensorflow.FunctionBody = self._known[key]
        return body


class _Graph:
    """One graph, or one call of a function.

    name: tells it from all others. is_final: an element of a list that was never set is an element that never will be.
    """

    def __init__(self, functions: _Functions, name: str, *, is_final: bool) -> None:
        self._functions = functions
        self._name = name
        self._is_final = is_final
        self.kinds: dict[str, Kind] = {}
        # Tensors whose shape TensorFlow may have inferred from a false claim.
        self._untrusted: set[str] = set()

    def follow(self, graph: tf.Graph, inputs: Mapping[str, Kind]) -> None:
        """Finds the kind of each tensor."""
        operations = graph.get_operations()
        self._functions.count(len(operations))
        for operation in operations:
            if operation.type == "Placeholder":
                tensor = operation.outputs[0]
                self.kinds[tensor.name] = inputs.get(tensor.name) or Free(self._static_dims(tensor))
                continue
            _check_effects(operation)
            kinds = [self.kinds[tensor.name] for tensor in operation.inputs]
            is_trusted = self._untrusted.isdisjoint(tensor.name for tensor in operation.inputs)
            try:
                found = self._results(operation, kinds, is_trusted)
                found = [
                    self._with_sizes(tensor, kind, is_trusted and operation.type not in _CLAIMING)
                    for tensor, kind in zip(operation.outputs, found, strict=True)
                ]
            except GraphRefused:
                raise
            except Inseparable as error:
                found = [Other(f"{operation.type} ({operation.name}) {error}")] * len(operation.outputs)
            for tensor, kind in zip(operation.outputs, found, strict=True):
                self.kinds[tensor.name] = kind
                is_proven = is_trusted and operation.type not in _CLAIMING
                # TensorFlow also infers numbers, such as those of a claimed shape, but none that depend on a row.
                if not is_proven and not (isinstance(kind, Rows | Elements) and _follows(tensor, kind)):
                    self._untrusted.add(tensor.name)
        if not inputs.keys() <= self.kinds.keys():
            raise Inseparable("the graph has lost an input")

    def _results(self, operation: Any, kinds: list[Kind], is_trusted: bool) -> Sequence[Kind]:
        if operation.type in _PASSING:
            return kinds
        if operation.type in CALLING:
            return self._of_functions(operation, kinds)
        if operation.type == "Const" and integer_rules.is_small(operation.outputs[0]):
            values = integer_rules.of_constant(tf.get_static_value(operation.outputs[0]))
            return [row_kinds.of_values(values)]
        if any(isinstance(kind, Nothing) for kind in kinds):
            return [Nothing()] * len(operation.outputs)
        other = next((kind for kind in kinds if isinstance(kind, Other)), None)
        if other is not None and operation.type not in row_rules.LENIENT:
            return [other] * len(operation.outputs)
        whole = integer_rules.results(operation, kinds)
        if whole is not None:
            return whole
        if all(isinstance(kind, Free) for kind in kinds) and operation.type not in _LIST_MAKERS:
            return self._of_free(operation, is_trusted)
        step = Step(operation, kinds, f"{self._name}{operation.name}")
        found = self._by_rule(step)
        return rounding.followed(operation, kinds, self._without_unset(found))

    def _by_rule(self, step: Step) -> Sequence[Kind]:
        kind: Kind | Sequence[Kind] | None = list_rules.of_pieces(step)
        if kind is None and step.type == "StridedSlice":
            kind = list_rules.owners(step)
        if kind is None:
            rule = RULES.get(step.type)
            if rule is None:
                raise Inseparable("is not known to keep rows apart")
            kind = rule(step)
        return kind if isinstance(kind, list) else [kind] * len(step.operation.outputs)  # type: ignore[list-item]

    def _without_unset(self, kinds: Sequence[Kind]) -> Sequence[Kind]:
        if self._is_final and any(isinstance(kind, Nothing) for kind in kinds):
            raise Inseparable("reads an element of a list that was not set")
        return kinds

    def _of_free(self, operation: Any, is_trusted: bool) -> list[Kind]:
        is_proven = is_trusted and operation.type not in _CLAIMING
        return [self._free(tensor) if is_proven else Free() for tensor in operation.outputs]

    def _free(self, tensor: Any) -> Free:
        dims = self._static_dims(tensor)
        if not integer_rules.is_small(tensor):
            return Free(dims)
        shape = tuple(tensor.shape.as_list())
        count = tensor.shape.num_elements()
        names = (f"{self._name}{tensor.name}={index}" for index in range(count))
        return Free(dims, Values(shape, tuple(map(sizes.unknown, names))))

    def _static_dims(self, tensor: Any) -> tuple[Size, ...] | None:
        """The sizes that TensorFlow infers for a tensor that does not depend on the batch."""
        if tensor.shape.rank is None:
            return None
        return tuple(
            sizes.unknown(f"{self._name}{tensor.name}[{axis}]") if size is None else Size(size)
            for axis, size in enumerate(tensor.shape.as_list())
        )

    def _with_sizes(self, tensor: Any, kind: Kind, is_proven: bool) -> Kind:
        """A kind with the sizes that TensorFlow infers. Raises Inseparable where both contradict each other."""
        if not isinstance(kind, Rows):
            return kind
        rank = tensor.shape.rank
        static = [None] * kind.rank if rank is None else tensor.shape.as_list()
        if len(static) != kind.rank:
            raise Inseparable("has a result of another rank than its rule expects")
        if static[kind.axis] is not None:
            raise Inseparable("fixes the number of rows")
        if any(size.has_rows for axis, size in enumerate(kind.dims) if axis != kind.axis):
            raise Inseparable("has the number of rows as the size of another dimension")
        if not is_proven:
            return kind
        dims = []
        for axis, (size, known) in enumerate(zip(kind.dims, static, strict=True)):
            if axis == kind.axis or known is None:
                dims.append(size)
            elif size.constant not in (None, known):
                raise Inseparable("has a result of another shape than its rule expects")
            else:
                dims.append(Size(known))
        return dataclasses.replace(kind, dims=tuple(dims))

    # Functions.

    def _of_functions(self, operation: Any, kinds: list[Kind]) -> Sequence[Kind]:
        name = f"{self._name}{operation.name}"
        if operation.type in _LOOPS:
            return self._of_loop(operation, kinds, name)
        if operation.type in _CALLS:
            return self._call(operation.get_attr("f").name, kinds, f"{name}/", is_final=self._is_final)
        if isinstance(kinds[0], Nothing):
            return [Nothing()] * len(operation.outputs)
        branches = [
            self._call(operation.get_attr(branch).name, kinds[1:], f"{name}/{branch}/", is_final=self._is_final)
            for branch in ("then_branch", "else_branch")
        ]
        if not isinstance(kinds[0], Free):
            raise Inseparable("takes a branch that depends on the batch")
        return [
            row_kinds.joined(one, other, f"{name}:{index}")
            for index, (one, other) in enumerate(zip(*branches, strict=True))
        ]

    def _of_loop(self, operation: Any, kinds: list[Kind], name: str) -> Sequence[Kind]:
        """The kinds of a loop's variables, which stay the same from one repetition to the next.

        An element of a list that no repetition has set may be set by a later one. So such elements are looked at only
        when all other kinds are found.
        """
        found = kinds
        for is_final in (False, True):
            for _ in range(_MOST_ROUNDS):
                changed = self._repeated(operation, found, name, is_final=is_final and self._is_final)
                if changed == found:
                    break
                found = changed
            else:
                raise Inseparable("changes its variables in too many ways")
        if found != self._repeated(operation, found, name, is_final=self._is_final):
            raise Inseparable("changes its variables in too many ways")
        return found

    def _repeated(self, operation: Any, kinds: list[Kind], name: str, *, is_final: bool) -> list[Kind]:
        (condition,) = self._call(operation.get_attr("cond").name, kinds, f"{name}/cond/", is_final=is_final)
        after = self._call(operation.get_attr("body").name, kinds, f"{name}/body/", is_final=is_final)
        if not isinstance(condition, Free | Nothing):
            reason = f": {condition.reason}" if isinstance(condition, Other) else ""
            raise Inseparable(f"runs as often as the batch decides{reason}")
        return [
            row_kinds.repeated(one, other, f"{name}:{index}")
            for index, (one, other) in enumerate(zip(kinds, after, strict=True))
        ]

    def _call(self, function: str, kinds: Sequence[Kind], name: str, *, is_final: bool) -> list[Kind]:
        body = self._functions.body(function, [_static_shape(kind) for kind in kinds])
        followed = _Graph(self._functions, name, is_final=is_final)
        inputs = zip(body.inputs, kinds, strict=True)
        followed.follow(body.graph, {tensor.name: kind for tensor, kind in inputs})
        return [followed.kinds[tensor.name] for tensor in body.outputs]


def _check_effects(operation: Any) -> None:
    """Refuses an operation with an effect or a state: all callers of a batch would share it.

    It is refused even where no prediction uses it.
    """
    if operation.type in (*CALLING, *_READING):
        return
    reason = "has an effect or a state" if operation.op_def.is_stateful else ""
    if any(attribute.type in ("func", "list(func)") for attribute in operation.op_def.attr):
        reason = "calls a function that is not looked into"
    if reason:
        raise GraphRefused(f"{operation.type} ({operation.name}) {reason}")


# A loop needs three to five rounds. 100,000 operations take about 5 s.
_MOST_ROUNDS = 20
_MOST_OPERATIONS = 200_000

# They make a list, which may come to hold rows.
_LIST_MAKERS = ("TensorListReserve", "EmptyTensorList", "TensorListFromTensor")


def lookups(graph: tf.Graph) -> set[tuple[tf.DType, tf.DType]]:
    """The types of keys and values of the tables that a graph, or a function that it calls, looks into."""
    definition = graph.as_graph_def()
    functions = (function.node_def for function in definition.library.function)
    return {
        (tf.as_dtype(node.attr["Tin"].type), tf.as_dtype(node.attr["Tout"].type))
        for node in itertools.chain(definition.node, *functions)
        if node.op in _READING
    }


def input_rows(tensor: Any) -> Rows:
    """The kind of an input of the graph: its first dimension is the batch."""
    dims = [ROWS]
    for axis, size in enumerate(tensor.shape.as_list()[1:], 1):
        dims.append(sizes.unknown(f"{tensor.name}[{axis}]") if size is None else Size(size))
    return Rows(0, tuple(dims))


def _static_shape(kind: Kind) -> tuple[int | None, ...] | None:
    """The shape of a tensor of this kind, as far as it is known for all batches; None for an unknown rank."""
    if isinstance(kind, Counts):
        return kind.values.shape
    if isinstance(kind, Elements):
        return ()
    if not isinstance(kind, Rows | Free) or kind.dims is None:
        return None
    return tuple(size.constant for size in kind.dims)


def _follows(tensor: Any, kind: Kind) -> bool:
    """Whether the shape that TensorFlow infers follows from the kind alone."""
    if tensor.shape.rank is None:
        return True
    shape = _static_shape(kind)
    return (
        shape is not None
        and len(shape) == tensor.shape.rank
        and all(known in (None, size) for known, size in zip(tensor.shape.as_list(), shape, strict=True))
    )


def reason_against(kinds: Iterable[Kind]) -> str:
    """Why predictions of these kinds cannot be taken apart into rows; "" if they can."""
    for kind in kinds:
        if isinstance(kind, Other):
            return kind.reason
        if isinstance(kind, Free):
            return "a prediction does not depend on the batch"
        if not isinstance(kind, Rows):
            return "a prediction depends on the number of rows, or on other rows"
        if kind.axis != 0:
            return f"a prediction has the batch as dimension {kind.axis}"
        if not kind.is_plain:
            return "a prediction has several entries for each row, or parts of rows, in its first dimension"
    return ""
