"""Models saved by real TFF, served and called: the numbers that TFF computed before it saved them."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest

from forwardpass.wire import trees
from forwardpass_client import BatchOutput, errors
from support.golden import NAMES, Golden, golden

# TFF computed these with TensorFlow 2.11 to 2.21; the kernels of matrix products and reductions sum in another order
# from release to release. In terms of the largest number in an array, that is float32's last bits.
RELATIVE = 1e-6

MODES = [("infer", False), ("train", True)]


def assert_same(found: Any, expected: Any) -> None:
    """The same containers, dtypes, shapes, and numbers but for rounding."""
    found_tree, found_leaves = trees.flatten(found)
    expected_tree, expected_leaves = trees.flatten(expected)
    assert found_tree == expected_tree
    for path, one, other in zip(found_tree.paths("result"), found_leaves, expected_leaves, strict=True):
        assert isinstance(one, np.ndarray), path
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        if one.dtype == object:
            assert one.tolist() == other.tolist()
            continue
        scale = np.abs(other).max(initial=0)
        assert np.allclose(one, other, rtol=0, atol=RELATIVE * scale, equal_nan=True), path


def cases(condition=lambda model: True):
    return pytest.mark.parametrize("name", [name for name in NAMES if condition(golden(name))])


@pytest.fixture
def model(client, name):
    return client.model(name)


@cases()
def test_initial_weights_and_input_spec_equal_those_of_the_model(model, name):
    expected = golden(name)
    assert_same(model.initial_weights, expected.weights("initial_weights"))
    spec = expected.manifest["structures"]["input_spec_after_load"]
    assert described(model.input_spec) == described_by_manifest(spec)


def described(spec: Any) -> Any:
    tree, leaves = trees.flatten(spec, is_leaf=lambda node: hasattr(node, "shape"))
    return tree.unflatten([(leaf.dtype.name, leaf.shape) for leaf in leaves])


def described_by_manifest(node: Any) -> Any:
    if node["kind"] == "tensor":
        return node["dtype"], tuple(node["shape"])
    if node["kind"] == "OrderedDict":
        return collections.OrderedDict((name, described_by_manifest(item)) for name, item in node["items"])
    assert node["kind"] == "tuple"
    return tuple(described_by_manifest(item) for item in node["items"])


@cases()
@pytest.mark.parametrize("mode, training", MODES)
def test_predictions_equal_tffs(model, name, mode, training):
    expected = golden(name)
    for batch in expected.batches:
        found = model.predict_on_batch(expected.weights(), expected.batch(batch)[0], training=training)
        assert_same(found, expected.get(f"{batch}predict_{mode}", "predict_output"))


@cases()
@pytest.mark.parametrize("mode, training", MODES)
def test_the_loss_equals_tffs(model, name, mode, training):
    expected = golden(name)
    for batch in expected.batches:
        output = expected.get(f"{batch}predict_{mode}", "predict_output")
        assert_same(model.loss(output, expected.batch(batch)[1]), expected.array(f"{batch}loss/{mode}"))


@cases()
@pytest.mark.parametrize("mode, training", MODES)
def test_the_forward_pass_equals_tffs(model, name, mode, training):
    expected = golden(name)
    for batch in expected.batches:
        found = model.forward_pass(expected.weights(), expected.batch(batch), training=training)
        assert type(found) is BatchOutput
        assert_same(found, expected.get(f"{batch}forward_{mode}", "forward_output"))


# Gradients before BatchNormalization, and those of a key bias, are zero but for rounding. So the scale is that of the
# largest gradient of the model. Measured with TFF's 53 models: at most 1.3e-6.
GRADIENT_RELATIVE = 3e-6


def assert_gradients(found: Any, expected: list[Any]) -> None:
    scale = max(np.abs(one).max(initial=0) for one in expected)
    for one, other in zip(trees.flatten(found)[1], expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_allclose(one, other, rtol=0, atol=GRADIENT_RELATIVE * scale)


@cases()
def test_gradients_equal_tffs(model, name):
    expected = golden(name)
    for batch in expected.batches:
        if f"{batch}grad" not in expected:
            continue
        weights = expected.weights()
        _, found = model.forward_backward(weights, expected.batch(batch), training=True)
        places = range(len(trees.flatten(weights[0])[1]))
        assert_gradients(found, [expected.array(f"{batch}grad/trainable/{place}") for place in places])


@cases(lambda model: "sgd" in model)
def test_gradient_descent_equals_tffs(model, name):
    expected = golden(name)
    rule = expected.manifest["sgd"]
    trainable, non_trainable = expected.weights("initial_weights")
    tree, leaves = trees.flatten(trainable)
    losses = []
    for step in range(rule["steps"]):
        batch = expected.batch(expected.batches[step % len(expected.batches)])
        output, found = model.forward_backward((tree.unflatten(leaves), non_trainable), batch, training=True)
        losses.append(output.loss)
        gradients = trees.flatten(found)[1]
        leaves = [one - np.float32(rule["lr"]) * gradient for one, gradient in zip(leaves, gradients, strict=True)]
    np.testing.assert_allclose(losses, expected.array("sgd/loss"), rtol=1e-5)
    assert_gradients(leaves, [expected.array(f"sgd/trainable/{place}") for place in range(len(leaves))])


def metrics_of(model, expected: Golden) -> None:
    """Metrics over all batches, each state and each result beside TFF's."""
    state = model.initialize_metrics_state()
    states = [state]
    for batch in expected.batches:
        x, y = expected.batch(batch)
        output = model.forward_pass(expected.weights(), (x, y), training=False)
        state = model.update_metrics_state(state, y, output)
        states.append(state)
    for index, found in enumerate(states):
        assert_same(tuple_states(found), tuple_states(expected.get(f"metrics_state/{index}", "metrics_state")))
        assert_same(model.finalize_metrics(found), expected.get(f"finalized/{index}", "finalized"))


def tuple_states(state: Any) -> Any:
    # What TFF saves of a list is a tuple: its file does not keep the difference.
    return collections.OrderedDict((name, tuple(values)) for name, values in state.items())


@cases(lambda model: model.manifest["metrics_in_saved_model"])
def test_saved_metrics_equal_tffs(model, name):
    metrics_of(model, golden(name))


def test_keras_metrics_beside_a_model_equal_those_it_had_before_it_was_saved(client):
    metrics_of(client.model("emnist_with_metrics"), golden("keras_cnn_emnist"))


@cases(lambda model: not model.manifest["metrics_in_saved_model"])
def test_the_description_of_a_model_without_metrics_says_how_to_name_some(model, name):
    with pytest.raises(errors.FunctionNotAvailable, match=r"no TFF release saves metrics.*forwardpass\.json"):
        model.initialize_metrics_state()


@cases(lambda model: "sample_weight" in model)
def test_a_sample_weight_is_refused_if_tff_saved_no_weighted_function(model, name):
    expected = golden(name)
    output = expected.get("predict_infer", "predict_output")
    with pytest.raises(errors.FunctionNotAvailable, match="TFF saves this function without sample_weight"):
        model.loss(output, expected.batch("")[1], expected.array("sample_weight"))


def test_the_golden_models_cover_each_format():
    assert len(NAMES) == 10
    formats = {golden(name).manifest["format"] for name in NAMES}
    assert formats == {"v052", "v087", "head"}
