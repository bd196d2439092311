"""What all calls of one function of one model share, worked out once when the model is loaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

from google.protobuf.message import Message

from forwardpass.wire import conform, errors, specs, trees
from forwardpass.wire.description import Function
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import StructureSpec
from forwardpass.wire.structures import Structure
from forwardpass.wire.trees import Kind
from forwardpass_server.serving.models import LoadedModel
from forwardpass_server.serving.scheduling import Estimates

MessageT = TypeVar("MessageT", bound=Message)


@dataclasses.dataclass(frozen=True, slots=True)
class Argument:
    """One structure that a function takes. is_optional: the function does not read it, so it may be None."""

    place: str
    spec: StructureSpec
    is_optional: bool


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """How one function of one model is called.

    unavailable: why the model lacks the function; "" where it has it.
    shares_batch: several arguments must agree in the batch dimension.
    run: flat leaves in, flat leaves out; only for a function that the model has.
    estimates: how long it takes.
    """

    function: Function
    unavailable: str
    arguments: tuple[Argument, ...]
    results: tuple[tuple[str, StructureSpec], ...]
    shares_batch: bool
    run: Callable[[Sequence[Array]], list[Array]]
    estimates: Estimates

    def flatten(self, parts: Mapping[str, Structure]) -> list[Array]:
        """The flat arguments from the structures of a request.

        Raises FunctionNotAvailable, StructureMismatch, DTypeMismatch or ShapeMismatch.
        """
        if self.unavailable:
            raise errors.FunctionNotAvailable(f"{self.function.title} is not available: {self.unavailable}")
        flat: list[Array] = []
        checked = []
        for argument in self.arguments:
            part = parts.get(argument.place)
            if part is not None and part.tree.kind is not Kind.NONE:
                leaves = conform.check(part, argument.spec, argument.place)
            elif argument.is_optional or not argument.spec.leaves:
                leaves = [specs.zeros(leaf) for leaf in argument.spec.leaves]
            else:
                raise errors.StructureMismatch(place=argument.place, expected=str(argument.spec), found="None")
            checked.append((argument.place, leaves, argument.spec))
            flat += leaves
        if self.shares_batch:
            conform.check_batch(checked)
        return flat

    def unflatten(self, leaves: list[Array]) -> dict[str, Structure]:
        """The structures of a response from the flat results."""
        parts = {}
        position = 0
        for place, spec in self.results:
            end = position + len(spec.leaves)
            parts[place] = Structure(spec.tree, leaves[position:end])
            position = end
        return parts


class Servable:
    """A loaded model with the plans of all its functions."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.identity = model.description.identity
        self._headers: dict[type[Message], Message] = {}
        self._plans = {
            (function, training): _plan(model, function, training)
            for function in Function
            for training in ((True, False) if function.has_training else (False,))
        }

    def response_header(self, response_type: type[MessageT]) -> MessageT:
        """A response of this type that names the model, in the field `model` that every such response has."""
        header = self._headers.get(response_type)
        if header is None:
            header = self._headers[response_type] = response_type(model=self.identity.message())
        return cast(MessageT, header)

    def plan(self, function: Function, training: bool = False) -> Plan:
        return self._plans[function, training]


def _plan(model: LoadedModel, function: Function, training: bool) -> Plan:
    spec = model.description.spec
    arguments = tuple(
        Argument(place, _as_decoded(part), spec.may_be_none(place)) for place, part in spec.arguments[function].items()
    )
    batched = sum(leaf.batched for argument in arguments for leaf in argument.spec.leaves)
    return Plan(
        function=function,
        unavailable=spec.unavailable.get(function, ""),
        arguments=arguments,
        results=tuple(spec.results[function].items()),
        shares_batch=batched > 1,
        run=functools.partial(model.run, function, training),
        estimates=Estimates(model.has_loops(function, training)),
    )


def _as_decoded(spec: StructureSpec) -> StructureSpec:
    """The spec with the very tree that a request's bytes are decoded to: two of one kind need no comparison then."""
    return dataclasses.replace(spec, tree=trees.decode(spec.tree.encoded))
