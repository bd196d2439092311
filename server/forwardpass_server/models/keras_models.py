"""Keras 3 models as functional models, dropout and batch normalisation included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from forwardpass.wire.description import BatchOutput
from forwardpass_server.models import keras_losses, keras_metrics, keras_settings, masks
from forwardpass_server.models.functional import NO_METRICS, FunctionalModel, num_examples, x_and_y


def functional_model_from_keras(
    keras_model: keras.Model | Callable[[], keras.Model],
    loss_fn: Any,
    input_spec: Any,
    metrics_constructor: Any = None,
    *,
    loss_weights: Any = None,
    weighted_metrics: Any = None,
    sample_weight_spec: Any = None,
) -> FunctionalModel:
    """A functional model of a Keras 3 model; its weights are the model's present ones.

    keras_model: a built model, or a callable that returns one. It may hold any layer that keeps no state of its own
      between calls besides its variables.
    loss_fn, loss_weights: what `keras.Model.compile` takes as `loss` and `loss_weights`: a keras.losses.Loss, a name, a
      callable of (y_true, y_pred), or a structure of them for several outputs. A Keras configuration (a dict with
      class_name) may stand for a Loss.
    input_spec: a pair (x, y) of structures of tf.TensorSpec, or a mapping with keys x and y.
    metrics_constructor, weighted_metrics: as for TFF, a callable that returns Keras metrics; or metrics, names or
      configurations; or what `keras.Model.compile` takes: see `keras_metrics.functional_metrics`.
    sample_weight_spec: as for `FunctionalModel`.

    Weights are (trainable_variables, non_trainable_variables) in the layers' order. The second hold the moving
    statistics of batch normalisation and the seeds of dropout: the same weights give the same mask, and as a forward
    pass returns no weights, it changes neither. Losses that layers add (regularisation) count in forward_pass and in
    nothing else. Predictions keep their Keras masks, and loss and metrics leave out masked positions.
    Raises ValueError where the model, loss or metrics cannot be used.
    Source: tff.learning.models.functional_model_from_keras.
    """
    keras_settings.check_backend()
    model = keras_model if isinstance(keras_model, keras.Model) else keras_model()
    if not isinstance(model, keras.Model):
        raise ValueError(f"keras_model: expected a keras.Model or a callable for one, got {type(model).__name__}")
    x_spec, y_spec = x_and_y(input_spec)
    if not model.built:
        # Symbolic: the model may refuse inputs of size 1.
        model(keras_losses.as_keras_tensors(x_spec))
    initial_weights = (
        tuple(np.asarray(variable) for variable in model.trainable_variables),
        tuple(np.asarray(variable) for variable in model.non_trainable_variables),
    )
    adds_losses: list[bool] = []

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool = True) -> Any:
        outputs, _, added = model.stateless_call(*model_weights, x, training=training, return_losses=True)
        adds_losses.append(bool(added))
        return outputs, _masks(model, x, outputs)

    # Activity regularisers show only in a call. This trace is the one that serves, so it costs nothing.
    predictions, _ = predict_on_batch.get_concrete_function(
        tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), initial_weights),
        x_spec,
        training=True,
    ).structured_outputs
    # As Model.compile has it: only some kinds of models name their outputs.
    output_names = getattr(model, "output_names", None)
    keras_loss = keras_losses.loss_function(loss_fn, loss_weights, output_names, y_spec, predictions)

    def loss_of(output: Any, label: Any, sample_weight: Any = None, prediction_mask: Any = None) -> Any:
        return keras_loss(label, masks.attached(output, prediction_mask), sample_weight=sample_weight)

    def update(model_weights: Any, batch_input: Any, sample_weight: Any, training: bool) -> tuple[Any, Any]:
        x, y = x_and_y(batch_input)
        outputs, non_trainable, added = model.stateless_call(*model_weights, x, training=training, return_losses=True)
        prediction_mask = _masks(model, x, outputs)
        loss = loss_of(outputs, y, sample_weight, prediction_mask)
        for one in added:
            # Layers of other precision have losses of theirs. A loss without reduction has a value for each example.
            loss += tf.cast(tf.reduce_sum(one), loss.dtype)
        return (BatchOutput(loss, outputs, num_examples(outputs)), prediction_mask), tuple(non_trainable)

    @tf.function
    def forward_pass(model_weights: Any, batch_input: Any, training: bool = True) -> tuple[BatchOutput, Any]:
        result: tuple[BatchOutput, Any] = update(model_weights, batch_input, None, training)[0]
        return result

    metrics_fns = None
    if metrics_constructor is not None or weighted_metrics is not None:
        metrics_fns = keras_metrics.functional_metrics(
            metrics_constructor, weighted_metrics, output_names, y_spec, predictions
        )
    return FunctionalModel(
        initial_weights=initial_weights,
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss_of,
        metrics_fns=metrics_fns or NO_METRICS,
        input_spec=input_spec,
        forward_pass_fn=forward_pass if any(adds_losses) else None,
        sample_weight_spec=sample_weight_spec,
        has_prediction_masks=True,
        keras_model=model,
        update_fn=update,
    )


def _masks(model: keras.Model, x: Any, outputs: Any) -> Any:
    """The masks of a model's outputs: see `masks.of`."""
    found = masks.of(outputs)
    if found is None and model.supports_masking:
        # Calling the model asks it for masks of its own; a stateless call does not.
        computed = model.compute_mask(x, tf.nest.map_structure(lambda _: None, x))
        if any(mask is not None for mask in tf.nest.flatten(computed)):
            found = computed
    return found
