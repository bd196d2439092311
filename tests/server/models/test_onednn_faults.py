"""Graphs that are refused while TensorFlow uses oneDNN."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from tensorflow.python.util import _pywrap_util_port

from forwardpass_server.models import private_tensorflow

REFUSED = [([None, None, 3, 4], [4, 16]), ([None, 1, 3, 4], [1, 4, 16])]
SERVED = [([None, 5, 3, 4], [4, 16]), ([None, None, 4], [4, 16]), ([None, 2, 3, 4], [2, 4, 16])]

SCRIPT = f"""
    import numpy as np
    import tensorflow as tf
    from forwardpass_server import FunctionalModel
    from forwardpass_server.calls.model import ModelSource
    from forwardpass_server.errors import ModelLoadError
    from forwardpass_server.models.loading import TensorFlowLoader

    def factory():
        @tf.function
        def predict(model_weights, x, training):
            (weight,), _ = model_weights
            return tf.matmul(x, weight)

        return FunctionalModel(
            initial_weights=((np.ones(weight_shape, np.float32),), ()),
            predict_on_batch_fn=predict,
            loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output) - tf.reduce_mean(label),
            input_spec=(tf.TensorSpec(x_shape), tf.TensorSpec([None])),
        )

    loader = TensorFlowLoader("cpu")
    for x_shape, weight_shape in {REFUSED + SERVED}:
        try:
            loader.load(ModelSource("m", 1, factory="__main__:factory"))
        except ModelLoadError as error:
            print(error)
        else:
            print("loaded")
"""


def outcomes(onednn: str) -> list[str]:
    """For each pair of shapes, what the load of a model that multiplies x by a weight says."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": onednn},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.splitlines()


def test_an_array_of_rank_4_times_one_matrix_is_refused_with_onednn_and_other_products_are_served():
    found = outcomes("1")
    for refusal in found[: len(REFUSED)]:
        assert "which TensorFlow computes wrong with oneDNN if the second dimension is 1" in refusal
        assert "start the server with --onednn off" in refusal
    assert found[len(REFUSED) :] == ["loaded"] * len(SERVED)


def test_every_product_is_served_without_onednn():
    assert outcomes("0") == ["loaded"] * len(REFUSED + SERVED)


@pytest.mark.parametrize("value, is_used", [("1", True), ("0", False), (None, True)])
def test_without_the_private_interface_the_environment_tells_whether_onednn_is_used(monkeypatch, value, is_used):
    monkeypatch.delattr(_pywrap_util_port, "IsMklEnabled")
    if value is None:
        monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    else:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", value)
    assert private_tensorflow.uses_onednn() is is_used
