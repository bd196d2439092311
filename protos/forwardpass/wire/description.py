"""The description of a model that both ends share: its identity, its spec, and what a person wants to know."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from forwardpass import v1
from forwardpass.wire import errors, specs, trees
from forwardpass.wire.functions import MASKS_OF as MASKS_OF
from forwardpass.wire.functions import Function as Function
from forwardpass.wire.specs import StructureSpec, TensorSpec
from forwardpass.wire.structures import Structure


class BatchOutput(NamedTuple):
    """What a forward pass returns.

    loss: a scalar. predictions: as of predict_on_batch, shape [B, ...]. num_examples: an int32 scalar.
    Source: tff.learning.models.BatchOutput.
    """

    loss: Any = None
    predictions: Any = None
    num_examples: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The specs of a functional model's arguments and results.

    weights: a pair (trainable, non_trainable). input: a pair, or a mapping, of x and y.
    predictions: of predict_on_batch, the first argument of loss.
    batch_output: of forward_pass, a named tuple (loss, predictions, num_examples).
    metrics_state, metrics: `specs.EMPTY` if the model has no metrics.
    unavailable: the functions that the model lacks, each with the reason.
    unused_batch_output_fields: the fields that update_metrics_state does not read; a caller may leave them None.
    prediction_mask: `specs.EMPTY` where no prediction has a Keras mask; otherwise the containers of the predictions
      with the spec of a mask at each masked leaf, and None at each other leaf. Loss and metrics leave out the positions
      whose mask is false.
    """

    weights: StructureSpec
    input: StructureSpec
    predictions: StructureSpec
    batch_output: StructureSpec
    sample_weight: StructureSpec
    loss: StructureSpec
    metrics_state: StructureSpec
    metrics: StructureSpec
    unavailable: Mapping[Function, str]
    has_own_forward_pass: bool
    unused_batch_output_fields: frozenset[str]
    prediction_mask: StructureSpec = specs.EMPTY

    @functools.cached_property
    def x(self) -> StructureSpec:
        """The spec of x: of the key x, or of the first item of a pair."""
        return self._input_item("x", 0)

    @functools.cached_property
    def y(self) -> StructureSpec:
        """The spec of y: of the key y, or of the second item of a pair."""
        return self._input_item("y", 1)

    def _input_item(self, name: str, index: int) -> StructureSpec:
        return self.input.named_child(name) if self.input.tree.names else self.input.child(index)

    def with_input_leaves(self, leaves: Sequence[TensorSpec]) -> ModelSpec:
        """The spec with other leaves for x and then y."""
        x, y = leaves[: len(self.x.leaves)], leaves[len(self.x.leaves) :]
        ordered = (*y, *x) if self.input.tree.names[:1] == ("y",) else (*x, *y)
        return dataclasses.replace(self, input=StructureSpec(self.input.tree, ordered))

    def weights_parts(self, weights: Structure) -> dict[str, Structure]:
        """Splits the weights into the structures of a message, by place."""
        parts, start = {}, 0
        for place, spec in self.weights_places.items():
            end = start + len(spec.leaves)
            parts[place] = Structure(spec.tree, weights.leaves[start:end], weights.dtypes[start:end])
            start = end
        return parts

    @functools.cached_property
    def weights_places(self) -> Mapping[str, StructureSpec]:
        """The specs of the weights under their places in a request, in order."""
        return {
            "model_weights.trainable": self.weights.child(0),
            "model_weights.non_trainable": self.weights.child(1),
        }

    @functools.cached_property
    def gradients(self) -> StructureSpec:
        """The spec of gradients: the trainable weights, with None for each leaf that has no derivatives."""
        return self.weights.child(0).differentiable

    def may_be_none(self, place: str) -> bool:
        """Whether a caller may leave an argument None: a field of a batch output that update_metrics_state ignores."""
        group, _, field = place.partition(".")
        return group == "batch_output" and field in self.unused_batch_output_fields

    @functools.cached_property
    def places(self) -> Mapping[str, StructureSpec]:
        """Every structure of a request or a response under its place: see `functions.Signature`."""
        mask = self.prediction_mask
        return {
            **self.weights_places,
            "x": self.x,
            "batch_input.x": self.x,
            "batch_input.y": self.y,
            "output": self.predictions,
            "label": self.y,
            "labels": self.y,
            "sample_weight": self.sample_weight,
            "predictions": self.predictions,
            "loss": self.loss,
            "state": self.metrics_state,
            "metrics": self.metrics,
            "gradients": self.gradients,
            "cotangents": self.predictions.differentiable,
            "weights_cotangents": self.gradients,
            "x_cotangents": self.x.differentiable,
            **{f"batch_output.{name}": self.batch_output.named_child(name) for name in BatchOutput._fields},
            **(dict.fromkeys(MASKS_OF, mask) if mask.leaves else {}),
        }

    @functools.cached_property
    def arguments(self) -> Mapping[Function, Mapping[str, StructureSpec]]:
        """For each function, the structures it takes, under their places in the request, in order."""
        return {function: self._at(function.signature.arguments) for function in Function}

    @functools.cached_property
    def results(self) -> Mapping[Function, Mapping[str, StructureSpec]]:
        """For each function, the structures it returns, under their places in the response, in order."""
        return {function: self._at(function.signature.results) for function in Function}

    def _at(self, places: Sequence[str]) -> dict[str, StructureSpec]:
        return {place: self.places[place] for place in places if place in self.places}

    @functools.cached_property
    def masked_leaves(self) -> tuple[int, ...]:
        """For each leaf of `prediction_mask`, the index of its leaf of `predictions`."""
        paths = self.predictions.tree.paths("predictions")
        return tuple(paths.index(path) for path in self.prediction_mask.tree.paths("predictions"))


@dataclasses.dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Identifies a model: its name, its version, and the SHA-256 of what it was loaded from."""

    name: str
    version: int
    content_hash: bytes

    def message(self) -> v1.ModelIdentity:
        """The identity as its message, a new one for each call."""
        return v1.ModelIdentity(name=self.name, version=self.version, content_hash=self.content_hash)

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


_NO_VECTORIZATION = "the server does not compute calls of different weights together"


@dataclasses.dataclass(frozen=True, slots=True)
class Vectorization:
    """Whether calls of predict_on_batch with different weights are computed together.

    unavailable_reason: why they are not; "" if they are.
    largest_difference: from single calls, relative to the largest number of a result; 0.0 for equal bits.
    allows_rounding: the operator allows this difference for all calls. Otherwise each call must allow it.
    """

    unavailable_reason: str = ""
    largest_difference: float = 0.0
    allows_rounding: bool = False

    def __str__(self) -> str:
        if self.unavailable_reason:
            return f"no: {self.unavailable_reason}"
        if not self.largest_difference:
            return "yes, with equal bits"
        difference = f"differences up to {self.largest_difference:.1e} of the largest number"
        return f"yes, with {difference}" if self.allows_rounding else f"only for calls that allow {difference}"


@dataclasses.dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model of a server. format: that of its files.

    unbatchable_reason: why concurrent calls with the same weights do not share a batch; "" if they do.
    unmergeable_reason: why metrics states cannot be added to each other; "" if they can.
    guard: whether the model was tried in a child process, so that no batch of it crashes the server.
    warnings: problems of this model that an operator should know, one sentence each.
    unreached_weights: the places of trainable weights on which the loss does not depend; their gradients are zeros.
    optimizers: those for which training is prepared, as JSON.
    vectorization: whether calls with different weights are computed together.
    """

    identity: ModelIdentity
    format: str
    spec: ModelSpec
    unbatchable_reason: str = ""
    unmergeable_reason: str = ""
    guard: str = ""
    warnings: tuple[str, ...] = ()
    unreached_weights: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()
    vectorization: Vectorization = Vectorization(_NO_VECTORIZATION)


_OLDER_SERVER = "the server is older than this function"

_SPEC_FIELDS = (
    "weights",
    "input",
    "predictions",
    "batch_output",
    "sample_weight",
    "loss",
    "metrics_state",
    "metrics",
)


def encode(description: ModelDescription) -> v1.ModelDescription:
    """Encodes a description as its message."""
    spec = description.spec
    structures: dict[str, Any] = {name: specs.encode(getattr(spec, name)) for name in _SPEC_FIELDS}
    if spec.prediction_mask.leaves:
        structures["prediction_mask"] = specs.encode(spec.prediction_mask)
    return v1.ModelDescription(
        identity=description.identity.message(),
        format=description.format,
        functions=[
            v1.FunctionDescription(
                function=function.value,  # type: ignore[arg-type] # Protobuf takes any int.
                available=function not in spec.unavailable,
                unavailable_reason=spec.unavailable.get(function, ""),
            )
            for function in Function
        ],
        has_own_forward_pass=spec.has_own_forward_pass,
        unused_batch_output_fields=sorted(spec.unused_batch_output_fields),
        unbatchable_reason=description.unbatchable_reason,
        unmergeable_reason=description.unmergeable_reason,
        guard=description.guard,
        warnings=description.warnings,
        unreached_weights=description.unreached_weights,
        optimizers=description.optimizers,
        vectorization=v1.Vectorization(
            unavailable_reason=description.vectorization.unavailable_reason,
            largest_difference=description.vectorization.largest_difference,
            allows_rounding=description.vectorization.allows_rounding,
        ),
        **structures,
    )


def decode(message: v1.ModelDescription) -> ModelDescription:
    """Decodes a description from its message. Raises InvalidRequest or a subclass for one that is not valid."""
    structures: dict[str, Any] = {name: specs.decode(getattr(message, name), name) for name in _SPEC_FIELDS}
    if message.HasField("prediction_mask"):
        structures["prediction_mask"] = specs.decode(message.prediction_mask, "prediction_mask")
        _check_mask(structures["prediction_mask"], structures["predictions"])
    _check_pair(structures["weights"], "weights")
    _check_pair(structures["input"], "input")
    if structures["batch_output"].tree.names != BatchOutput._fields:
        raise errors.StructureMismatch(
            place="batch_output",
            expected=f"a named tuple {BatchOutput._fields}",
            found=structures["batch_output"].tree.describe(),
        )
    found: dict[int, v1.FunctionDescription] = {item.function: item for item in message.functions}
    spec = ModelSpec(
        unavailable={
            function: found[function.value].unavailable_reason if function.value in found else _OLDER_SERVER
            for function in Function
            if function.value not in found or not found[function.value].available
        },
        has_own_forward_pass=message.has_own_forward_pass,
        unused_batch_output_fields=frozenset(message.unused_batch_output_fields),
        **structures,
    )
    identity = message.identity
    return ModelDescription(
        ModelIdentity(identity.name, identity.version, identity.content_hash),
        message.format,
        spec,
        message.unbatchable_reason,
        message.unmergeable_reason,
        message.guard,
        tuple(message.warnings),
        tuple(message.unreached_weights),
        tuple(message.optimizers),
        Vectorization(
            message.vectorization.unavailable_reason,
            message.vectorization.largest_difference,
            message.vectorization.allows_rounding,
        )
        if message.HasField("vectorization")
        else Vectorization(_NO_VECTORIZATION),
    )


def _check_pair(spec: StructureSpec, place: str) -> None:
    if len(spec.tree.children) != 2 or spec.tree.kind is trees.Kind.NAMED_TUPLE:
        raise errors.StructureMismatch(place=place, expected="a pair", found=spec.tree.describe())


def _check_mask(mask: StructureSpec, predictions: StructureSpec) -> None:
    if not set(mask.tree.paths("")) <= set(predictions.tree.paths("")):
        raise errors.StructureMismatch(
            place="prediction_mask", expected=predictions.tree.describe(), found=mask.tree.describe()
        )


def facts(description: ModelDescription) -> list[tuple[str, str]]:
    """What a person wants to know of a model: names and values, one fact each. Functions are in `function_facts`."""
    spec = description.spec
    return [
        ("format", description.format),
        ("weights", _size(spec.weights)),
        ("x", str(spec.x)),
        ("y", str(spec.y)),
        ("predictions", str(spec.predictions)),
        *(
            [
                (
                    "prediction mask",
                    f"{spec.prediction_mask}; loss(output, label) counts masked positions unless output carries its "
                    "mask or mask= is given",
                )
            ]
            if spec.prediction_mask.leaves
            else []
        ),
        ("forward_pass", "the model's own" if spec.has_own_forward_pass else "predict_on_batch and loss"),
        ("metrics", str(spec.metrics)),
        ("batching", _yes_unless(description.unbatchable_reason)),
        ("vectorization over weights", str(description.vectorization)),
        ("merging metrics states", _yes_unless(description.unmergeable_reason)),
        *(
            [("gradients that are zeros", ", ".join(description.unreached_weights))]
            if description.unreached_weights
            else []
        ),
        *([("prepared optimizers", ", ".join(description.optimizers))] if description.optimizers else []),
        ("guard", description.guard),
        *(("warning", warning) for warning in description.warnings),
    ]


def function_facts(spec: ModelSpec) -> list[tuple[str, str]]:
    """The title of each function, and "yes" or "no: " with the reason why the model lacks it."""
    return [(function.title, _yes_unless(spec.unavailable.get(function, ""))) for function in Function]


def _yes_unless(reason: str) -> str:
    return f"no: {reason}" if reason else "yes"


def _size(spec: StructureSpec) -> str:
    """The size of structures whose shapes are fixed. Strings count one byte each."""
    sizes = [(math.prod(dim or 0 for dim in leaf.shape or ()), max(leaf.data_type.itemsize, 1)) for leaf in spec.leaves]
    numbers, size_bytes = sum(count for count, _ in sizes), sum(count * itemsize for count, itemsize in sizes)
    return f"{len(sizes)} arrays, {numbers:,} numbers, {size_bytes / 2**20:,.2f} MiB"
