"""What all calls of one function of one model share, worked out once when the model is loaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import numpy as np
from google.protobuf.message import Message

from forwardpass.wire import conform, errors, limits, specs, trees
from forwardpass.wire.description import MASKS_OF, Function
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import StructureSpec
from forwardpass.wire.structures import Structure
from forwardpass.wire.trees import Kind
from forwardpass_server.calls.model import Leaf, LoadedModel
from forwardpass_server.calls.scheduling import Estimates

MessageT = TypeVar("MessageT", bound=Message)


@dataclasses.dataclass(frozen=True, slots=True)
class Argument:
    """One structure that a function takes.

    is_optional: the function does not read it, so it may be None.
    masked: for a Keras mask the argument whose mask it is, "" otherwise; masked_leaves: as of `ModelSpec`.
    """

    place: str
    spec: StructureSpec
    is_optional: bool
    masked: str = ""
    masked_leaves: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """How one function of one model is called.

    unavailable: why the model lacks the function; "" where it has it.
    weights: how many of the arguments, the first ones, are the model's weights.
    is_prediction: the function is predict_on_batch, or a forward pass that is made of it and the loss.
    shares_batch: several arguments must agree in the batch dimension.
    is_small: the arguments have few leaves: see `limits.SMALL_LEAVES`.
    run: flat leaves in, flat leaves out; only for a function that the model has.
    estimates: how long it takes.
    """

    function: Function
    unavailable: str
    arguments: tuple[Argument, ...]
    weights: int
    results: tuple[tuple[str, StructureSpec], ...]
    is_prediction: bool
    shares_batch: bool
    is_small: bool
    run: Callable[[Sequence[Leaf]], list[Array]]
    estimates: Estimates

    def flatten(self, parts: Mapping[str, Structure], weights: Sequence[Leaf] | None = None) -> list[Leaf]:
        """The flat arguments from the structures of a request.

        weights: the model's weights, where they are not among the structures.
        Raises FunctionNotAvailable, StructureMismatch, DTypeMismatch or ShapeMismatch.
        """
        if self.unavailable:
            raise errors.FunctionNotAvailable(f"{self.function.title} is not available: {self.unavailable}")
        flat: list[Leaf] = []
        arguments = self.arguments
        if weights is not None:
            flat += weights
            arguments = arguments[self.weights :]
        checked = []
        found: dict[str, Sequence[Array]] = {}
        for argument in arguments:
            part = parts.get(argument.place)
            if part is not None and part.tree.kind is not Kind.NONE:
                leaves = conform.check(part, argument.spec, argument.place)
            elif argument.masked:
                leaves = _all_true(argument, found[argument.masked])
            elif argument.is_optional or not argument.spec.leaves:
                leaves = [specs.zeros(leaf) for leaf in argument.spec.leaves]
            else:
                raise errors.StructureMismatch(place=argument.place, expected=str(argument.spec), found="None")
            checked.append((argument.place, leaves, argument.spec))
            found[argument.place] = leaves
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
        self.spec = model.description.spec
        # Calls with the same weights may share a batch.
        self.is_batchable = not model.description.unbatchable_reason
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
        Argument(place, _as_decoded(part), spec.may_be_none(place), MASKS_OF.get(place, ""), spec.masked_leaves)
        for place, part in spec.arguments[function].items()
    )
    batched = sum(leaf.batched for argument in arguments for leaf in argument.spec.leaves)
    return Plan(
        function=function,
        unavailable=spec.unavailable.get(function, ""),
        arguments=arguments,
        weights=sum(argument.place in spec.weights_places for argument in arguments),
        results=tuple(spec.results[function].items()),
        is_prediction=function is Function.PREDICT_ON_BATCH
        or (function is Function.FORWARD_PASS and not spec.has_own_forward_pass),
        shares_batch=batched > 1,
        is_small=sum(len(argument.spec.leaves) for argument in arguments) <= limits.SMALL_LEAVES,
        run=functools.partial(model.run, function, training),
        estimates=Estimates(model.has_loops(function, training)),
    )


def _all_true(argument: Argument, predictions: Sequence[Array]) -> list[Array]:
    """The mask that counts every position, which is what a request without a mask asks for."""
    masks = []
    for index, leaf in zip(argument.masked_leaves, argument.spec.leaves, strict=True):
        shape = predictions[index].shape
        masks.append(np.ones(shape if leaf.shape is None else shape[: len(leaf.shape)], leaf.dtype))
    return masks


def _as_decoded(spec: StructureSpec) -> StructureSpec:
    """The spec with the very tree that a request's bytes are decoded to: two of one kind need no comparison then."""
    return dataclasses.replace(spec, tree=trees.decode(spec.tree.encoded))
