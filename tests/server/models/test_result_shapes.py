"""Results have the shapes that are described, those of empty batches too."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire import errors
from support.predictors import Predictor


def test_an_empty_batch_gets_the_described_shape():
    # TensorFlow with oneDNN returns a convolution of no rows in the shape of its input. That depends on the machine, so
    # the graph claims a shape here that it does not return.
    def claim(x, weights):
        claimed = tf.identity(x[0])
        claimed.set_shape([None, 6, 4])
        return [claimed, tf.reduce_sum(x[0])]

    predictor = Predictor(claim, [tf.TensorSpec([None, None, None], tf.float32)])
    predictions, total = predictor.run([np.zeros((0, 8, 3), np.float32)])
    assert (predictions.shape, predictions.dtype) == ((0, 6, 4), np.float32)
    assert total == 0
    with pytest.raises(errors.ModelRefusedInput, match=r"of shape \[2,8,3\], expected \[None,6,4\]"):
        predictor.run([np.zeros((2, 8, 3), np.float32)])


def test_free_dimensions_of_an_empty_batch_are_those_of_a_row_of_zeros():
    def odd(x, weights):
        rows = tf.shape(x[0])[0]
        # As many columns as the input has where there are no rows, and two less where there are some.
        short = x[0][:, : tf.shape(x[0])[1] - 2 * tf.minimum(rows, 1)]
        return [short, x[1]]

    x = [tf.TensorSpec([None, None], tf.float32), tf.TensorSpec([None], tf.string)]
    predictor = Predictor(odd, x)
    for rows in (0, 1, 3):
        found, texts = predictor.run([np.ones((rows, 8), np.float32), np.array([b"a"] * rows, object)])
        assert (found.shape, texts.shape) == ((rows, 6), (rows,))


def test_an_empty_batch_is_refused_if_its_result_shape_cannot_be_found():
    def picky(x, weights):
        with tf.control_dependencies([tf.debugging.assert_greater(tf.reduce_sum(tf.abs(x[0]), 1), 0.0)]):
            return [tf.identity(x[0])]

    predictor = Predictor(picky, [tf.TensorSpec([None, None], tf.float32)])
    assert predictor.run([np.ones((1, 3), np.float32)])[0].shape == (1, 3)
    with pytest.raises(errors.ModelRefusedInput):
        predictor.run([np.ones((0, 3), np.float32)])


def test_results_of_fixed_and_of_unknown_shape_are_returned_as_they_are():
    def several(x, weights):
        return [tf.zeros([3]), tf.reduce_sum(x[0]), tf.unique(x[0])[0]]

    predictor = Predictor(several, [tf.TensorSpec([None], tf.float32)])
    for values, shapes in (([], [(3,), (), (0,)]), ([1, 2, 1], [(3,), (), (2,)])):
        assert [result.shape for result in predictor.run([np.float32(values)])] == shapes


def test_convolutions_of_no_rows_by_onednn_have_the_described_shape_or_are_refused():
    # In a process of its own, since TensorFlow reads the variable once. Where the CPU is one for which TensorFlow was
    # built with oneDNN, each of these models returned the shape of its input, or was refused inside.
    script = """
        import keras, numpy as np, tensorflow as tf
        from forwardpass.wire import errors
        from forwardpass.wire.description import Function
        from forwardpass_server import functional_model_from_keras
        from forwardpass_server.models import tracing
        from forwardpass_server.models.execution import Execution
        layers = keras.layers
        models = {
            "Conv1D": ((8, 3), [layers.Conv1D(4, 3)]),
            "causal": ((8, 3), [layers.Conv1D(4, 3, padding="causal")]),
            "Conv2D": ((8, 8, 3), [layers.Conv2D(4, 3, strides=2, activation="relu")]),
            "Conv3D": ((6, 6, 6, 3), [layers.Conv3D(4, 3)]),
            "Conv2DTranspose": ((8, 8, 3), [layers.Conv2DTranspose(4, 3)]),
            "pooled": ((8, 8, 3), [layers.Conv2D(4, 3), layers.MaxPooling2D()]),
            "flattened": ((8, 3), [layers.Conv1D(4, 3), layers.Flatten(), layers.Dense(2)]),
            "normalised": ((8, 3), [layers.Conv1D(4, 3, use_bias=False), layers.BatchNormalization()]),
        }
        for name, (shape, stack) in models.items():
            model = keras.Sequential([layers.Input(shape), *stack])
            label = model.output_shape
            spec = tf.TensorSpec([None, *shape], tf.float32), tf.TensorSpec(label, tf.float32)
            traced = tracing.trace(functional_model_from_keras(model, "mse", spec))
            execution = Execution(traced.functions, "/device:CPU:0")
            x, y = np.zeros((0, *shape), np.float32), np.zeros((0, *label[1:]), np.float32)
            for training in (False, True):
                for function, inputs in ((Function.PREDICT_ON_BATCH, [x]), (Function.FORWARD_PASS, [x, y])):
                    try:
                        results = execution.run(function, training, [*traced.initial_weights, *inputs])
                    except errors.ModelRefusedInput as error:
                        assert str(error)
                        continue
                    predictions = results[function is Function.FORWARD_PASS]
                    assert predictions.shape == (0, *label[1:]), (name, function, training, predictions.shape)
                    if function is Function.FORWARD_PASS:
                        # The mean over no rows, as Keras's own loss returns it.
                        assert results[0] == 0 or np.isnan(results[0]), results[0]
                        assert results[2] == 0
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1"},
    )
    assert done.returncode == 0, done.stderr
