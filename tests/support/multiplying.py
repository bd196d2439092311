"""Models that multiply by a number of their own, so that versions can be told from one another."""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import tensorflow as tf

from forwardpass_server import FunctionalModel, save_functional_model


def times(factor: float) -> FunctionalModel:
    """Multiplies by its number, so that versions can be told from one another."""

    @tf.function
    def predict_on_batch(model_weights, x, training):
        return x * tf.constant(factor, tf.float32) * model_weights[0][0]

    zero = {"total": tf.constant(0.0)}
    return FunctionalModel(
        initial_weights=((np.float32(1),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        metrics_fns=(
            tf.function(lambda: zero),
            tf.function(
                lambda state, labels, batch_output, sample_weight=None: {
                    "total": state["total"] + tf.reduce_sum(batch_output.predictions)
                }
            ),
            lambda state: state,
        ),
        input_spec=(tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


def write(folder: pathlib.Path, version: int, factor: float) -> None:
    """Puts a version there at once, as `mv` does."""
    beside = folder / f".{version}"
    save_functional_model(times(factor), beside)
    if (folder / str(version)).exists():
        shutil.rmtree(folder / str(version))
    beside.rename(folder / str(version))
