"""Functional models written in Python: TFF's contract, plus sample weights and an own forward pass."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from forwardpass.wire.description import BatchOutput
from forwardpass.wire.errors import FunctionNotAvailable
from forwardpass.wire.functions import METRICS_FUNCTIONS, Function
from forwardpass_server.models import masks

MetricsFns = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


class CallableNotTensorFlowFunctionError(TypeError):
    """A function was given without `@tf.function`."""


class ValueMustNotBeTFError(TypeError):
    """Initial weights hold a tf.Tensor or a tf.Variable."""


@tf.function
def empty_metrics_state() -> collections.OrderedDict[str, Any]:
    """TFF's default: a state without values."""
    return collections.OrderedDict()


@tf.function
def noop_update_metrics(
    state: Any, labels: Any, batch_output: Any, sample_weight: Any = None, prediction_mask: Any = None
) -> Any:
    """TFF's default: a state without values, whatever the batch is."""
    return collections.OrderedDict()


@tf.function
def noop_finalize_metrics(state: Any) -> collections.OrderedDict[str, Any]:
    """TFF's default: no metrics."""
    return collections.OrderedDict()


NO_METRICS: MetricsFns = (empty_metrics_state, noop_update_metrics, noop_finalize_metrics)
"""TFF's default: a state, and metrics, without anything in them."""


class FunctionalModel:
    """A model whose forward pass takes its weights as an argument.

    initial_weights: a pair (trainable, non_trainable) of sequences of arrays, no TensorFlow values among them.
    predict_on_batch_fn: a tf.function of (model_weights, x, training), with `training` a Python bool. It returns a
      tensor or a structure whose first leaf is the predictions, shape [B, ...].
    loss_fn: a callable of (output, label, sample_weight), with `output` what predict_on_batch_fn returns.
      sample_weight is None or a tensor like `sample_weight_spec`.
    metrics_fns: three tf.functions: () -> state, (state, labels, batch_output, sample_weight) -> state,
      (state) -> metrics. None for a model that has no metrics and must say so.
    input_spec: a pair (x, y) of structures of tf.TensorSpec, or a mapping with keys x and y.
    forward_pass_fn: a tf.function of (model_weights, batch_input, training) that returns a BatchOutput; None for
      predict_on_batch, loss and the number of examples.
    sample_weight_spec: a tf.TensorSpec. The default, float32[None], is one weight for each example.
    unavailable: why the model lacks a function, for each that it lacks besides.
    has_prediction_masks: predict_on_batch_fn and forward_pass_fn return a pair: what they return otherwise, and the
      Keras masks of the predictions as `masks.of` returns them. loss_fn and the update of metrics_fns take such masks,
      or None, as the keyword `prediction_mask`.
    keras_model: the Keras model that it was made of, or None: what it computes directly is compared at a load.
    update_fn: a callable of (model_weights, batch_input, sample_weight, training), the forward pass of an optimizer
      step. It returns a pair: what forward_pass_fn returns, and the non-trainable weights after the step. None for a
      model whose steps do not change those weights.

    Predictions carry their Keras masks in the attribute `_keras_mask`, as those of a Keras model do, and `loss` and
    `update_metrics_state` read them there.

    Raises CallableNotTensorFlowFunctionError and ValueMustNotBeTFError as TFF does.
    Source: tff.learning.models.FunctionalModel; forward_pass_fn as of TFF 0.52.
    """

    def __init__(
        self,
        *,
        initial_weights: Any,
        predict_on_batch_fn: Callable[..., Any],
        loss_fn: Callable[..., Any],
        metrics_fns: MetricsFns | None = NO_METRICS,
        input_spec: Any,
        forward_pass_fn: Callable[..., Any] | None = None,
        sample_weight_spec: Any = None,
        unavailable: Mapping[Function, str] | None = None,
        keras_model: Any = None,
        has_prediction_masks: bool = False,
        update_fn: Callable[..., Any] | None = None,
    ) -> None:
        tf.nest.map_structure(_check_no_tf_value, initial_weights)
        _check_tf_function(predict_on_batch_fn, "predict_on_batch_fn")
        if forward_pass_fn is not None:
            _check_tf_function(forward_pass_fn, "forward_pass_fn")
        self._initial_weights = initial_weights
        self._predict_on_batch_fn = predict_on_batch_fn
        self._loss_fn = loss_fn
        self._metrics_fns = metrics_fns
        self.keras_model = keras_model
        self._input_spec = input_spec
        self._forward_pass_fn = forward_pass_fn
        self._update_fn = update_fn
        self._sample_weight_spec = sample_weight_spec or tf.TensorSpec([None], tf.float32)
        self._unavailable = dict(unavailable or {})
        self._has_prediction_masks = has_prediction_masks
        if metrics_fns is None:
            for function in METRICS_FUNCTIONS:
                self._unavailable.setdefault(function, "the model was written without metrics")

    @property
    def initial_weights(self) -> Any:
        """The pair (trainable, non_trainable), the object that was given and not a copy."""
        return self._initial_weights

    @property
    def input_spec(self) -> Any:
        """The pair or mapping (x, y) of structures of tf.TensorSpec that was given."""
        return self._input_spec

    @property
    def sample_weight_spec(self) -> Any:
        """The tf.TensorSpec that was given, or float32[None]."""
        return self._sample_weight_spec

    @property
    def has_own_forward_pass(self) -> bool:
        """Whether forward_pass is a function of its own and may differ from predict_on_batch and loss."""
        return self._forward_pass_fn is not None

    @property
    def changes_weights(self) -> bool:
        """Whether an optimizer step changes the non-trainable weights."""
        return self._update_fn is not None

    @property
    def unavailable(self) -> Mapping[Function, str]:
        """Why the model lacks a function, for each that it lacks."""
        return self._unavailable

    def predict_on_batch(self, model_weights: Any, x: Any, training: bool = True) -> Any:
        """Predictions for one batch under these weights, structured as predict_on_batch_fn returns them."""
        return masks.attached(*self.predict_with_masks(model_weights, x, training))

    @tf.function
    def predict_with_masks(self, model_weights: Any, x: Any, training: bool = True) -> tuple[Any, Any]:
        """`predict_on_batch`, and the masks of the predictions by themselves: see `masks.of`."""
        return self._with_masks(self._predict_on_batch_fn(model_weights, x, training))

    def forward_pass(self, model_weights: Any, batch_input: Any, training: bool = True) -> BatchOutput:
        """Loss, predictions and number of examples (int32) of one batch.

        batch_input: a pair (x, y) or a mapping with keys x and y.
        """
        output, prediction_mask = self.forward_pass_with_masks(model_weights, batch_input, training)
        return BatchOutput(output.loss, masks.attached(output.predictions, prediction_mask), output.num_examples)

    @tf.function
    def forward_pass_with_masks(
        self, model_weights: Any, batch_input: Any, training: bool = True
    ) -> tuple[BatchOutput, Any]:
        """`forward_pass`, and the masks of the predictions by themselves: see `masks.of`."""
        if self._forward_pass_fn is not None:
            result, prediction_mask = self._with_masks(self._forward_pass_fn(model_weights, batch_input, training))
            return _batch_output(result), prediction_mask
        return self._predict_and_loss(model_weights, batch_input, None, training)

    def update(
        self, model_weights: Any, batch_input: Any, sample_weight: Any = None, training: bool = True
    ) -> tuple[BatchOutput, Any, Any]:
        """The forward pass of a training step: its batch output, its masks, and the new non-trainable weights.

        sample_weight: None for equal weights. Raises FunctionNotAvailable where the loss takes no sample weights, or
        where the model has a forward pass of its own that takes none.
        """
        if sample_weight is not None:
            if self._forward_pass_fn is not None and self._update_fn is None:
                raise FunctionNotAvailable("the model has a forward pass of its own, which takes no sample weights")
            self._require(Function.WEIGHTED_LOSS)
        if self._update_fn is not None:
            result, non_trainable = self._update_fn(model_weights, batch_input, sample_weight, training)
            output, prediction_mask = self._with_masks(result)
            return _batch_output(output), prediction_mask, non_trainable
        if sample_weight is None:
            output, prediction_mask = self.forward_pass_with_masks(model_weights, batch_input, training)
        else:
            output, prediction_mask = self._predict_and_loss(model_weights, batch_input, sample_weight, training)
        return output, prediction_mask, model_weights[1]

    def _predict_and_loss(
        self, model_weights: Any, batch_input: Any, sample_weight: Any, training: bool
    ) -> tuple[BatchOutput, Any]:
        x, y = x_and_y(batch_input)
        predictions, prediction_mask = self._with_masks(self._predict_on_batch_fn(model_weights, x, training))
        loss = self._loss_fn(predictions, y, sample_weight, **self._mask_keyword(prediction_mask))
        return BatchOutput(loss, predictions, num_examples(predictions)), prediction_mask

    def loss(self, output: Any, label: Any, sample_weight: Any = None, *, mask: Any = None) -> Any:
        """The loss of predictions against labels.

        mask: the Keras masks of `output`, for a model that has some; None for those that `output` itself carries. An
          output that `predict_on_batch` or `forward_pass` returned carries them; one that was computed from such an
          output does not, and then every position counts.
        """
        if sample_weight is not None:
            self._require(Function.WEIGHTED_LOSS)
        return self._loss_fn(output, label, sample_weight, **self._mask_keyword(masks.of(output), mask))

    def initialize_metrics_state(self) -> Any:
        """The metrics state before the first batch."""
        return self._metrics_fn(Function.INITIALIZE_METRICS_STATE, 0)()

    def update_metrics_state(
        self, state: Any, labels: Any, batch_output: Any, sample_weight: Any = None, *, mask: Any = None
    ) -> Any:
        """The metrics state after one more batch. mask: of the batch output's predictions, as of `loss`."""
        if sample_weight is not None:
            self._require(Function.WEIGHTED_UPDATE_METRICS_STATE)
        update = self._metrics_fn(Function.UPDATE_METRICS_STATE, 1)
        keyword = self._mask_keyword(masks.of(getattr(batch_output, "predictions", None)), mask)
        return update(state, labels, batch_output, sample_weight, **keyword)

    def finalize_metrics(self, state: Any) -> Any:
        """The metrics of a state."""
        return self._metrics_fn(Function.FINALIZE_METRICS, 2)(state)

    def _with_masks(self, result: Any) -> tuple[Any, Any]:
        return result if self._has_prediction_masks else (result, None)

    def _mask_keyword(self, carried: Any, given: Any = None) -> dict[str, Any]:
        """The argument that tells a function the masks: those that were given, or else that predictions carry."""
        if self._has_prediction_masks:
            return {"prediction_mask": carried if given is None else given}
        if given is not None:
            raise ValueError("mask: the predictions of this model have no Keras masks; leave it out")
        return {}

    def _metrics_fn(self, function: Function, index: int) -> Callable[..., Any]:
        self._require(function)
        assert self._metrics_fns is not None
        return self._metrics_fns[index]

    def _require(self, function: Function) -> None:
        reason = self._unavailable.get(function)
        if reason is not None:
            raise FunctionNotAvailable(f"{function.title} is not available: {reason}")


def _check_tf_function(function: object, name: str) -> None:
    if not hasattr(function, "get_concrete_function"):
        raise CallableNotTensorFlowFunctionError(
            f"{name} must be decorated with tf.function; got a {type(function).__name__} without it"
        )


def _check_no_tf_value(value: object) -> None:
    if tf.is_tensor(value) or isinstance(value, tf.Variable):
        raise ValueMustNotBeTFError(
            f"initial_weights must hold arrays, got a {type(value).__name__}; take its .numpy() instead"
        )


def x_and_y(batch_input: Any) -> tuple[Any, Any]:
    """The two items of a batch or an input spec: a pair, or a mapping with keys x and y."""
    if isinstance(batch_input, Mapping):
        return batch_input["x"], batch_input["y"]
    x, y = batch_input
    return x, y


def num_examples(predictions: Any) -> tf.Tensor:
    """The batch size, int32[]: the first dimension of the first leaf, in tf.nest's order, as TFF has it."""
    return tf.shape(tf.nest.flatten(predictions)[0])[0]


def _batch_output(result: Any) -> BatchOutput:
    """A custom forward pass may return any class with these three attributes: TFF's is another than ours."""
    return BatchOutput(result.loss, result.predictions, result.num_examples)
