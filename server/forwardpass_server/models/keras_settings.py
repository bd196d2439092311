"""Keras's settings of the process: a server needs the same ones wherever it runs."""

from __future__ import annotations

import os

try:
    import keras
except ImportError as error:
    raise ImportError(
        f"Keras cannot import its backend {os.environ.get('KERAS_BACKEND') or 'of keras.json'} ({error}): forwardpass "
        "needs Keras on TensorFlow; set KERAS_BACKEND=tensorflow before Keras is imported"
    ) from error


def check_backend() -> None:
    """Raises ValueError where Keras runs on something else than TensorFlow."""
    name = keras.config.backend()
    if name != "tensorflow":
        raise ValueError(
            f"Keras runs on {name}, and forwardpass needs it on TensorFlow: set KERAS_BACKEND=tensorflow before Keras "
            "is imported"
        )


def use_defaults() -> None:
    """Sets what a keras.json in the home of the server's user would otherwise decide: the values that Keras ships with.

    For a process of forwardpass's own, before it makes Keras objects. Raises ValueError as `check_backend` does.
    """
    check_backend()
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
