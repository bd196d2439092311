"""Gradients through the wire: forward_backward and vjp, by value and by id, on pipelines and for asyncio."""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import forwardpass_client
from forwardpass.wire import trees
from forwardpass_client import errors
from forwardpass_server.models.functional import FunctionalModel
from forwardpass_server.models.keras_models import functional_model_from_keras
from support.servers import ServerProcess

# Relative to the largest number of an array: the same kernels in another graph may sum in another order.
RELATIVE = 1e-6


def assert_close(found: Any, expected: Any) -> None:
    """The same containers, dtypes and shapes, and numbers equal up to rounding."""
    found_tree, found_leaves = trees.flatten(found)
    expected_tree, expected_leaves = trees.flatten(expected)
    assert found_tree == expected_tree
    for path, one, other in zip(
        found_tree.paths("result"), found_leaves, map(np.asarray, expected_leaves), strict=True
    ):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        scale = np.abs(other).max(initial=0)
        np.testing.assert_allclose(one, other, rtol=0, atol=RELATIVE * scale, err_msg=path)


def of_all_kinds() -> FunctionalModel:
    """Weights of several dtypes in nested containers, two inputs, two losses, and a weight that nothing reads."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        trainable, (offset,) = model_weights
        rows = tf.gather(trainable["table"], x["index"])
        wide = tf.cast(x["value"] @ trainable["nested"][0], tf.float64) * trainable["nested"][1]
        scale = 2.0 if training else 1.0
        return collections.OrderedDict(
            sum=rows + tf.cast(wide, tf.float32) * scale + offset, index=tf.argmax(rows, axis=1)
        )

    def loss(output: Any, label: Any, sample_weight: Any = None) -> Any:
        squares = tf.reduce_sum((output["sum"] - label) ** 2, axis=1)
        weights = tf.ones_like(squares) if sample_weight is None else sample_weight
        return {"mean": tf.reduce_mean(weights * squares), "largest": tf.reduce_max(weights * squares)}

    rng = np.random.default_rng(0)
    trainable = {
        "table": rng.standard_normal((5, 3)).astype(np.float32),
        "steps": np.int32(3),
        "nested": [rng.standard_normal((2, 3)).astype(np.float32), rng.standard_normal(3)],
        "unread": np.float32([1, 2]),
    }
    return FunctionalModel(
        initial_weights=(trainable, (np.float32(0.5),)),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss,
        input_spec=(
            {"index": tf.TensorSpec([None], tf.int32), "value": tf.TensorSpec([None, 2], tf.float32)},
            tf.TensorSpec([None, 3], tf.float32),
        ),
    )


def batch_of_all_kinds(examples: int = 4) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    index = np.arange(examples, dtype=np.int32) % 5
    x = {"index": index, "value": rng.standard_normal((examples, 2)).astype(np.float32)}
    return x, rng.standard_normal((examples, 3)).astype(np.float32)


def keras_network() -> keras.Model:
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(4, 3, kernel_regularizer="l2"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3),
        ]
    )


def keras_spec() -> Any:
    return tf.TensorSpec([None, 6, 6, 1], tf.float32), tf.TensorSpec([None], tf.int64)


def in_keras() -> FunctionalModel:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return functional_model_from_keras(keras_network(), loss, keras_spec(), ["accuracy"])


def keras_batch(examples: int = 8) -> tuple[Any, Any]:
    rng = np.random.default_rng(2)
    return rng.standard_normal((examples, 6, 6, 1)).astype(np.float32), rng.integers(0, 3, examples)


def _scalar(predict: Any) -> FunctionalModel:
    return FunctionalModel(
        initial_weights=((np.float32(2),), ()),
        predict_on_batch_fn=tf.function(lambda model_weights, x, training: predict(model_weights[0][0], x)),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output),
        input_spec=(tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


def calling_numpy() -> FunctionalModel:
    return _scalar(
        lambda weight, x: tf.ensure_shape(tf.numpy_function(lambda w, x: w * x, [weight, x], tf.float32), [None])
    )


def calling_python() -> FunctionalModel:
    return _scalar(
        lambda weight, x: tf.ensure_shape(tf.py_function(lambda w, x: w * w * x, [weight, x], tf.float32), [None])
    )


def without_derivative() -> FunctionalModel:
    return _scalar(lambda weight, x: x + tf.floor(tf.stop_gradient(weight)))


MODELS = ("of_all_kinds", "in_keras", "calling_numpy", "calling_python", "without_derivative")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    factories = [argument for name in MODELS for argument in ("--factory", f"{name}=end_to_end.test_gradients:{name}")]
    with ServerProcess(*factories) as process:
        yield process


@pytest.fixture
def client(server) -> Iterator[forwardpass_client.Client]:
    with forwardpass_client.connect(server.address) as connected:
        yield connected


def local_gradients(model: FunctionalModel, weights: Any, batch: Any, training: bool, sample_weight: Any = None) -> Any:
    """TensorFlow's, by an eager tape over the model's own functions."""
    tensors = tf.nest.map_structure(tf.constant, weights)
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        x, y = batch
        loss = model.loss(model.predict_on_batch(tensors, x, training), y, sample_weight)
    return tape.gradient(loss, tensors[0], unconnected_gradients=tf.UnconnectedGradients.ZERO)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_have_the_structure_of_the_weights(client, training, weighted):
    local, model = of_all_kinds(), client.model("of_all_kinds")
    weights, batch = model.initial_weights, batch_of_all_kinds()
    sample_weight = np.float32([1, 0, 2, 0.5]) if weighted else None
    output, found = model.forward_backward(weights, batch, training, sample_weight=sample_weight)
    expected = local_gradients(local, weights, batch, training, sample_weight)
    assert found["steps"] is None
    expected["steps"] = None
    assert_close(found, tf.nest.map_structure(lambda one: None if one is None else tf.convert_to_tensor(one), expected))
    assert np.array_equal(found["unread"], [0, 0])
    if not weighted:
        assert_close(output, model.forward_pass(weights, batch, training))


def test_the_description_names_weights_that_the_loss_does_not_reach(client):
    description = client.model("of_all_kinds").description
    assert description.unreached_weights == ("model_weights.trainable['unread']",)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_keras_model_include_its_regularisers(client, training):
    keras_model, model = keras_network(), client.model("in_keras")
    weights, (x, y) = model.initial_weights, keras_batch()
    trainable = [tf.constant(one) for one in weights[0]]
    with tf.GradientTape() as tape:
        tape.watch(trainable)
        outputs, _, added = keras_model.stateless_call(
            trainable, list(weights[1]), x, training=training, return_losses=True
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, outputs) + sum(added)
    output, found = model.forward_backward(weights, (x, y), training)
    assert_close(output.loss, loss)
    expected = tape.gradient(loss, trainable)
    largest = max(np.abs(one).max() for one in expected)
    for one, other in zip(found, expected, strict=True):
        # The bias before BatchNormalization has a gradient that is zero but for rounding, so the scale is that of all.
        np.testing.assert_allclose(one, other, rtol=0, atol=RELATIVE * largest)


def test_sample_weights_scale_the_loss_of_keras(client):
    model = client.model("in_keras")
    weights, batch = model.initial_weights, keras_batch()
    _, once = model.forward_backward(weights, batch, False, sample_weight=np.ones(8, np.float32))
    _, plain = model.forward_backward(weights, batch, False)
    _, none = model.forward_backward(weights, batch, False, sample_weight=np.zeros(8, np.float32))
    assert_close(once, plain)
    # The regulariser is left.
    np.testing.assert_allclose(none[0], 2 * 0.01 * np.asarray(weights[0][0]), rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_vjp_equals_tensorflows(client, training):
    local, model = of_all_kinds(), client.model("of_all_kinds")
    weights, (x, _) = model.initial_weights, batch_of_all_kinds()
    cotangent = np.random.default_rng(4).standard_normal((4, 3)).astype(np.float32)
    cotangents = collections.OrderedDict(sum=cotangent, index=None)
    found, x_found = model.vjp(weights, x, cotangents, training)
    trainable, value = tf.nest.map_structure(tf.constant, weights[0]), tf.constant(x["value"])
    with tf.GradientTape() as tape:
        tape.watch([trainable, value])
        output = local.predict_on_batch((trainable, weights[1]), {"index": x["index"], "value": value}, training)
    zero = tf.UnconnectedGradients.ZERO
    expected, x_expected = tape.gradient(output["sum"], [trainable, value], cotangent, unconnected_gradients=zero)
    expected["steps"] = None
    assert_close(found, {name: _dense(one) for name, one in expected.items()})
    assert x_found["index"] is None
    assert_close(x_found["value"], x_expected)


def _dense(gradient: Any) -> Any:
    return tf.nest.map_structure(lambda one: None if one is None else tf.convert_to_tensor(one), gradient)


def test_gradients_by_id_on_pipelines_and_for_asyncio_equal_those_by_value(server, client):
    model = client.model("of_all_kinds")
    weights, batch = model.initial_weights, batch_of_all_kinds()
    cotangents = {"sum": batch[1], "index": None}
    cotangents = collections.OrderedDict(cotangents)
    expected = model.forward_backward(weights, batch)
    products = model.vjp(weights, batch[0], cotangents)
    handle = model.put_weights(weights)
    assert_close(model.forward_backward(handle, batch), expected)
    assert_close(model.vjp(handle, batch[0], cotangents), products)
    with model.pipeline(handle) as pipeline:
        futures = [pipeline.forward_backward(batch), pipeline.vjp(batch[0], cotangents)]
        assert_close(futures[0].result(), expected)
        assert_close(futures[1].result(), products)

    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as connected:
            other = await connected.model("of_all_kinds")
            assert_close(await other.forward_backward(weights, batch), expected)
            assert_close(await other.vjp(weights, batch[0], cotangents), products)
            async with other.pipeline(weights) as pipeline:
                assert_close(await pipeline.forward_backward(batch), expected)
                assert_close(await pipeline.vjp(batch[0], cotangents), products)
                _, kept = await pipeline.forward_backward(batch, keep=True)
            assert_close((await other.get_weights(kept))[0], expected[1])

    asyncio.run(run())


def test_kept_gradients_stay_on_the_server(client):
    model = client.model("of_all_kinds")
    weights, batch = model.initial_weights, batch_of_all_kinds()
    output, expected = model.forward_backward(weights, batch)
    found, handle = model.forward_backward(weights, batch, keep=True)
    assert_close(found, output)
    gradients, unchanged = model.get_weights(handle)
    assert_close(gradients, expected)
    assert unchanged == (None,)
    with model.pipeline(weights) as pipeline:
        assert pipeline.forward_backward(batch, keep=True).result()[1].id == handle.id


def test_gradients_of_an_empty_batch_have_the_shapes_of_the_weights(client):
    model = client.model("in_keras")
    weights, (x, y) = model.initial_weights, keras_batch()
    _, found = model.forward_backward(weights, (x[:0], y[:0]), False)
    assert [one.shape for one in found] == [one.shape for one in weights[0]]


def test_cotangents_of_another_shape_are_refused(client):
    model = client.model("of_all_kinds")
    weights, (x, _) = model.initial_weights, batch_of_all_kinds()
    for shape in ((1, 3), (5, 3), (0, 3)):
        cotangents = collections.OrderedDict(sum=np.zeros(shape, np.float32), index=None)
        with pytest.raises(errors.ModelRefusedInput, match="cotangents must have the shape of the predictions"):
            model.vjp(weights, x, cotangents)
    with pytest.raises(errors.ShapeMismatch, match=r"cotangents\['sum'\]: expected float32\[None,3\]"):
        model.vjp(weights, x, collections.OrderedDict(sum=np.zeros((4, 2), np.float32), index=None))
    with pytest.raises(errors.StructureMismatch, match=r"cotangents\['index'\]: expected None"):
        model.vjp(weights, x, collections.OrderedDict(sum=np.zeros((4, 3), np.float32), index=np.zeros(4, np.int64)))


def test_not_a_number_passes_through(client):
    model = client.model("of_all_kinds")
    weights, (x, y) = model.initial_weights, batch_of_all_kinds()
    _, found = model.forward_backward(weights, (x, np.full_like(y, np.nan)))
    assert np.isnan(found["nested"][0]).all()
    assert not found["unread"].any()


def test_functions_in_python_have_gradients_or_say_why_not(client):
    x = np.float32([1, 2, 3])
    model = client.model("calling_python")
    _, found = model.forward_backward(model.initial_weights, (x, x))
    # The derivative of mean(w * w * x) at w = 2.
    assert_close(found, (np.float32(2 * 2 * 2),))
    for name, reason in (
        ("calling_numpy", "tf.numpy_function, which has no gradient"),
        ("without_derivative", "the loss depends on no trainable weight"),
    ):
        model = client.model(name)
        with pytest.raises(errors.FunctionNotAvailable, match=reason):
            model.forward_backward(model.initial_weights, (x, x))


def test_gradients_that_the_operator_forbids_are_refused(tmp_path):
    folder = tmp_path / "models" / "network" / "1"
    folder.mkdir(parents=True)
    keras_network().save(folder / "model.keras")
    config = {
        "loss": "sparse_categorical_crossentropy",
        "input_spec": {
            "x": {"dtype": "float32", "shape": [None, 6, 6, 1]},
            "y": {"dtype": "int64", "shape": [None]},
        },
        "gradients": False,
    }
    (folder / "forwardpass.json").write_text(json.dumps(config))
    with (
        ServerProcess("--model-repository", str(tmp_path / "models")) as process,
        forwardpass_client.connect(process.address) as connected,
    ):
        model = connected.model("network")
        with pytest.raises(errors.FunctionNotAvailable, match="forward_backward is not available: the operator"):
            model.forward_backward(model.initial_weights, keras_batch())
