"""Every loss of Keras, and what Model.compile takes as losses, against Keras itself."""

from __future__ import annotations

import functools
import inspect
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire.description import Function
from forwardpass_server import FunctionalModel, functional_model_from_keras
from forwardpass_server.models import tracing
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.keras_losses import InvalidCompileArgument
from support.keras_outputs import CLICK, RNG, WEIGHT, X_SPEC, X, identity, labels, softmax, spec_of, two_outputs

# A graph may sum in another order than eager Keras: a few last bits of float32.
RTOL = 1e-5


DEFAULT = (softmax(6, 4), softmax(6, 4))
CLASS_NUMBERS = (RNG.integers(0, 4, 6), softmax(6, 4))
# Each label twice: the loss compares pairs. Embeddings have length 1.
CIRCLE = (np.int64([0, 1, 2, 0, 1, 2]), np.array(keras.ops.normalize(RNG.normal(size=(6, 4)).astype(np.float32))))
BATCHES = {
    "SparseCategoricalCrossentropy": CLASS_NUMBERS,
    "sparse_categorical_crossentropy": CLASS_NUMBERS,
    "CategoricalGeneralizedCrossEntropy": CLASS_NUMBERS,
    "Circle": CIRCLE,
    "circle": CIRCLE,
    "categorical_generalized_cross_entropy": CLASS_NUMBERS,
    "CTC": (RNG.integers(1, 4, (6, 2)), softmax(6, 5, 4)),
    "ctc": (RNG.integers(1, 4, (6, 2)), softmax(6, 5, 4)),
}
ARGUMENTS = {
    "categorical_generalized_cross_entropy": functools.partial(
        keras.losses.categorical_generalized_cross_entropy, q=0.5
    )
}
NOT_LOSSES = {
    "Loss": "the base class",
    "deserialize": "makes losses",
    "get": "makes losses",
    "serialize": "writes losses",
}
LOSSES = sorted(name for name, value in vars(keras.losses).items() if callable(value) and name not in NOT_LOSSES)


def run(made: FunctionalModel, function: Function, *leaves) -> list[np.ndarray]:
    return Execution(tracing.trace(made).functions, "/device:CPU:0").run(function, False, leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_keras_equals_kerass_result(name):
    y, predictions = BATCHES.get(name, DEFAULT)
    loss = ARGUMENTS.get(name, getattr(keras.losses, name))
    # compile() gives the mean of a function's values.
    expected = loss()(y, predictions) if inspect.isclass(loss) else np.mean(loss(y, predictions))
    made = identity(predictions.shape[1:], loss_fn=loss, input_spec=(spec_of(predictions), spec_of(y)))
    (found,) = run(made, Function.LOSS, predictions, y)
    assert np.allclose(found, expected, rtol=RTOL)


@pytest.mark.parametrize("regularizer", [None, "l2"])
@pytest.mark.parametrize(
    "named, loss, loss_weights",
    [
        (True, {"click": "binary_crossentropy", "stars": "sparse_categorical_crossentropy"}, None),
        (True, {"stars": keras.losses.SparseCategoricalCrossentropy(), "click": "mse"}, {"click": 2.0, "stars": 0.5}),
        (True, {"click": "ce", "stars": "ce"}, None),
        (False, ["bce", "sparse_categorical_crossentropy"], [0.25, 3.0]),
        (False, {"click": "mse", "stars": "sparse_categorical_crossentropy"}, {"stars": 2.0, "click": 1.0}),
        (False, ["mse", None], None),
        (True, {"click": "mse", "stars": None}, None),
        (False, lambda y_true, y_pred: keras.ops.mean(keras.ops.square(y_pred) + y_true, -1), None),
    ],
)
def test_several_outputs_have_the_total_of_model_evaluate(named, loss, loss_weights, regularizer):
    model = two_outputs(named, regularizer)
    y = labels(named)
    made = functional_model_from_keras(
        model, loss, (X_SPEC, tf.nest.map_structure(spec_of, y)), loss_weights=loss_weights
    )
    model.compile(loss=loss, loss_weights=loss_weights)
    arguments = {"batch_size": 16, "verbose": 0, "return_dict": True}
    keras_y = y if named else list(y)
    expected = model.evaluate(X, keras_y, **arguments)["loss"]
    output = made.forward_pass(made.initial_weights, (X, y), training=False)
    assert np.allclose(output.loss, expected, rtol=RTOL)
    if regularizer is None:
        weighted = model.evaluate(X, keras_y, sample_weight=WEIGHT, **arguments)["loss"]
        assert np.allclose(made.loss(output.predictions, y, WEIGHT), weighted, rtol=RTOL)
    tracing.trace(made)  # Refuses captured variables.


def test_one_loss_for_equal_outputs_is_their_sum_as_in_keras():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(1)(inputs)])
    made = functional_model_from_keras(model, "mse", (X_SPEC, (spec_of(CLICK), spec_of(CLICK))))
    model.compile(loss="mse")
    expected = model.evaluate(X, [CLICK, CLICK], batch_size=16, verbose=0, return_dict=True)["loss"]
    assert np.allclose(made.forward_pass(made.initial_weights, (X, (CLICK, CLICK)), False).loss, expected, rtol=RTOL)


mse = keras.losses.mean_squared_error


def _private(y_true, y_pred):
    return mse(y_true, y_pred)


def größe(y_true, y_pred):
    return mse(y_true, y_pred)


def scaled(y_true, y_pred, factor):
    return factor * mse(y_true, y_pred)


class Squares:
    def __call__(self, y_true, y_pred):
        return mse(y_true, y_pred)

    def method(self, y_true, y_pred):
        return mse(y_true, y_pred)


class _PrivateLoss(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return mse(y_true, y_pred)


@pytest.mark.parametrize(
    "loss",
    [
        lambda y_true, y_pred: mse(y_true, y_pred),
        _private,
        größe,
        functools.partial(scaled, factor=1.0),
        Squares(),
        Squares().method,
        _PrivateLoss(),
        _PrivateLoss,
        keras.losses.MeanSquaredError(name="my loss"),
        keras.losses.MeanSquaredError(name="größe"),
        {"class_name": "MeanSquaredError", "config": {"name": "<x>"}},
    ],
    ids=lambda loss: getattr(loss, "name", getattr(loss, "__name__", type(loss).__name__)),
)
def test_a_loss_of_any_name_equals_its_function(loss):
    y, predictions = DEFAULT
    made = identity((4,), loss_fn=loss, input_spec=(spec_of(predictions), spec_of(y)))
    assert np.allclose(run(made, Function.LOSS, predictions, y), np.mean(mse(y, predictions)), rtol=RTOL)


def test_a_loss_keeps_the_name_that_the_caller_gave_it():
    loss = keras.losses.MeanSquaredError(name="my loss")
    identity((4,), loss_fn=loss, input_spec=tuple(map(spec_of, DEFAULT)))
    assert loss.name == "my loss"


def test_a_function_that_needs_integer_labels_gets_them():
    factors = tf.constant([1.0, 2.0, 3.0, 4.0])

    def by_class(y_true, y_pred):
        return tf.gather(factors, y_true) * keras.losses.sparse_categorical_crossentropy(y_true, y_pred)

    y, predictions = CLASS_NUMBERS
    made = identity((4,), loss_fn=by_class, input_spec=(spec_of(predictions), spec_of(y)))
    expected = np.mean(np.array(factors)[y] * keras.losses.sparse_categorical_crossentropy(y, predictions))
    assert np.allclose(run(made, Function.LOSS, predictions, y), expected, rtol=RTOL)


@pytest.mark.parametrize("reduction", ["none", None, "sum", "mean", "sum_over_batch_size", "mean_with_sample_weight"])
def test_every_reduction_works_with_a_regularizer(reduction):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, kernel_regularizer="l2")])
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    made = functional_model_from_keras(model, loss, (X_SPEC, spec_of(CLICK)))
    output = made.forward_pass(made.initial_weights, (X, CLICK), training=False)
    plain = np.array(loss(CLICK, model(X)))
    assert output.loss.shape == plain.shape
    assert np.allclose(output.loss, plain + np.array(model.losses[0]), rtol=RTOL)


@pytest.mark.parametrize(
    "loss, message",
    [
        ("nonsense", "loss: Could not interpret loss identifier: nonsense"),
        ({"clik": "mse"}, "loss: .*clik"),
        (["mse"] * 3, "loss: "),
        ([None, None], "loss: expected a loss for at least one output"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused_in_one_line(loss, message):
    with pytest.raises(InvalidCompileArgument, match=message) as caught:
        functional_model_from_keras(two_outputs(False), loss, (X_SPEC, tf.nest.map_structure(spec_of, labels(False))))
    assert os.linesep not in str(caught.value)
