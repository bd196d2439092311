"""Graphs that are refused while TensorFlow uses oneDNN."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import sys
    import numpy as np
    import tensorflow as tf
    from forwardpass_server import FunctionalModel
    from forwardpass_server.calls.model import ModelSource
    from forwardpass_server.errors import ModelLoadError
    from forwardpass_server.models.loading import TensorFlowLoader

    SHAPES = {shapes}

    def factory():
        @tf.function
        def predict(model_weights, x, training):
            (weight,), _ = model_weights
            return tf.matmul(x, weight)

        return FunctionalModel(
            initial_weights=((np.ones(SHAPES[1], np.float32),), ()),
            predict_on_batch_fn=predict,
            loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output) - tf.reduce_mean(label),
            input_spec=(tf.TensorSpec(SHAPES[0]), tf.TensorSpec([None])),
        )

    try:
        TensorFlowLoader("cpu").load(ModelSource("m", 1, factory="__main__:factory"))
    except ModelLoadError as error:
        print(error)
    else:
        print("loaded")
"""


def outcome(x: list[int | None], weight: list[int], onednn: str) -> str:
    """What the load of a model that multiplies x by a weight prints."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT).replace("{shapes}", repr((x, weight)))],
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": onednn},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.strip()


@pytest.mark.parametrize(
    "x, weight",
    [([None, None, 3, 4], [4, 16]), ([None, 1, 3, 4], [1, 4, 16])],
)
def test_an_array_of_rank_4_times_one_matrix_is_refused_with_onednn_only(x, weight):
    refusal = outcome(x, weight, "1")
    assert "which TensorFlow computes wrong with oneDNN if the second dimension is 1" in refusal
    assert "start the server with --onednn off" in refusal
    assert outcome(x, weight, "0") == "loaded"


@pytest.mark.parametrize(
    "x, weight",
    [([None, 5, 3, 4], [4, 16]), ([None, None, 4], [4, 16]), ([None, 2, 3, 4], [2, 4, 16])],
)
def test_other_products_are_served_with_onednn(x, weight):
    assert outcome(x, weight, "1") == "loaded"
