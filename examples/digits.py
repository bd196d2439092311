"""Trains a small Keras 3 model of handwritten digits and writes it into a model repository.

python examples/digits.py models    # takes some seconds and writes models/digits/1
forwardpass-server serve --model-repository models
"""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Callable
from typing import Any

from forwardpass_server.process import quiet

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# TensorFlow prints lines about its build when it is imported.
with quiet.native_stderr():
    import keras
    import numpy as np
    import tensorflow as tf
    from sklearn.datasets import load_digits

    from forwardpass_server import FunctionalModel, functional_model_from_keras, save_functional_model

EPOCHS = 8


def data() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Pairs (x, y) for training and for testing. x: images [B, 8, 8, 1] of 0 to 1. y: the digits in them [B]."""
    images, digits = load_digits(return_X_y=True)
    x = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    y = digits.astype(np.int64)
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def train(on_epoch: Callable[[int], None] = lambda epoch: None) -> keras.Model:
    """Trains a convolutional model with batch normalisation and dropout.

    on_epoch: called after each epoch with the number of epochs so far.
    """
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same"),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: on_epoch(epoch + 1))
    model.fit(*data()[0], batch_size=32, epochs=EPOCHS, verbose=0, callbacks=[callback])
    return model


def functional(model: keras.Model) -> FunctionalModel:
    """The functional model of a Keras model: its weights are an argument."""
    return functional_model_from_keras(
        model,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        (tf.TensorSpec([None, 8, 8, 1], tf.float32), tf.TensorSpec([None], tf.int64)),
        ["SparseCategoricalAccuracy", {"class_name": "SparseTopKCategoricalAccuracy", "config": {"k": 3}}],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small model of handwritten digits and export it.")
    parser.add_argument("repository", type=pathlib.Path, help="the model repository, a folder, for example models")
    folder = parser.parse_args().repository / "digits" / "1"
    # TensorFlow prints further lines when it computes for the first time. Errors are raised as usual.
    with quiet.native_stderr():
        save_functional_model(functional(train()), folder)
    print(f"wrote {folder}")
