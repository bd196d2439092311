"""Calls of a model: requests from arguments, results from responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from forwardpass import v1
from forwardpass.wire import conform, description, errors, messages
from forwardpass.wire.description import MASKS_OF, BatchOutput, Function, ModelDescription, ModelSpec
from forwardpass.wire.dtypes import Array
from forwardpass.wire.methods import METHODS
from forwardpass.wire.specs import StructureSpec
from forwardpass.wire.structures import Structure
from forwardpass_client import long_calls, masks
from forwardpass_client.call import Call
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.reuse import Reuse
from forwardpass_client.weights_handles import WeightsHandleApi

ResultT = TypeVar("ResultT")

ModelWeights: TypeAlias = tuple[Any, Any]
"""(trainable, non_trainable) in the model's containers."""

Metrics: TypeAlias = Mapping[str, Array]
"""Metrics by name, as TFF and Keras have them. A model of another origin may have other containers."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a model on the server.

    state: "available", "loading" or "failed".
    error: why it failed to load or reload, or why it is served although it is to be unloaded; "" otherwise.
    content_hash: SHA-256 of the files that it was loaded from, in hex; "" until it is available.
    labels: the names that the operator gave it.
    """

    name: str
    version: int
    state: str
    error: str
    content_hash: str
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class FoundModel:
    """A model as the server describes it, with the longest request that the server accepts.

    shares_weights: whether each replica of the server can answer calls by weights id.
    """

    description: ModelDescription
    versions: tuple[ModelVersion, ...]
    max_request_bytes: int
    shares_weights: bool = False


def get_model(name: str, version: int | None, label: str | None) -> Call[FoundModel]:
    """version, label: at most one of them; without both, the highest version that is available.

    Raises, before anything is sent: TypeError and ValueError for arguments that are no name, version or label;
    ModelNotFound for a name that no model can have; ModelVersionNotFound for such a version or label.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    if label is not None and not isinstance(label, str):
        raise TypeError(f"label: expected a str such as 'stable', got {type(label).__name__}")
    if version is not None and (isinstance(version, bool) or not isinstance(version, (int, np.integer))):
        raise TypeError(f"version: expected an int such as 1, or None for the highest version, got {version!r}")
    if version is not None and label is not None:
        raise ValueError("model: expected a version or a label, got both")
    if version is not None and not 1 <= version < 2**63:
        raise errors.ModelVersionNotFound(place="version", expected="an integer from 1 on, or None", found=f"{version}")
    if not name.isprintable():
        raise errors.ModelNotFound(place="model", expected="a name", found=ascii(name[:128]))
    if label is not None and not (label and label.isprintable()):
        raise errors.ModelVersionNotFound(place="label", expected="a name", found=ascii(label[:128]))
    request = v1.GetModelRequest(model=v1.ModelSelector(name=name, version=version or 0, label=label or ""))

    def read(data: bytes) -> FoundModel:
        response, _ = messages.decode(v1.GetModelResponse, data)
        return FoundModel(
            description.decode(response.model),
            tuple(map(_version, response.versions)),
            response.max_request_bytes,
            response.shares_weights,
        )

    return Call(METHODS["GetModel"].path, request.SerializeToString(), read)


def list_models() -> Call[list[ModelVersion]]:
    """The versions of every model, by name and version, those that failed to load included."""

    def read(data: bytes) -> list[ModelVersion]:
        response, _ = messages.decode(v1.ListModelsResponse, data)
        return [_version(model) for model in response.models]

    return Call(METHODS["ListModels"].path, b"", read)


def unready_reasons() -> Call[list[str]]:
    """Why the server is not ready, one sentence each; empty when it is ready."""

    def read(data: bytes) -> list[str]:
        response, _ = messages.decode(v1.ListModelsResponse, data)
        return list(response.unready_reasons)

    return Call(METHODS["ListModels"].path, b"", read)


def _version(message: v1.ModelVersionStatus) -> ModelVersion:
    state = v1.ModelState.Name(message.state).removeprefix("MODEL_STATE_").lower()
    return ModelVersion(
        message.name, message.version, state, message.error, message.content_hash.hex(), tuple(message.labels)
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Arguments:
    """The arguments of a function, without the weights.

    unavailable: why the model lacks the function; None where it has it.
    specs: place, spec, and whether it may be None. shares_batch: several leaves must agree in the batch dimension.
    """

    unavailable: str | None
    specs: Sequence[tuple[str, StructureSpec, bool]]
    shares_batch: bool

    @classmethod
    def of(cls, spec: ModelSpec, function: Function) -> _Arguments:
        arguments = [
            (place, argument, spec.may_be_none(place))
            for place, argument in spec.arguments[function].items()
            if place not in spec.weights_places
        ]
        batched = sum(leaf.batched for _, argument, _ in arguments for leaf in argument.leaves)
        return cls(spec.unavailable.get(function), arguments, batched > 1)


class ModelCalls:
    """The calls of one version of a model.

    Every method checks its arguments against the model's spec and raises before anything is sent: StructureMismatch,
    DTypeMismatch or ShapeMismatch, naming the leaf; FunctionNotAvailable; MessageTooLarge.
    max_request_bytes: the longest request that both ends take.
    reuse: recognises weights that are passed again; None where each call sends its weights.
    """

    def __init__(self, model: ModelDescription, max_request_bytes: int, reuse: Reuse | None) -> None:
        self.model = model
        self._spec = model.spec
        self._max_request_bytes = max_request_bytes
        self._reuse = reuse
        self._selector = v1.ModelSelector(name=model.identity.name, version=model.identity.version)
        self._identity = model.identity.message()
        self._arguments = {function: _Arguments.of(self._spec, function) for function in Function}

    def initial_weights(self) -> Call[ModelWeights]:
        """(trainable, non_trainable) that the model was saved with: read-only arrays. `read` raises ModelChanged."""
        request = v1.GetInitialWeightsRequest(model=self._selector)

        def read(data: bytes) -> ModelWeights:
            parts = self._read(v1.GetInitialWeightsResponse, data)
            trainable, non_trainable = parts["model_weights.trainable"], parts["model_weights.non_trainable"]
            leaves = [*_aligned(trainable), *_aligned(non_trainable)]
            return cast(ModelWeights, self._spec.weights.tree.unflatten(leaves))

        return Call(METHODS["GetInitialWeights"].path, request.SerializeToString(), read)

    def predict_on_batch(self, model_weights: Any, x: Any, training: bool, exact: bool = True) -> Call[Any]:
        """Predictions for one batch: leaves of shape [B, ...], which carry their Keras mask if the model has one.

        x: leaves of shape [B, ...] as in the spec.
        exact: whether calls of other weights must not change the bits of the result.
        Raises StructureMismatch, DTypeMismatch, ShapeMismatch, FunctionNotAvailable, MessageTooLarge, and TypeError
        for a `training` or an `exact` that is no bool. `read` raises ModelChanged.
        """
        request = v1.PredictOnBatchRequest(
            model=self._selector, training=check_training(training), allow_rounding=allows_rounding(exact)
        )
        return self._call_with_weights(
            Function.PREDICT_ON_BATCH,
            "PredictOnBatch",
            request,
            model_weights,
            {"x": x},
            lambda data: self._predictions(self._read(v1.PredictOnBatchResponse, data), ""),
        )

    def forward_pass(
        self, model_weights: Any, batch_input: Any, training: bool, exact: bool = True
    ) -> Call[BatchOutput]:
        """The BatchOutput of one batch: a loss of shape [], predictions of shape [B, ...], num_examples as int32[].

        batch_input: a pair (x, y), or a mapping with keys x and y; leaves of shape [B, ...].
        exact: as of `predict_on_batch`.
        Raises StructureMismatch, DTypeMismatch, ShapeMismatch, FunctionNotAvailable, MessageTooLarge, and TypeError
        for a `training` or an `exact` that is no bool. `read` raises ModelChanged.
        """
        request = v1.ForwardPassRequest(
            model=self._selector, training=check_training(training), allow_rounding=allows_rounding(exact)
        )
        x, y = x_and_y(batch_input)
        values = {"batch_input.x": x, "batch_input.y": y}

        def read(data: bytes) -> BatchOutput:
            return self._batch_output(self._read(v1.ForwardPassResponse, data))

        return self._call_with_weights(Function.FORWARD_PASS, "ForwardPass", request, model_weights, values, read)

    def loss(self, output: Any, label: Any, sample_weight: Any, mask: Any = None) -> Call[Any]:
        """The loss of predictions against labels: shape [] for most models. With weights, the weighted loss.

        output, label: leaves of shape [B, ...].
        sample_weight: float32[B] unless the model says otherwise; None for no weights.
        mask: bool[B, ...] as in `prediction_mask` of the spec; None for the mask that `output` carries. Warns
          MaskMissing where it carries none and the model has masks.
        Raises StructureMismatch (also for a mask that the model does not take), DTypeMismatch, ShapeMismatch,
        FunctionNotAvailable, MessageTooLarge. `read` raises ModelChanged.
        """
        function = Function.LOSS if sample_weight is None else Function.WEIGHTED_LOSS
        values = {
            "output": output,
            "label": label,
            "output_mask": self._mask(function, "output_mask", output, mask),
            "sample_weight": sample_weight,
        }
        return self._call(
            "Loss",
            v1.LossRequest(model=self._selector),
            self._conform(function, values),
            lambda data: nested(self._read(v1.LossResponse, data), "loss"),
        )

    def forward_backward(
        self,
        model_weights: Any,
        batch_input: Any,
        training: bool,
        sample_weight: Any,
        keep: Callable[[HeldWeights], Any] | None,
    ) -> Call[tuple[BatchOutput, Any]]:
        """The BatchOutput of one batch, as of `forward_pass`, and the gradients of its loss.

        Gradients have the structure of the trainable weights, with None for leaves of integers, booleans and strings.
        sample_weight: as of `loss`. keep: makes the handle of gradients that stay on the server; None to return them.
        Raises what `forward_pass` raises. `read` raises ModelChanged.
        """
        function = Function.FORWARD_BACKWARD if sample_weight is None else Function.WEIGHTED_FORWARD_BACKWARD
        request = v1.ForwardBackwardRequest(
            model=self._selector, training=check_training(training), keep_gradients=keep is not None
        )
        x, y = x_and_y(batch_input)
        values = {"batch_input.x": x, "batch_input.y": y, "sample_weight": sample_weight}

        def read(data: bytes) -> tuple[BatchOutput, Any]:
            header, parts = messages.decode(v1.ForwardBackwardResponse, data)
            self._check_identity(header.model)
            gradients = nested(parts, "gradients") if keep is None else keep(HeldWeights(header.gradients_id))
            return self._batch_output(parts), gradients

        # Kept gradients stay on the server that computed them. Naming the weights by id makes the call sticky.
        return self._call_with_weights(
            function, "ForwardBackward", request, model_weights, values, read, names_weights=keep is not None
        )

    def vjp(self, model_weights: Any, x: Any, cotangents: Any, training: bool) -> Call[tuple[Any, Any]]:
        """The cotangents of the trainable weights, and of x, for cotangents of the predictions.

        x: leaves of shape [B, ...] as in the spec. cotangents: like the predictions, leaves of shape [B, ...], with
          None for leaves of integers, booleans and strings.
        Returns structures of the trainable weights and of x, with None for such leaves.
        Raises what `predict_on_batch` raises. `read` raises ModelChanged.
        """
        request = v1.VjpRequest(model=self._selector, training=check_training(training))

        def read(data: bytes) -> tuple[Any, Any]:
            parts = self._read(v1.VjpResponse, data)
            return nested(parts, "weights_cotangents"), nested(parts, "x_cotangents")

        return self._call_with_weights(
            Function.VJP, "Vjp", request, model_weights, {"x": x, "cotangents": cotangents}, read
        )

    def initialize_metrics_state(self) -> Call[Any]:
        """The metrics state before the first batch.

        Raises FunctionNotAvailable for a model without metrics. `read` raises ModelChanged.
        """
        return self._call(
            "InitializeMetricsState",
            v1.InitializeMetricsStateRequest(model=self._selector),
            self._conform(Function.INITIALIZE_METRICS_STATE, {}),
            lambda data: nested(self._read(v1.InitializeMetricsStateResponse, data), "state"),
        )

    def update_metrics_state(
        self, state: Any, labels: Any, batch_output: Any, sample_weight: Any, mask: Any = None
    ) -> Call[Any]:
        """The metrics state after one more batch; `state` stays as it is.

        state: leaves of the shapes in `metrics_state` of the spec.
        labels: leaves of shape [B, ...].
        batch_output: any object with the fields of `BatchOutput`; a field that the metrics do not read may be None.
        sample_weight, mask: as of `loss`.
        Raises StructureMismatch, DTypeMismatch, ShapeMismatch, FunctionNotAvailable, MessageTooLarge. `read` raises
        ModelChanged.
        """
        function = Function.UPDATE_METRICS_STATE if sample_weight is None else Function.WEIGHTED_UPDATE_METRICS_STATE
        values = {"state": state, "labels": labels, "sample_weight": sample_weight, **batch_output_values(batch_output)}
        place = "batch_output.prediction_mask"
        values[place] = self._mask(function, place, values["batch_output.predictions"], mask)
        return self._call(
            "UpdateMetricsState",
            v1.UpdateMetricsStateRequest(model=self._selector),
            self._conform(function, values),
            lambda data: nested(self._read(v1.UpdateMetricsStateResponse, data), "state"),
        )

    def finalize_metrics(self, state: Any) -> Call[Any]:
        """The metrics of a state, by name, in the model's order.

        state: leaves of the shapes in `metrics_state` of the spec.
        Raises StructureMismatch, DTypeMismatch, ShapeMismatch, FunctionNotAvailable, MessageTooLarge. `read` raises
        ModelChanged.
        """
        return self._call(
            "FinalizeMetrics",
            v1.FinalizeMetricsRequest(model=self._selector),
            self._conform(Function.FINALIZE_METRICS, {"state": state}),
            lambda data: nested(self._read(v1.FinalizeMetricsResponse, data), "metrics"),
        )

    def hold(self, model_weights: Any) -> HeldWeights:
        """Weights for `put_weights`. Raises what `conform.conform` raises."""
        return HeldWeights.of(self._weights(model_weights))

    def _weights(self, model_weights: Any) -> Structure:
        """Weights as the structure that the model takes."""
        if not isinstance(model_weights, (tuple, list)):
            _refuse_other(model_weights, "model_weights")
        elif any(isinstance(item, WeightsHandleApi) for item in model_weights):
            raise errors.StructureMismatch(
                place="model_weights",
                expected="(trainable, non_trainable), or one handle of put_weights",
                found="several handles: evaluate_many takes a list of weights",
            )
        leaves: list[Array] = []
        items = conform.items(model_weights, self._spec.weights.tree, "model_weights")
        for item, (place, spec) in zip(items, self._spec.weights_places.items(), strict=True):
            leaves += conform.conform(item, spec, place).leaves
        return Structure(self._spec.weights.tree, leaves, self._spec.weights.data_types)

    def _call_with_weights(
        self,
        function: Function,
        method: str,
        header: Any,
        model_weights: Any,
        values: Mapping[str, Any],
        read: Callable[[bytes], ResultT],
        others: Mapping[str, Structure] | None = None,
        *,
        names_weights: bool = False,
    ) -> Call[ResultT]:
        """A call with the weights by value or by id.

        others: structures that are no arguments of the function.
        names_weights: whether the weights go by id, whatever their size.
        """
        parts = {**self._conform(function, values), **(others or {})}
        if isinstance(model_weights, WeightsHandleApi):
            held: HeldWeights | None = model_weights.held
        else:
            structure = self._weights(model_weights)
            if names_weights:
                held = HeldWeights.of(structure)
            else:
                held = None if self._reuse is None else self._reuse.recognise(structure)
            if held is None:
                parts = {**self._spec.weights_parts(structure), **parts}
        if held is not None:
            header.weights_id = held.weights_id
        return self._call(method, header, parts, read, held)

    def _check_available(self, function: Function) -> None:
        reason = self._arguments[function].unavailable
        if reason is not None:
            raise errors.FunctionNotAvailable(
                f"model {self.model.identity}: {function.title} is not available: {reason}"
            )

    def _conform(
        self, function: Function, values: Mapping[str, Any], held: Collection[str] = ()
    ) -> dict[str, Structure]:
        """The values as the structures that the function takes, without the weights and those in `held`."""
        self._check_available(function)
        arguments = self._arguments[function]
        parts: dict[str, Structure] = {}
        checked: list[tuple[str, Any, StructureSpec]] = []
        for place, spec, may_be_none in arguments.specs:
            if place in held:
                continue
            value = values[place]
            if value is None and (may_be_none or place in MASKS_OF):
                continue
            part = parts[place] = conform.conform(value, spec, place)
            checked.append((place, part.leaves, spec))
        if arguments.shares_batch:
            conform.check_batch(checked)
        return parts

    def _mask(self, function: Function, place: str, predictions: Any, mask: Any) -> Any:
        """The mask of predictions: the caller's, or else the mask that the predictions carry.

        Called by a method of this class that a public method calls, so that a warning names the user's line.
        """
        if mask is not None:
            if not self._spec.prediction_mask.leaves:
                raise errors.StructureMismatch(
                    place="mask",
                    expected=f"None: predictions of model {self.model.identity} have no Keras mask",
                    found=conform.kind_of(mask),
                )
            return mask
        if predictions is None or place not in self._spec.arguments[function] or self._spec.may_be_none(place):
            return None
        masked = MASKS_OF[place]
        carried, is_whole = masks.carried(predictions, self._spec, masked)
        if not is_whole:
            masks.warn_missing(function.title, masked, stacklevel=4)
        return carried

    def _predictions(self, parts: Mapping[str, Structure], group: str) -> Any:
        """The predictions of a response; those with a Keras mask carry it. group: of the places, "" or "NAME."."""
        part, mask = parts.get(f"{group}predictions"), parts.get(f"{group}prediction_mask")
        if part is None or mask is None:
            return nested(parts, f"{group}predictions")
        return part.tree.unflatten(masks.attached(_aligned(part), mask.leaves, self._spec))

    def _batch_output(self, parts: Mapping[str, Structure]) -> BatchOutput:
        """The batch output of a response."""
        return BatchOutput(
            nested(parts, "batch_output.loss"),
            self._predictions(parts, "batch_output."),
            nested(parts, "batch_output.num_examples"),
        )

    def _call(
        self,
        method: str,
        header: Any,
        parts: Mapping[str, Structure],
        read: Callable[[bytes], ResultT],
        held: HeldWeights | None = None,
    ) -> Call[ResultT]:
        pieces = messages.encode_pieces(header, parts, self._max_request_bytes)
        request = pieces if len(pieces) >= long_calls.MIN_BYTES else pieces.join()
        return Call(METHODS[method].path, request, read, held)

    def _read(self, response_type: Any, data: bytes) -> dict[str, Structure]:
        """The structures of a response. Raises ModelChanged where another model has answered."""
        header, parts = messages.decode(response_type, data)
        self._check_identity(header.model)
        return parts

    def _check_identity(self, found: v1.ModelIdentity) -> None:
        if found != self._identity:
            raise errors.ModelChanged(
                place="response",
                expected=f"model {self.model.identity} of content {self.model.identity.content_hash.hex()[:12]}",
                found=f"{found.name}/{found.version} of {found.content_hash.hex()[:12]}",
            )


def nested(parts: Mapping[str, Structure], place: str) -> Any:
    """One structure of a response as containers of read-only arrays; None where it is absent."""
    part = parts.get(place)
    return None if part is None else part.tree.unflatten(_aligned(part))


def _aligned(structure: Structure) -> list[Array]:
    """The leaves, copied where they are not aligned in the message: much code outside numpy needs aligned arrays."""
    leaves = list(structure.leaves)
    for index, leaf in enumerate(leaves):
        if not leaf.flags.aligned:
            leaves[index] = leaf.copy()
            leaves[index].flags.writeable = False
    return leaves


def check_training(training: Any) -> bool:
    """`training` as a bool. Raises TypeError for anything else: the text "False" would count as true."""
    return _check_flag(training, "training")


def allows_rounding(exact: Any) -> bool:
    """The field `allow_rounding` of a request. Raises TypeError for an `exact` that is no bool."""
    return not _check_flag(exact, "exact")


def _check_flag(value: Any, name: str) -> bool:
    if value is True or value is False:
        return value
    if isinstance(value, (np.bool_, int)) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_handle(handle: Any, place: str) -> WeightsHandleApi:
    """The handle.

    Raises StructureMismatch for an id of weights or a result of training, and TypeError for anything else.
    """
    if not isinstance(handle, WeightsHandleApi):
        _refuse_other(handle, place)
        raise TypeError(f"{place}: expected a handle of put_weights or weights_handle, got {conform.kind_of(handle)}")
    return handle


def _refuse_other(value: Any, place: str) -> None:
    """Raises StructureMismatch for an object from which a caller can get a handle."""
    if isinstance(value, (str, bytes)):
        remedy = "for the id of weights, pass model.weights_handle(id)"
    elif isinstance(getattr(value, "weights", None), WeightsHandleApi):
        remedy = "pass its attribute weights"
    else:
        return
    raise errors.StructureMismatch(
        place=place, expected="(trainable, non_trainable) or a handle", found=f"{type(value).__name__}: {remedy}"
    )


def x_and_y(batch_input: Any) -> tuple[Any, Any]:
    """The two items of a batch: of a pair, or of a mapping with the keys x and y only. Raises StructureMismatch."""
    if isinstance(batch_input, Mapping):
        if set(batch_input) != {"x", "y"}:
            raise errors.StructureMismatch(
                place="batch_input", expected="keys x and y", found=f"keys {sorted(map(str, batch_input))}"
            )
        return batch_input["x"], batch_input["y"]
    if not isinstance(batch_input, (tuple, list)) or len(batch_input) != 2:
        raise errors.StructureMismatch(
            place="batch_input", expected="a pair (x, y) or a mapping with x and y", found=conform.kind_of(batch_input)
        )
    return cast(tuple[Any, Any], tuple(batch_input))


def batch_output_values(value: Any) -> dict[str, Any]:
    """The fields of a batch output, of whatever class it is, under their places in a request.

    Raises StructureMismatch where a field of `BatchOutput` is missing.
    """
    if not all(hasattr(value, name) for name in BatchOutput._fields):
        raise errors.StructureMismatch(
            place="batch_output", expected=f"a BatchOutput{BatchOutput._fields}", found=conform.kind_of(value)
        )
    return {f"batch_output.{name}": getattr(value, name) for name in BatchOutput._fields}
