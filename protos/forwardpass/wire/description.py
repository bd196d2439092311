"""What both ends know of a model: its functions, their arguments and results, its identity."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from forwardpass import v1
from forwardpass.wire import errors, specs, trees
from forwardpass.wire.specs import StructureSpec, TensorSpec
from forwardpass.wire.structures import Structure


class Function(enum.IntEnum):
    """A function of a functional model; the value is its number in `forwardpass.v1.Function`."""

    PREDICT_ON_BATCH = v1.Function.FUNCTION_PREDICT_ON_BATCH
    FORWARD_PASS = v1.Function.FUNCTION_FORWARD_PASS
    LOSS = v1.Function.FUNCTION_LOSS
    WEIGHTED_LOSS = v1.Function.FUNCTION_WEIGHTED_LOSS
    INITIALIZE_METRICS_STATE = v1.Function.FUNCTION_INITIALIZE_METRICS_STATE
    UPDATE_METRICS_STATE = v1.Function.FUNCTION_UPDATE_METRICS_STATE
    WEIGHTED_UPDATE_METRICS_STATE = v1.Function.FUNCTION_WEIGHTED_UPDATE_METRICS_STATE
    FINALIZE_METRICS = v1.Function.FUNCTION_FINALIZE_METRICS

    @property
    def has_training(self) -> bool:
        """Whether the function comes in two kinds, for training and for inference."""
        return self in (Function.PREDICT_ON_BATCH, Function.FORWARD_PASS)

    @property
    def title(self) -> str:
        """The function as a person calls it."""
        return _TITLES[self]


_TITLES = {
    Function.PREDICT_ON_BATCH: "predict_on_batch",
    Function.FORWARD_PASS: "forward_pass",
    Function.LOSS: "loss",
    Function.WEIGHTED_LOSS: "loss with sample_weight",
    Function.INITIALIZE_METRICS_STATE: "initialize_metrics_state",
    Function.UPDATE_METRICS_STATE: "update_metrics_state",
    Function.WEIGHTED_UPDATE_METRICS_STATE: "update_metrics_state with sample_weight",
    Function.FINALIZE_METRICS: "finalize_metrics",
}


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
    """The shape of a functional model.

    weights: a pair (trainable, non_trainable). input: a pair, or a mapping, of x and y.
    predictions: of predict_on_batch, the first argument of loss.
    batch_output: of forward_pass, a named tuple (loss, predictions, num_examples).
    metrics_state, metrics: `specs.EMPTY` where the model has no metrics.
    unavailable: why the model lacks a function, for each that it lacks.
    unused_batch_output_fields: what update_metrics_state does not read, and a caller may leave None.
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
        return self._input_item("x", 0)

    @functools.cached_property
    def y(self) -> StructureSpec:
        return self._input_item("y", 1)

    def _input_item(self, name: str, index: int) -> StructureSpec:
        return self.input.named_child(name) if self.input.tree.names else self.input.child(index)

    def with_input_leaves(self, leaves: Sequence[TensorSpec]) -> ModelSpec:
        """The spec with other leaves for x and then y."""
        x, y = leaves[: len(self.x.leaves)], leaves[len(self.x.leaves) :]
        ordered = (*y, *x) if self.input.tree.names[:1] == ("y",) else (*x, *y)
        return dataclasses.replace(self, input=StructureSpec(self.input.tree, ordered))

    def weights_parts(self, weights: Structure) -> dict[str, Structure]:
        """A structure as of `weights` as the structures of a message."""
        parts, start = {}, 0
        for place, spec in self.weights_places.items():
            end = start + len(spec.leaves)
            parts[place] = Structure(spec.tree, weights.leaves[start:end], weights.dtypes[start:end])
            start = end
        return parts

    @functools.cached_property
    def weights_places(self) -> Mapping[str, StructureSpec]:
        """The weights under their names in a request, in order."""
        return {
            "model_weights.trainable": self.weights.child(0),
            "model_weights.non_trainable": self.weights.child(1),
        }

    def may_be_none(self, place: str) -> bool:
        """Whether a caller may leave an argument None: a field of a batch output that update_metrics_state ignores."""
        group, _, field = place.partition(".")
        return group == "batch_output" and field in self.unused_batch_output_fields

    @functools.cached_property
    def arguments(self) -> Mapping[Function, Mapping[str, StructureSpec]]:
        """For each function, the structures it takes, under their names in the request, in order."""
        weights = self.weights_places
        loss = {"output": self.predictions, "label": self.y, **self._mask_part("output_mask")}
        update = {"state": self.metrics_state, "labels": self.y, **self._batch_output_parts}
        sample_weight = {"sample_weight": self.sample_weight}
        return {
            Function.PREDICT_ON_BATCH: {**weights, "x": self.x},
            Function.FORWARD_PASS: {**weights, "batch_input.x": self.x, "batch_input.y": self.y},
            Function.LOSS: loss,
            Function.WEIGHTED_LOSS: {**loss, **sample_weight},
            Function.INITIALIZE_METRICS_STATE: {},
            Function.UPDATE_METRICS_STATE: update,
            Function.WEIGHTED_UPDATE_METRICS_STATE: {**update, **sample_weight},
            Function.FINALIZE_METRICS: {"state": self.metrics_state},
        }

    @functools.cached_property
    def results(self) -> Mapping[Function, Mapping[str, StructureSpec]]:
        """For each function, the structures it returns, under their names in the response, in order."""
        state = {"state": self.metrics_state}
        return {
            Function.PREDICT_ON_BATCH: {"predictions": self.predictions, **self._mask_part("prediction_mask")},
            Function.FORWARD_PASS: self._batch_output_parts,
            Function.LOSS: {"loss": self.loss},
            Function.WEIGHTED_LOSS: {"loss": self.loss},
            Function.INITIALIZE_METRICS_STATE: state,
            Function.UPDATE_METRICS_STATE: state,
            Function.WEIGHTED_UPDATE_METRICS_STATE: state,
            Function.FINALIZE_METRICS: {"metrics": self.metrics},
        }

    @functools.cached_property
    def _batch_output_parts(self) -> dict[str, StructureSpec]:
        return {
            **{f"batch_output.{name}": self.batch_output.named_child(name) for name in BatchOutput._fields},
            **self._mask_part("batch_output.prediction_mask"),
        }

    def _mask_part(self, place: str) -> dict[str, StructureSpec]:
        return {place: self.prediction_mask} if self.prediction_mask.leaves else {}

    @functools.cached_property
    def masked_leaves(self) -> tuple[int, ...]:
        """For each leaf of `prediction_mask`, the index of its leaf of `predictions`."""
        paths = self.predictions.tree.paths("predictions")
        return tuple(paths.index(path) for path in self.prediction_mask.tree.paths("predictions"))


@dataclasses.dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model: its name, its version, and a SHA-256 over what it was loaded from."""

    name: str
    version: int
    content_hash: bytes

    def message(self) -> v1.ModelIdentity:
        return v1.ModelIdentity(name=self.name, version=self.version, content_hash=self.content_hash)

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


@dataclasses.dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model that a server has: its identity, the format it was loaded from, its spec.

    unbatchable_reason: why concurrent calls with the same weights are not run as one batch; "" where they are.
    unmergeable_reason: why metrics states cannot be added to each other; "" where they can.
    guard: how the server knows that no batch of this model ends its process, or why it does not know.
    warnings: what an operator should know of this model, one sentence each.
    """

    identity: ModelIdentity
    format: str
    spec: ModelSpec
    unbatchable_reason: str = ""
    unmergeable_reason: str = ""
    guard: str = ""
    warnings: tuple[str, ...] = ()


MASKS_OF = {"output_mask": "output", "batch_output.prediction_mask": "batch_output.predictions"}
"""For each argument that is a mask, the argument whose mask it is."""

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
    """A description as its message."""
    spec = description.spec
    structures: dict[str, Any] = {name: specs.encode(getattr(spec, name)) for name in _SPEC_FIELDS}
    if spec.prediction_mask.leaves:
        structures["prediction_mask"] = specs.encode(spec.prediction_mask)
    return v1.ModelDescription(
        identity=description.identity.message(),
        format=description.format,
        functions=[
            v1.FunctionDescription(
                function=function.value,
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
        **structures,
    )


def decode(message: v1.ModelDescription) -> ModelDescription:
    """The description that a message holds. Raises InvalidRequest or a subclass where it is unsound."""
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
    known = {function.value: function for function in Function}
    spec = ModelSpec(
        unavailable={
            known[item.function]: item.unavailable_reason
            for item in message.functions
            if not item.available and item.function in known
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
    )


def _check_pair(spec: StructureSpec, place: str) -> None:
    if len(spec.tree.children) != 2 or spec.tree.kind is trees.Kind.NAMED_TUPLE:
        raise errors.StructureMismatch(place=place, expected="a pair", found=spec.tree.describe())


def _check_mask(mask: StructureSpec, predictions: StructureSpec) -> None:
    if not set(mask.tree.paths("")) <= set(predictions.tree.paths("")):
        raise errors.StructureMismatch(
            place="prediction_mask", expected=predictions.tree.describe(), found=mask.tree.describe()
        )
