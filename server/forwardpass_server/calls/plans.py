"""The plan of one function of one model: what all its calls share, computed once at load."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import numpy as np
from google.protobuf.message import Message

from forwardpass.wire import conform, errors, limits, specs, trees
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import MASKS_OF, Function
from forwardpass.wire.specs import StructureSpec
from forwardpass.wire.structures import Structure
from forwardpass.wire.trees import Kind
from forwardpass_server.calls.model import Leaf, LoadedModel
from forwardpass_server.calls.scheduling import Estimates

MessageT = TypeVar("MessageT", bound=Message)


@dataclasses.dataclass(frozen=True, slots=True)
class Argument:
    """One structure that a function takes.

    is_optional: the function does not read it, so that it may be None.
    masked: the place of the predictions that this Keras mask is for; "" for an argument that is no mask.
    masked_leaves: see `ModelSpec.masked_leaves`.
    """

    place: str
    spec: StructureSpec
    is_optional: bool
    masked: str = ""
    masked_leaves: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """How one function of one model is called.

    unavailable: why the model lacks the function; "" if the model has it.
    weights: the number of arguments that are the model's weights; they come first.
    is_prediction: the function is predict_on_batch, or a forward pass that consists of predict_on_batch and the loss.
    shares_batch: several arguments must have the same batch size.
    is_small: the arguments have few leaves: see `limits.SMALL_LEAVES`.
    run: computes the flat results from the flat arguments. Only for a function that the model has.
    estimates: of the time that it takes.
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
        """Checks the structures of a request and returns the flat arguments.

        weights: leaves of the model's weights; None if they are among the structures.
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
        """Returns the flat results as the structures of a response."""
        parts = {}
        position = 0
        for place, spec in self.results:
            end = position + len(spec.leaves)
            parts[place] = Structure(spec.tree, leaves[position:end])
            position = end
        return parts


class Servable:
    """A loaded model, with the plans of all its functions."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.identity = model.description.identity
        self.spec = model.description.spec
        # Whether calls with the same weights may share a batch.
        self.is_batchable = not model.description.unbatchable_reason
        self._headers: dict[type[Message], Message] = {}
        self._plans = {
            (function, training): _plan(model, function, training)
            for function in Function
            for training in ((True, False) if function.has_training else (False,))
        }

    def response_header(self, response_type: type[MessageT]) -> MessageT:
        """A response of this type whose field `model` is set. Made once for each type."""
        header = self._headers.get(response_type)
        if header is None:
            header = self._headers[response_type] = response_type(model=self.identity.message())
        return cast(MessageT, header)

    def plan(self, function: Function, training: bool = False) -> Plan:
        """The plan of a function. training: False for functions without `has_training`."""
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
    """The mask that counts every position: the default of a request without a mask."""
    masks = []
    for index, leaf in zip(argument.masked_leaves, argument.spec.leaves, strict=True):
        shape = predictions[index].shape
        masks.append(np.ones(shape if leaf.shape is None else shape[: len(leaf.shape)], leaf.dtype))
    return masks


def _as_decoded(spec: StructureSpec) -> StructureSpec:
    """The spec with the tree object that requests are decoded to, so that both are compared by identity."""
    return dataclasses.replace(spec, tree=trees.decode(spec.tree.encoded))
