"""Small Keras models with one or two outputs, and batches for them."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from forwardpass_server import FunctionalModel, functional_model_from_keras

RNG = np.random.default_rng(0)


def softmax(*shape: int) -> np.ndarray:
    return np.array(keras.ops.softmax(RNG.normal(size=shape).astype(np.float32)))


def identity(shape: tuple[int, ...], **changes) -> FunctionalModel:
    inputs = keras.Input(shape)
    return functional_model_from_keras(keras.Model(inputs, keras.layers.Identity()(inputs)), **changes)


def spec_of(array: np.ndarray) -> tf.TensorSpec:
    return tf.TensorSpec([None, *array.shape[1:]], array.dtype)


def two_outputs(named: bool, regularizer: str | None = None) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, "relu", kernel_regularizer=regularizer)(inputs)
    click = keras.layers.Dense(1, "sigmoid", name="click")(hidden)
    stars = keras.layers.Dense(3, "softmax", name="stars")(hidden)
    return keras.Model(inputs, {"click": click, "stars": stars} if named else [click, stars])


X = RNG.normal(size=(16, 6)).astype(np.float32)
CLICK = RNG.integers(0, 2, (16, 1)).astype(np.float32)
STARS = RNG.integers(0, 3, (16, 1))
WEIGHT = RNG.random(16).astype(np.float32)
X_SPEC = spec_of(X)


def labels(named: bool):
    return {"click": CLICK, "stars": STARS} if named else (CLICK, STARS)
