"""Keras 3 models as functional models, dropout and batch normalisation included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from forwardpass.wire.description import BatchOutput
from forwardpass_server.models import keras_metrics, tf_specs
from forwardpass_server.models.functional import NO_METRICS, FunctionalModel, num_examples, x_and_y


def functional_model_from_keras(
    keras_model: keras.Model | Callable[[], keras.Model],
    loss_fn: Any,
    input_spec: Any,
    metrics_constructor: Any = None,
    *,
    sample_weight_spec: Any = None,
) -> FunctionalModel:
    """A functional model of a Keras 3 model; its weights are the model's present ones.

    keras_model: a built model, or a callable that returns one. It may hold any layer that keeps no state of its own
      between calls besides its variables.
    loss_fn: a keras.losses.Loss, a name, a configuration, or a callable of (y_true, y_pred).
    input_spec: a pair (x, y) of structures of tf.TensorSpec, or a mapping with keys x and y.
    metrics_constructor: as for TFF, a callable that returns Keras metrics; or metrics, names or configurations.
    sample_weight_spec: as for `FunctionalModel`.

    Weights are (trainable_variables, non_trainable_variables) in the layers' order. The second hold the moving
    statistics of batch normalisation and the seeds of dropout: the same weights give the same mask, and as a forward
    pass returns no weights, it changes neither. Losses that layers add (regularisation) count in forward_pass and in
    nothing else.
    Raises ValueError where the model, loss or metrics cannot be used.
    Source: tff.learning.models.functional_model_from_keras.
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=tensorflow before it is imported")
    model = keras_model if isinstance(keras_model, keras.Model) else keras_model()
    if not isinstance(model, keras.Model):
        raise ValueError(f"keras_model: expected a keras.Model or a callable for one, got {type(model).__name__}")
    x_spec, y_spec = x_and_y(input_spec)
    if not model.built:
        # Symbolic: the model may refuse inputs of size 1.
        model(tf.nest.map_structure(lambda spec: keras.KerasTensor(spec.shape.as_list(), spec.dtype.name), x_spec))
    initial_weights = (
        tuple(np.asarray(variable) for variable in model.trainable_variables),
        tuple(np.asarray(variable) for variable in model.non_trainable_variables),
    )
    keras_loss = keras_metrics.resolve_loss(loss_fn)
    adds_losses: list[bool] = []

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool = True) -> Any:
        outputs, _, added = model.stateless_call(*model_weights, x, training=training, return_losses=True)
        adds_losses.append(bool(added))
        return outputs

    # Activity regularisers show only in a call. This trace is the one that serves, so it costs nothing.
    predictions = predict_on_batch.get_concrete_function(
        tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), initial_weights),
        x_spec,
        training=True,
    ).structured_outputs

    def loss_of(output: Any, label: Any, sample_weight: Any = None) -> Any:
        return keras_loss(label, output, sample_weight=sample_weight)

    @tf.function
    def forward_pass(model_weights: Any, batch_input: Any, training: bool = True) -> BatchOutput:
        x, y = x_and_y(batch_input)
        outputs, _, added = model.stateless_call(*model_weights, x, training=training, return_losses=True)
        loss = loss_of(outputs, y)
        # Layers of other precision have losses of theirs.
        loss = tf.add_n([loss, *(tf.cast(tf.reduce_sum(one), loss.dtype) for one in added)])
        return BatchOutput(loss, outputs, num_examples(outputs))

    metrics_fns = None
    if metrics_constructor is not None:
        metrics_fns = keras_metrics.functional_metrics(
            keras_metrics.resolve_metrics(metrics_constructor),
            tf_specs.zeros(y_spec),
            tf_specs.zeros(predictions),
        )
    return FunctionalModel(
        initial_weights=initial_weights,
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss_of,
        metrics_fns=metrics_fns or NO_METRICS,
        input_spec=input_spec,
        forward_pass_fn=forward_pass if any(adds_losses) else None,
        sample_weight_spec=sample_weight_spec,
        keras_model=model,
    )
