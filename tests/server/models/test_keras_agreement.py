"""Graphs compared with what the Keras model computes directly."""

from __future__ import annotations

from typing import Any

import keras
import pytest
import tensorflow as tf

from forwardpass_server import functional_model_from_keras
from forwardpass_server.models import examples, keras_agreement, tracing
from forwardpass_server.models.execution import Execution

layers = keras.layers


def warning(model: keras.Model, x: tf.TensorSpec, y: Any) -> str:
    functional = functional_model_from_keras(model, "mse", (x, y))
    traced = tracing.trace(functional)
    execution = Execution(traced.functions, "/device:CPU:0")
    found = examples.find(execution, traced.spec, traced.initial_weights)
    return keras_agreement.warning(functional.keras_model, execution, found, traced.initial_weights)


def test_a_layer_whose_graph_differs_from_its_eager_result_is_named():
    sequences = keras.Input((None, 7, 3))
    model = keras.Model(sequences, layers.TimeDistributed(layers.Conv1D(2, 2), name="each")(layers.ReLU()(sequences)))
    found = warning(model, tf.TensorSpec([None, None, 7, 3]), tf.TensorSpec([None, None, 6, 2]))
    assert "predictions in inference differ" in found
    assert "layer 'each' (TimeDistributed) traces another graph than it computes" in found


def test_a_layer_that_differs_in_training_only_is_named():
    images = keras.Input((8, 8, 3))
    model = keras.Model(images, layers.RandomElasticTransform(seed=1, name="bend")(images))
    found = warning(model, tf.TensorSpec([None, 8, 8, 3]), tf.TensorSpec([None, 8, 8, 3]))
    assert "predictions in training differ" in found
    assert "layer 'bend' (RandomElasticTransform) traces another graph than it computes" in found


def test_a_layer_that_draws_without_its_seed_causes_no_warning():
    class Noise(layers.Layer):
        def call(self, x: Any, training: bool = False) -> Any:
            return x + tf.random.uniform(tf.shape(x)) if training else x

    x = keras.Input((3,))
    assert warning(keras.Model(x, Noise()(x)), tf.TensorSpec([None, 3]), tf.TensorSpec([None, 3])) == ""


@pytest.mark.parametrize("length", [None, 8])
def test_a_model_whose_graph_equals_keras_causes_no_warning(length):
    model = keras.Sequential([keras.Input((length, 3)), layers.LSTM(4), layers.Dropout(0.5), layers.Dense(2)])
    assert warning(model, tf.TensorSpec([None, length, 3]), tf.TensorSpec([None, 2])) == ""


def test_outputs_by_name_are_compared_by_name():
    x = keras.Input((3,))
    model = keras.Model(x, {"wide": layers.Dense(4)(x), "narrow": layers.Dense(2)(x)})
    spec = {"wide": tf.TensorSpec([None, 4]), "narrow": tf.TensorSpec([None, 2])}
    assert warning(model, tf.TensorSpec([None, 3]), spec) == ""
