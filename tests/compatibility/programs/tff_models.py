"""Functional models made by real TFF, the same in every process. Runs where TFF is installed and nothing of ours is."""

from __future__ import annotations

import collections

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff


def dict_inputs():
    """Inputs by name, in no alphabetical order, non-trainable weights, a training flag that matters."""

    @tf.function
    def predict_on_batch(model_weights, x, training):
        (kernel, embedding), (offset,) = model_weights
        output = x["wide"] @ kernel + tf.gather(embedding, x["category"]) + offset
        return output * 2.0 if training else output

    def loss(output, label, sample_weight=None):
        del sample_weight
        return tf.reduce_mean((output - label) ** 2)

    rng = np.random.default_rng(1)
    return tff.learning.models.FunctionalModel(
        initial_weights=(
            (rng.normal(size=(4, 2)).astype(np.float32), rng.normal(size=(3, 2)).astype(np.float32)),
            (np.float32([0.5, -0.5]),),
        ),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss,
        input_spec=(
            collections.OrderedDict(
                wide=tf.TensorSpec([None, 4], tf.float32), category=tf.TensorSpec([None], tf.int32)
            ),
            tf.TensorSpec([None, 2], tf.float32),
        ),
    )


def dict_inputs_batch(examples):
    rng = np.random.default_rng(examples)
    x = collections.OrderedDict(
        wide=rng.normal(size=(examples, 4)).astype(np.float32), category=rng.integers(0, 3, examples).astype(np.int32)
    )
    return x, rng.normal(size=(examples, 2)).astype(np.float32)


def keras_model():
    """A model built in Keras 2, with a custom structure of layers TFF allows."""
    tf.keras.utils.set_random_seed(2)
    model = tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer((6, 6, 1)),
            tf.keras.layers.Conv2D(3, 3, activation="relu"),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(4),
        ]
    )
    return tff.learning.models.functional_model_from_keras(
        model,
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        (tf.TensorSpec([None, 6, 6, 1], tf.float32), tf.TensorSpec([None], tf.int64)),
    )


def keras_model_batch(examples):
    rng = np.random.default_rng(examples)
    return rng.normal(size=(examples, 6, 6, 1)).astype(np.float32), rng.integers(0, 4, examples)


MODELS = {"dict_inputs": (dict_inputs, dict_inputs_batch), "keras_model": (keras_model, keras_model_batch)}
