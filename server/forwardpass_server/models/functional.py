"""Functional models written in Python: TFF's contract, plus sample weights and an own forward pass."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from forwardpass.wire.description import BatchOutput, Function
from forwardpass.wire.errors import FunctionNotAvailable

MetricsFns = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


class CallableNotTensorFlowFunctionError(TypeError):
    """A function was given without `@tf.function`."""


class ValueMustNotBeTFError(TypeError):
    """Initial weights hold a tf.Tensor or a tf.Variable."""


@tf.function
def empty_metrics_state() -> collections.OrderedDict[str, Any]:
    return collections.OrderedDict()


@tf.function
def noop_update_metrics(state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
    return collections.OrderedDict()


@tf.function
def noop_finalize_metrics(state: Any) -> collections.OrderedDict[str, Any]:
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
    keras_model: the Keras model that it was made of, or None: what it computes directly is compared at a load.

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
        self._sample_weight_spec = sample_weight_spec or tf.TensorSpec([None], tf.float32)
        self._unavailable = dict(unavailable or {})
        if metrics_fns is None:
            for function in _METRICS_FUNCTIONS:
                self._unavailable.setdefault(function, "the model was written without metrics")

    @property
    def initial_weights(self) -> Any:
        return self._initial_weights

    @property
    def input_spec(self) -> Any:
        return self._input_spec

    @property
    def sample_weight_spec(self) -> Any:
        return self._sample_weight_spec

    @property
    def has_own_forward_pass(self) -> bool:
        """Whether forward_pass is a function of its own and may differ from predict_on_batch and loss."""
        return self._forward_pass_fn is not None

    @property
    def unavailable(self) -> Mapping[Function, str]:
        """Why the model lacks a function, for each that it lacks."""
        return self._unavailable

    @tf.function
    def predict_on_batch(self, model_weights: Any, x: Any, training: bool = True) -> Any:
        """Predictions for one batch under these weights, structured as predict_on_batch_fn returns them."""
        return self._predict_on_batch_fn(model_weights, x, training)

    @tf.function
    def forward_pass(self, model_weights: Any, batch_input: Any, training: bool = True) -> BatchOutput:
        """Loss, predictions and number of examples (int32) of one batch.

        batch_input: a pair (x, y) or a mapping with keys x and y.
        """
        if self._forward_pass_fn is not None:
            return _batch_output(self._forward_pass_fn(model_weights, batch_input, training))
        x, y = x_and_y(batch_input)
        predictions = self._predict_on_batch_fn(model_weights, x, training)
        return BatchOutput(self._loss_fn(predictions, y, None), predictions, num_examples(predictions))

    def loss(self, output: Any, label: Any, sample_weight: Any = None) -> Any:
        """The loss of predictions against labels."""
        if sample_weight is not None:
            self._require(Function.WEIGHTED_LOSS)
        return self._loss_fn(output, label, sample_weight)

    def initialize_metrics_state(self) -> Any:
        """The metrics state before the first batch."""
        return self._metrics_fn(Function.INITIALIZE_METRICS_STATE, 0)()

    def update_metrics_state(self, state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
        """The metrics state after one more batch."""
        if sample_weight is not None:
            self._require(Function.WEIGHTED_UPDATE_METRICS_STATE)
        return self._metrics_fn(Function.UPDATE_METRICS_STATE, 1)(state, labels, batch_output, sample_weight)

    def finalize_metrics(self, state: Any) -> Any:
        """The metrics of a state."""
        return self._metrics_fn(Function.FINALIZE_METRICS, 2)(state)

    def _metrics_fn(self, function: Function, index: int) -> Callable[..., Any]:
        self._require(function)
        assert self._metrics_fns is not None
        return self._metrics_fns[index]

    def _require(self, function: Function) -> None:
        reason = self._unavailable.get(function)
        if reason is not None:
            raise FunctionNotAvailable(f"{function.title} is not available: {reason}")


_METRICS_FUNCTIONS = (
    Function.INITIALIZE_METRICS_STATE,
    Function.UPDATE_METRICS_STATE,
    Function.WEIGHTED_UPDATE_METRICS_STATE,
    Function.FINALIZE_METRICS,
)


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
