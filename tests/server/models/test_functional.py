"""The FunctionalModel class itself."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from forwardpass_server import FunctionalModel
from forwardpass_server.models.functional import CallableNotTensorFlowFunctionError, ValueMustNotBeTFError
from support import zoo

SPEC = (tf.TensorSpec([None, 2], tf.float32), tf.TensorSpec([None], tf.float32))


@tf.function
def predict(model_weights, x, training):
    return tf.linalg.matvec(x, model_weights[0][0]) + (1.0 if training else 0.0)


def loss(output, label, sample_weight=None):
    error = (output - label) ** 2
    return tf.reduce_mean(error if sample_weight is None else error * sample_weight)


def linear(**changes) -> FunctionalModel:
    arguments = {
        "initial_weights": ((np.float32([1, 2]),), ()),
        "predict_on_batch_fn": predict,
        "loss_fn": loss,
        "input_spec": SPEC,
    }
    return FunctionalModel(**{**arguments, **changes})


X, Y = np.float32([[1, 1], [2, 0]]), np.float32([3, 3])


@pytest.mark.parametrize("batch_input", [(X, Y), [X, Y], {"x": X, "y": Y}])
def test_the_forward_pass_is_predict_loss_and_the_number_of_examples(batch_input):
    model = linear()
    output = model.forward_pass(model.initial_weights, batch_input, False)
    assert output.predictions.numpy().tolist() == [3, 2]
    assert float(output.loss) == 0.5
    assert (int(output.num_examples), output.num_examples.dtype) == (2, tf.int32)


def test_training_is_the_default():
    model = linear()
    assert model.predict_on_batch(model.initial_weights, X).numpy().tolist() == [4, 3]
    assert model.forward_pass(model.initial_weights, (X, Y)).predictions.numpy().tolist() == [4, 3]


def test_the_models_own_forward_pass_may_differ_from_predict_and_loss():
    model = zoo.structures()
    x, y = zoo.structures_batch(3)
    output = model.forward_pass(model.initial_weights, {"x": x, "y": y}, True)
    assert int(output.num_examples) == 42
    assert float(output.loss) != float(model.loss(model.predict_on_batch(model.initial_weights, x, True), y))


def test_the_default_metrics_are_empty_as_in_tff():
    model = linear()
    state = model.initialize_metrics_state()
    assert state == {}
    assert model.update_metrics_state(state, Y, None) == {}
    assert model.finalize_metrics(state) == {}


def test_functions_without_tf_function_are_refused_as_in_tff():
    with pytest.raises(CallableNotTensorFlowFunctionError, match="predict_on_batch_fn"):
        linear(predict_on_batch_fn=lambda *_: None)
    with pytest.raises(CallableNotTensorFlowFunctionError, match="forward_pass_fn"):
        linear(forward_pass_fn=lambda *_: None)
    assert issubclass(CallableNotTensorFlowFunctionError, TypeError)


@pytest.mark.parametrize("value", [tf.constant(1.0), tf.Variable(1.0)], ids=["tensor", "variable"])
def test_tensorflow_values_among_the_weights_are_refused_as_in_tff(value):
    with pytest.raises(ValueMustNotBeTFError, match=r"\.numpy\(\)"):
        linear(initial_weights=((value,), ()))


def test_arguments_are_by_keyword_only():
    with pytest.raises(TypeError):
        FunctionalModel(((), ()), predict, loss)
