"""A remote model as pure functions of JAX, with derivatives for `jax.grad`. Needs the extra `jax`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from forwardpass.wire import conform, errors
from forwardpass.wire.description import BatchOutput
from forwardpass.wire.dtypes import STRING, Array
from forwardpass.wire.specs import StructureSpec, TensorSpec
from forwardpass_client import flat_model
from forwardpass_client.calls import check_training, x_and_y
from forwardpass_client.flat_model import FlatModel
from forwardpass_client.model import RemoteFunctionalModel
from forwardpass_client.weights_handles import WeightsHandleApi


def functional_model(model: RemoteFunctionalModel) -> JaxModel:
    """The model as pure functions on JAX's arrays: see `JaxModel`.

    model: of `connect(...).model(name)`.
    Raises TypeError for another object, the model of an AsyncClient included; DTypeMismatch, naming the leaf, for a
    model with strings in its weights or inputs, which JAX does not have.
    """
    return JaxModel(model)


class JaxModel:
    """A remote model for `jax.grad`, `jax.jit` and `jax.vmap`. Each call has the client's timeout.

    Arguments are arrays in the model's containers; results are JAX's arrays. Under `jax.jit` the calls are made each
    time the compiled function runs, by `jax.pure_callback`; errors are then `jax.errors.JaxRuntimeError` with the text
    of the client's. Without JAX's 64-bit mode, 64-bit numbers are 32-bit, as everywhere in JAX.

    RPCs: `forward_pass` makes one, with or without its gradient. `predict_on_batch` makes one, and its gradient
    another. `jax.vmap` makes one RPC for each element, one after another. JAX needs the shapes of results before it
    runs a program, and specs leave the batch size free. So the first call of a function with arguments of other shapes
    makes one more RPC, on zeros.

    Derivatives that the server does not give raise FunctionNotAvailable while JAX traces. Derivatives of derivatives
    and forward-mode derivatives (`jax.jvp`, `jax.hessian`) raise the errors of JAX.
    """

    def __init__(self, model: RemoteFunctionalModel) -> None:
        self._flat = FlatModel(model)
        self._model = model
        spec = self._flat.spec
        for place, part in (("weights", spec.weights), ("x", spec.x), ("y", spec.y), ("output", spec.predictions)):
            for leaf, path in zip(part.leaves, part.tree.paths(place), strict=True):
                if leaf.data_type is STRING:
                    raise errors.DTypeMismatch(place=path, expected="numbers: JAX has no strings", found=str(leaf))
        self._shapes: dict[Any, list[tuple[int | None, ...] | None]] = {}

    @property
    def initial_weights(self) -> Any:
        """(trainable, non_trainable) as read-only arrays: see `RemoteFunctionalModel.initial_weights`."""
        return self._model.initial_weights

    @property
    def input_spec(self) -> Any:
        """(x, y) in the model's containers: see `RemoteFunctionalModel.input_spec`."""
        return self._model.input_spec

    def predict_on_batch(self, model_weights: Any, x: Any, training: bool = True) -> Any:
        """Predictions for one batch, leaves of shape [B, ...], differentiable with respect to trainable weights and x.

        model_weights: (trainable, non_trainable), or a handle of `put_weights`, without derivatives.
        x: leaves of shape [B, ...] as in `input_spec`. training: a Python bool.
        Raises what the model's `predict_on_batch` raises.
        """
        handle, weights = self._weights(model_weights)
        inputs = _leaves(x, self._flat.spec.x, "x")
        predictions = self._predict(handle, check_training(training))(weights, inputs)
        return self._flat.spec.predictions.tree.unflatten(predictions)

    def forward_pass(self, model_weights: Any, batch_input: Any, training: bool = True) -> BatchOutput:
        """Loss, predictions and number of examples of one batch, differentiable with respect to the trainable weights.

        model_weights, training: as of `predict_on_batch`.
        batch_input: (x, y) or a mapping with x and y, leaves of shape [B, ...] as in `input_spec`.
        The predictions are differentiable with respect to x, too, unless the model's forward pass is a function of its
        own (`description.spec.has_own_forward_pass`): then they have no derivatives. A loss of several values has the
        gradient of their sum only: FunctionNotAvailable is raised for another combination.
        Raises what the model's `forward_pass` raises.
        """
        x, y = x_and_y(batch_input)
        handle, weights = self._weights(model_weights)
        inputs, labels = _leaves(x, self._flat.spec.x, "x"), _leaves(y, self._flat.spec.y, "batch_input.y")
        output = self._forward(handle, check_training(training))(weights, inputs, labels)
        return BatchOutput(*self._flat.spec.batch_output.tree.unflatten(output))

    def loss(self, output: Any, label: Any, sample_weight: Any = None) -> Any:
        """The loss of predictions against labels, without derivatives: use `forward_pass` for those.

        output, label: leaves of shape [B, ...] as in the specs. sample_weight: float32[B] unless the model says
        otherwise; None for no weights. Raises what the model's `loss` raises; FunctionNotAvailable for its gradient.
        """
        spec = self._flat.spec
        outputs, labels = _leaves(output, spec.predictions, "output"), _leaves(label, spec.y, "label")
        rows = [] if sample_weight is None else _leaves(sample_weight, spec.sample_weight, "sample_weight")

        def loss(outputs: Any, labels: Any, rows: Any) -> list[Array]:
            masks = [np.ones(np.shape(outputs[index])[: len(mask.shape or ())], bool) for index, mask in masked]
            return self._flat.loss(_arrays(outputs), masks, _arrays(labels), _arrays(rows))

        masked = list(zip(spec.masked_leaves, spec.prediction_mask.leaves, strict=True))

        @jax.custom_vjp
        def function(*groups: Any) -> Any:
            return _callback(loss, self._results("loss", loss, spec.loss.leaves, *groups), *groups)

        def forward(*groups: Any) -> Any:
            for group in groups:
                _check_unperturbed(group, flat_model.NO_LOSS_DERIVATIVES)
            return function(*map(_values, groups)), None

        function.defvjp(forward, lambda residuals, cotangents: (None, None, None), symbolic_zeros=True)
        return spec.loss.tree.unflatten(function(outputs, labels, rows))

    def _weights(self, model_weights: Any) -> tuple[WeightsHandleApi | None, list[Any]]:
        """A handle, or the leaves of weights."""
        if isinstance(model_weights, WeightsHandleApi):
            return model_weights, []
        return None, _leaves(model_weights, self._flat.spec.weights, "model_weights")

    def _predict(self, handle: WeightsHandleApi | None, training: bool) -> Callable[..., Any]:
        """predict_on_batch on lists of leaves, with its derivatives."""
        flat, count = self._flat, len(self._flat.spec.predictions.leaves)

        def predict(weights: Any, inputs: Any) -> list[Array]:
            found = flat.predict(handle or _arrays(weights), _arrays(inputs), training)
            return found[:count]

        @jax.custom_vjp
        def function(weights: Any, inputs: Any) -> Any:
            shapes = self._results(f"predict, {training}", predict, flat.spec.predictions.leaves, weights, inputs)
            return _callback(predict, shapes, weights, inputs)

        def forward(weights: Any, inputs: Any) -> Any:
            self._check_weights(weights, flat_model.NO_VJP)
            weights, inputs = _values(weights), _values(inputs)
            return function(weights, inputs), (weights, inputs)

        def backward(residuals: Any, cotangents: Any) -> Any:
            weights, inputs = residuals
            return self._vjp(handle, training, weights, inputs, cotangents)

        function.defvjp(forward, backward, symbolic_zeros=True)
        return function

    def _forward(self, handle: WeightsHandleApi | None, training: bool) -> Callable[..., Any]:
        """forward_pass on lists of leaves, with its derivatives."""
        flat = self._flat
        specs = flat.spec.batch_output.leaves
        num_losses = len(flat.batch_output.loss.leaves)

        def run(weights: Any, inputs: Any, labels: Any) -> list[Array]:
            return flat.forward(handle or _arrays(weights), _arrays(inputs), _arrays(labels), training)[: len(specs)]

        def run_backward(weights: Any, inputs: Any, labels: Any) -> list[Array]:
            output, gradients = flat.forward_backward(
                handle or _arrays(weights), _arrays(inputs), _arrays(labels), [], training
            )
            return [*output[: len(specs)], *gradients]

        def results(weights: Any, inputs: Any, labels: Any) -> list[Any]:
            return self._results(f"forward, {training}", run, specs, weights, inputs, labels)

        @jax.custom_vjp
        def function(weights: Any, inputs: Any, labels: Any) -> Any:
            return _callback(run, results(weights, inputs, labels), weights, inputs, labels)

        def forward(weights: Any, inputs: Any, labels: Any) -> Any:
            self._check_weights(weights, flat_model.NO_LOSS_DERIVATIVES)
            _check_unperturbed(labels, flat_model.NO_LOSS_DERIVATIVES)
            is_perturbed = _is_perturbed(inputs)
            weights, inputs, labels = _values(weights), _values(inputs), _values(labels)
            shapes = results(weights, inputs, labels)
            if not weights:
                return _callback(run, shapes, weights, inputs, labels), (weights, inputs, [], _Static(is_perturbed))
            shapes += [_like(weight) for weight in self._differentiable_weights(weights)]
            found = _callback(run_backward, shapes, weights, inputs, labels)
            return found[: len(specs)], (weights, inputs, found[len(specs) :], _Static(is_perturbed))

        def backward(residuals: Any, cotangents: Any) -> Any:
            weights, inputs, gradients, is_perturbed = residuals
            of_loss = cotangents[:num_losses]
            of_predictions = cotangents[num_losses : num_losses + len(flat.batch_output.predictions.leaves)]
            of_weights: list[Any] = [None] * len(weights)
            of_inputs: list[Any] = [None] * len(inputs)
            if any(map(_is_used, of_predictions)):
                if flat.spec.has_own_forward_pass:
                    raise errors.FunctionNotAvailable(flat_model.NO_OWN_FORWARD_PASS)
                of_weights, of_inputs = self._vjp(handle, training, weights, inputs, of_predictions)
            if any(map(_is_used, of_loss)):
                if is_perturbed.value:
                    raise errors.FunctionNotAvailable(flat_model.NO_LOSS_DERIVATIVES)
                scale = _common_scale(of_loss)
                remaining = iter(gradients)
                for index, spec in enumerate(flat.trainable.leaves[: len(weights)]):
                    if spec.data_type.is_differentiable:
                        scaled = scale.astype(weights[index].dtype) * next(remaining)
                        of_weights[index] = scaled if of_weights[index] is None else of_weights[index] + scaled
            return of_weights, of_inputs, None

        function.defvjp(forward, backward, symbolic_zeros=True)
        return function

    def _vjp(
        self, handle: WeightsHandleApi | None, training: bool, weights: Any, inputs: Any, cotangents: Any
    ) -> tuple[list[Any], list[Any]]:
        """The cotangents of the leaves of the weights and of x; None for those without derivatives."""
        flat = self._flat
        given = [
            jax.numpy.zeros(cotangent.aval.shape, cotangent.aval.dtype) if not _is_used(cotangent) else cotangent
            for cotangent, spec in zip(cotangents, flat.spec.predictions.leaves, strict=True)
            if spec.data_type.is_differentiable
        ]
        kept_weights = self._differentiable_weights(weights)
        kept_inputs = _differentiable(inputs, flat.spec.x.leaves)

        def vjp(weights: Any, inputs: Any, cotangents: Any) -> list[Array]:
            of_weights, of_x = flat.vjp(handle or _arrays(weights), _arrays(inputs), _arrays(cotangents), training)
            return [*([] if handle else of_weights), *of_x]

        shapes = list(map(_like, [*kept_weights, *kept_inputs]))
        found = iter(_callback(vjp, shapes, weights, inputs, given) if shapes else [])
        trainable = [
            next(found) if spec.data_type.is_differentiable else None for spec in flat.trainable.leaves[: len(weights)]
        ]
        of_weights = [*trainable, *[None] * (len(weights) - len(trainable))]
        return of_weights, [next(found) if spec.data_type.is_differentiable else None for spec in flat.spec.x.leaves]

    def _differentiable_weights(self, weights: Sequence[Any]) -> list[Any]:
        trainable = weights[: len(self._flat.trainable.leaves)]
        return _differentiable(trainable, self._flat.trainable.leaves[: len(trainable)])

    def _check_weights(self, weights: Sequence[Any], message: str) -> None:
        _check_unperturbed(weights[len(self._flat.trainable.leaves) :], message)

    def _results(
        self, name: str, body: Callable[..., list[Array]], specs: Sequence[TensorSpec], *groups: Sequence[Any]
    ) -> list[jax.ShapeDtypeStruct]:
        """The shapes and dtypes of the results of `body`.

        If the specs leave dimensions free, `body` is called once on zeros of the arguments' shapes. name: of the
        function, under which the shapes are kept.
        """
        shapes = [spec.shape for spec in specs]
        if any(shape is None or None in shape for shape in shapes):
            key = (name, tuple(tuple(map(np.shape, group)) for group in groups))
            if key not in self._shapes:
                example = [[np.zeros(leaf.shape, leaf.dtype) for leaf in group] for group in groups]
                self._shapes[key] = list(map(np.shape, body(*example)))
            shapes = list(self._shapes[key])
        return [jax.ShapeDtypeStruct(shape, _dtype(spec.dtype)) for shape, spec in zip(shapes, specs, strict=True)]


def _dtype(dtype: np.dtype[Any]) -> Any:
    """The dtype that JAX has in its place: without its 64-bit mode, one of 32 bits."""
    return jax.dtypes.canonicalize_dtype(dtype)


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _leaves(value: Any, spec: StructureSpec, place: str) -> list[Any]:
    """The leaves of a value as JAX's arrays. Raises StructureMismatch, DTypeMismatch or ShapeMismatch."""
    leaves = conform.arrange(value, spec.tree, place)
    paths = spec.tree.paths(place)
    return [_leaf(*one) for one in zip(leaves, spec.leaves, paths, strict=True)]


def _leaf(value: Any, spec: TensorSpec, place: str) -> Any:
    if not isinstance(value, jax.Array):
        array = conform.conform_leaf(value, spec, place)
        return jax.numpy.asarray(array, _dtype(array.dtype))
    found = f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if not spec.admits_shape(value.shape):
        raise errors.ShapeMismatch(place=place, expected=str(spec), found=found)
    if not conform.can_cast(np.dtype(value.dtype), spec.data_type):
        raise errors.DTypeMismatch(place=place, expected=str(spec), found=found)
    # The SDK casts integers in the callback: it checks that they fit.
    return value.astype(_dtype(spec.dtype)) if spec.data_type.is_differentiable else value


def _arrays(leaves: Sequence[Any]) -> list[Array]:
    """What JAX passes to a callback, as numpy's arrays: JAX must not compute in a callback."""
    return list(map(np.asarray, leaves))


def _callback(body: Callable[..., list[Array]], shapes: Sequence[jax.ShapeDtypeStruct], *groups: Any) -> list[Any]:
    """The results of `body` as JAX's arrays, computed when the program runs."""

    def cast_body(*groups: Any) -> list[Array]:
        return [np.asarray(array, shape.dtype) for array, shape in zip(body(*groups), shapes, strict=True)]

    return list(jax.pure_callback(cast_body, list(shapes), *groups, vmap_method="sequential"))


def _differentiable(leaves: Sequence[Any], specs: Sequence[TensorSpec]) -> list[Any]:
    return [leaf for leaf, spec in zip(leaves, specs, strict=True) if spec.data_type.is_differentiable]


# With `symbolic_zeros`, JAX passes arguments as pairs of a value and of whether a derivative is asked for, and
# cotangents that are zero as objects of a type of their own.


def _values(leaves: Sequence[Any]) -> list[Any]:
    return [leaf.value for leaf in leaves]


def _is_perturbed(leaves: Sequence[Any]) -> bool:
    return any(leaf.perturbed for leaf in leaves)


def _check_unperturbed(leaves: Sequence[Any], message: str) -> None:
    if _is_perturbed(leaves):
        raise errors.FunctionNotAvailable(message)


def _is_used(cotangent: Any) -> bool:
    return not isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["value"])
@dataclasses.dataclass(frozen=True)
class _Static:
    """A Python value among residuals, which are otherwise arrays."""

    value: bool


def _common_scale(cotangents: Sequence[Any]) -> Any:
    """The one number by which every value of the loss is scaled. Raises FunctionNotAvailable where they differ."""
    if len(cotangents) == 1 and not cotangents[0].shape:
        return cotangents[0]
    if not all(map(_is_used, cotangents)):
        raise errors.FunctionNotAvailable(flat_model.NO_SEPARATE_LOSSES)

    def common(cotangents: Any) -> list[Array]:
        return [flat_model.common_scale(_arrays(cotangents))]

    return _callback(common, [jax.ShapeDtypeStruct((), cotangents[0].dtype)], list(cotangents))[0]
