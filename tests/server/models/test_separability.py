"""Which models may be batched: those whose every operation keeps rows apart, as a probe confirms."""

from __future__ import annotations

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire.description import Function
from forwardpass_server import FunctionalModel, functional_model_from_keras
from forwardpass_server.models import formats, separability, tracing
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.serving.models import ModelSource
from support import zoo
from support.golden import FOLDER, NAMES


def reason(model: FunctionalModel) -> str:
    traced = tracing.trace(model)
    execution = Execution(traced.functions, "/device:CPU:0")
    concrete = traced.functions[Function.PREDICT_ON_BATCH, False]
    return separability.reason_against(execution, concrete, traced.spec, traced.initial_weights)


def functional(predict, shape=(4,), weights=()) -> FunctionalModel:
    return FunctionalModel(
        initial_weights=(tuple(np.asarray(weight, np.float32) for weight in weights), ()),
        predict_on_batch_fn=tf.function(lambda model_weights, x, training: predict(x, *model_weights[0])),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(tf.cast(output, tf.float32)),
        input_spec=(tf.TensorSpec([None, *shape], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


SEPARABLE = {
    "dense": functional(lambda x, w, b: tf.nn.relu(x @ w + b), weights=(np.ones((4, 3)), np.ones(3))),
    "a weight with a dimension of 1 in the batch's place": functional(lambda x, b: x * b, weights=(np.ones((1, 4)),)),
    "softmax over features": functional(lambda x: tf.nn.softmax(x)),
    "normalised rows": functional(lambda x: (x - tf.reduce_mean(x, 1, keepdims=True)) / tf.norm(x, axis=-1)[:, None]),
    "flattened": functional(lambda x: tf.reshape(x, [-1, 6]), shape=(2, 3)),
    "flattened by its own shape": functional(lambda x: tf.reshape(x, [tf.shape(x)[0], 6]), shape=(2, 3)),
    "transposed features": functional(lambda x: tf.transpose(x, [0, 2, 1]), shape=(2, 3)),
    "joined features": functional(lambda x: tf.concat([x, x * 2, tf.zeros_like(x)], -1)),
    "stacked features": functional(lambda x: tf.stack([x, x], 1)),
    "a slice of features": functional(lambda x: x[:, 1:3]),
    "zeros of its own size": functional(lambda x: x[:, 0] + tf.zeros([tf.shape(x)[0]])),
    "table lookup": functional(
        lambda x, t: tf.gather(t, tf.cast(tf.sigmoid(x) * 8, tf.int32)[:, 0]), weights=(np.ones((9, 2)),)
    ),
    "best of each row": functional(lambda x: tf.argmax(x, 1)),
    "top two of each row": functional(lambda x: tf.math.top_k(x, 2).values),
    "batched product": functional(lambda x: tf.matmul(x, x, transpose_b=True), shape=(2, 3)),
    "einsum": functional(lambda x, w: tf.einsum("bij,jk->bik", x, w), shape=(2, 3), weights=(np.ones((3, 2)),)),
    "padded features": functional(lambda x: tf.pad(x, [[0, 0], [1, 1]])),
}

INSEPARABLE = {
    "mean over the batch": (lambda x: x - tf.reduce_mean(x, 0), "Mean", "along the batch"),
    "softmax over the batch": (lambda x: tf.transpose(tf.nn.softmax(tf.transpose(x))), "Transpose", "moves the batch"),
    "sum of everything, spread again": (lambda x: x + tf.reduce_sum(x), "Sum", "along the batch"),
    "cumulated over the batch": (lambda x: tf.cumsum(x, 0), "Cumsum", "along the batch"),
    "reversed": (lambda x: tf.reverse(x, [0]), "ReverseV2", "along the batch"),
    "rows joined": (lambda x: tf.reshape(x, [-1, 8]), "Reshape", "cuts rows in pieces, or joins them"),
    "rows cut": (lambda x: tf.reshape(x, [-1, 2]), "Reshape", "cuts rows in pieces, or joins them"),
    "rows doubled": (lambda x: tf.concat([x, x], 0), "ConcatV2", "along the batch"),
    "rows of another": (lambda x: tf.gather(x, tf.cast(x[:, 0] * 0, tf.int32)), "GatherV2", "uses rows as parameters"),
    "first row for all": (lambda x: x + x[:1], "StridedSlice", "takes some rows"),
    "last row only": (lambda x: x[-1:], "StridedSlice", "takes some rows"),
    "number of rows in the result": (lambda x: x * tf.cast(tf.shape(x)[0], tf.float32), "Cast", "the number of rows"),
    "products of rows": (lambda x: x @ tf.transpose(x) @ x, "Transpose", "moves the batch"),
    "products of rows without transposing": (lambda x: tf.matmul(x, x, transpose_b=True) @ x, "MatMul", "parameters"),
    "products summed over rows": (lambda x: x + tf.einsum("bi,bj->ij", x, x)[0], "Einsum", ""),
    "a number of rows that wraps around": (
        lambda x: tf.fill(tf.stack([tf.cast(tf.cast(tf.shape(x)[0], tf.uint8), tf.int32), 1]), 1.0),
        "Cast",
        "the number of rows",
    ),
    "noise": (lambda x: x + tf.random.normal([4]), "RandomStandardNormal", "has an effect or a state"),
    "unknown operation": (lambda x: tf.linalg.expm(tf.linalg.diag(x))[:, 0], "", ""),
    "a loop": (lambda x: tf.scan(lambda a, row: a + row, x), "", "is not known to keep rows apart"),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_operations_that_keep_rows_apart_are_known(name):
    assert reason(SEPARABLE[name]) == ""


@pytest.mark.parametrize("name", INSEPARABLE)
def test_operations_that_mix_rows_are_found_by_name(name):
    predict, operation, why = INSEPARABLE[name]
    found = reason(functional(predict))
    assert found
    assert operation in found
    assert why in found


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_models_are_judged(name):
    model, *_ = formats.read(FOLDER / name / "saved_model")
    assert bool(reason(model)) is (name == "lstm_next_word")


def keras_reason(*layers, shape=(8, 4)) -> str:
    model = keras.Sequential([keras.layers.Input(shape), *layers])
    spec = (tf.TensorSpec([None, *shape], tf.float32), tf.TensorSpec([None], tf.float32))
    return reason(functional_model_from_keras(model, "mse", spec))


def test_dropout_and_batch_normalisation_keep_rows_apart_in_inference():
    layers = keras.layers
    assert keras_reason(layers.Flatten(), layers.Dropout(0.5), layers.BatchNormalization(), layers.Dense(2)) == ""
    assert keras_reason(layers.Conv2D(2, 2), layers.MaxPooling2D(), layers.LayerNormalization(), shape=(6, 6, 1)) == ""


def test_normalisation_by_the_batch_itself_is_found():
    @keras.saving.register_keras_serializable()
    class ByTheBatch(keras.layers.Layer):
        def call(self, x):
            return (x - tf.reduce_mean(x, axis=0)) / tf.math.reduce_std(x, axis=0)

    assert "along the batch" in keras_reason(ByTheBatch())


def test_inputs_and_predictions_need_a_batch_dimension():
    fixed = functional(lambda x: tf.reduce_sum(x, 0)[:1])
    assert reason(fixed).startswith("predictions has no batch dimension")


def test_the_probe_catches_what_the_rules_would_let_pass(monkeypatch):
    monkeypatch.setitem(separability._RULES, "Mean", separability._only_first)
    mixed = functional(lambda x: x - tf.reduce_mean(x, 0, keepdims=True) + tf.zeros_like(x))
    monkeypatch.setattr(separability, "_check_graph", lambda *arguments: None)
    assert reason(mixed) == "rows had other predictions together than alone"


def test_a_model_that_refuses_random_inputs_is_not_judged():
    def picky(x):
        with tf.control_dependencies([tf.debugging.assert_less(tf.abs(x), 1e-9)]):
            return tf.identity(x)

    assert "assert_less" in reason(functional(picky))


def test_the_operator_may_forbid_batching_and_cannot_force_it(tmp_path):
    for name, batching in (("no_metrics", False), ("lstm_next_word", True), ("linear_regression", True)):
        shutil.copytree(FOLDER / name / "saved_model", tmp_path / name)
        (tmp_path / name / "forwardpass.json").write_text(json.dumps({"batching": batching}))
    loader = TensorFlowLoader("cpu")

    def why(name: str, loader: TensorFlowLoader = loader) -> str:
        return loader.load(ModelSource(name, 1, folder=tmp_path / name)).description.unbatchable_reason

    assert why("no_metrics") == "the operator forbids it"
    assert "moves the batch" in why("lstm_next_word")
    assert why("linear_regression") == ""
    assert why("linear_regression", TensorFlowLoader("cpu", batching=False)) == "the operator forbids it"


def test_what_was_judged_separable_is_bit_for_bit_the_same_alone_and_together_for_a_small_model():
    traced = tracing.trace(
        functional_model_from_keras(
            zoo.keras_cnn(1),
            "sparse_categorical_crossentropy",
            (tf.TensorSpec([None, 6, 6, 1], tf.float32), tf.TensorSpec([None], tf.int64)),
        )
    )
    execution = Execution(traced.functions, "/device:CPU:0")
    x, _ = zoo.keras_batch(16)

    def predict(rows):
        return execution.run(Function.PREDICT_ON_BATCH, False, [*traced.initial_weights, rows])[0]

    alone = np.concatenate([predict(x[:8]), predict(x[8:])])
    # Kernels choose their order of summing by the number of rows: float32's last bits.
    assert np.allclose(predict(x), alone, rtol=0, atol=1e-6)
