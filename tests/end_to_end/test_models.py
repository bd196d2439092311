"""Models of every other kind, served and called, beside the same models run here."""

from __future__ import annotations

import asyncio
import collections
import inspect
from typing import Any

import numpy as np
import pytest

import forwardpass_client
from forwardpass.wire import trees
from forwardpass_server import FunctionalModel
from forwardpass_server.models import formats
from support import zoo


def assert_same(found: Any, local: Any) -> None:
    """The containers, dtypes and shapes of the local result, and its numbers but for float32's last bits.

    The server composes and fuses graphs that run one by one here, and so sums in another order.
    """
    found_tree, found_leaves = trees.flatten(found)
    local_tree, local_leaves = trees.flatten(local)
    assert found_tree == local_tree
    for one, other in zip(found_leaves, map(np.asarray, local_leaves), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.fixture(params=["structures", "keras_cnn/1", "keras_cnn/2"])
def pair(request, client, repository) -> tuple[Any, FunctionalModel, Any]:
    """A remote model, the same model here, and a batch for it."""
    name, _, version = request.param.partition("/")
    remote = client.model(name, int(version) if version else None)
    if name == "structures":
        x, y = zoo.structures_batch(5)
        return remote, zoo.structures(), {"x": x, "y": y}
    local, *_ = formats.read(repository / name / version)
    return remote, local, zoo.keras_batch(5)


@pytest.mark.parametrize("training", [True, False])
def test_predictions_and_forward_pass_equal_the_local_models(pair, training):
    remote, local, batch = pair
    weights = local.initial_weights
    x = batch["x"] if isinstance(batch, dict) else batch[0]
    assert_same(remote.predict_on_batch(weights, x, training), local.predict_on_batch(weights, x, training))
    assert_same(remote.forward_pass(weights, batch, training), local.forward_pass(weights, batch, training))


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_metrics_equal_the_local_models(pair, weighted):
    remote, local, batch = pair
    weights = local.initial_weights
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    weight = np.float32([0, 1, 2, 3, 4]) if weighted else None
    predictions = local.predict_on_batch(weights, x, False)
    assert_same(remote.loss(predictions, y, weight), local.loss(predictions, y, weight))
    state = remote.initialize_metrics_state()
    assert_same(state, local.initialize_metrics_state())
    output = local.forward_pass(weights, batch, False)
    updated = remote.update_metrics_state(state, y, output, weight)
    assert_same(updated, local.update_metrics_state(state, y, output, weight))
    assert_same(remote.finalize_metrics(updated), local.finalize_metrics(updated))


def test_training_is_the_default_and_may_be_positional_or_0_or_1(pair):
    remote, local, batch = pair
    weights = local.initial_weights
    default = remote.forward_pass(weights, batch)
    for arguments in ([True], [1], [np.bool_(True)]):
        assert_same(remote.forward_pass(weights, batch, *arguments), default)
    assert_same(remote.forward_pass(weights, batch, 0), remote.forward_pass(weights, batch, training=False))


def test_initial_weights_and_input_spec_equal_the_local_models(pair):
    remote, local, _ = pair
    assert_same(remote.initial_weights, local.initial_weights)
    found_tree, found = trees.flatten(remote.input_spec, is_leaf=lambda node: hasattr(node, "dtype"))
    local_tree, expected = trees.flatten(local.input_spec, is_leaf=lambda node: hasattr(node, "dtype"))
    assert found_tree == local_tree
    assert [(leaf.shape, leaf.dtype) for leaf in found] == [
        (tuple(leaf.shape.as_list()), leaf.dtype.as_numpy_dtype) for leaf in expected
    ]


@pytest.mark.parametrize(
    "name", ["predict_on_batch", "loss", "update_metrics_state", "finalize_metrics", "forward_pass"]
)
@pytest.mark.parametrize(
    "remote", [forwardpass_client.RemoteFunctionalModel, forwardpass_client.AsyncRemoteFunctionalModel]
)
def test_methods_have_the_originals_arguments_and_defaults(remote, name):
    original = getattr(FunctionalModel, name)
    expected = inspect.signature(getattr(original, "python_function", original)).parameters
    found = inspect.signature(getattr(remote, name)).parameters
    shared = list(found.values())[: len(expected)]
    assert [(one.name, one.default, one.kind) for one in shared] == [
        (other.name, other.default, other.kind) for other in expected.values()
    ]
    # What is more than the original has comes by keyword alone.
    assert all(more.kind is more.KEYWORD_ONLY for more in list(found.values())[len(expected) :])


def test_every_dtype_is_encoded_and_decoded_unchanged(client):
    model = client.model("every_dtype")
    values = {
        "string": np.array([b"a\x00b", b""], object),
        "bool": np.array([True, False]),
        "complex64": np.complex64([1 + 2j, np.nan]),
        "complex128": np.complex128([1 + 2j, 3]),
    }
    x = collections.OrderedDict(
        (name, values.get(name, np.array([0, 1], spec.dtype))) for name, spec in model.input_spec[0].items()
    )
    found = model.predict_on_batch(model.initial_weights, x, training=False)
    assert list(found) == zoo.DTYPES
    for name in zoo.DTYPES:
        assert found[name].dtype == x[name].dtype
        assert found[name].tolist() == x[name].tolist() or name == "complex64"
    assert np.array_equal(found["complex64"], x["complex64"], equal_nan=True)


def test_results_are_read_only_and_aligned(client):
    model = client.model("every_dtype")
    x = {
        name: np.zeros(3, spec.dtype) if name != "string" else [b"", b"a", b"bc"]
        for name, spec in model.input_spec[0].items()
    }
    for array in model.predict_on_batch(model.initial_weights, x).values():
        assert not array.flags.writeable
        assert array.flags.aligned


def test_weights_can_be_lists_numbers_and_tensors(client):
    import tensorflow as tf

    model = client.model("structures")
    x, _ = zoo.structures_batch(2)
    (kernel, _), (offset,) = weights = model.initial_weights
    variants = [
        [[{"w": kernel["w"].tolist()}, (2, 0.5)], (offset.tolist(),)],
        (({"w": tf.constant(kernel["w"])}, [tf.Variable(2.0), np.float64(0.5)]), [offset.astype(np.float64)]),
        (({"w": np.asfortranarray(kernel["w"])}, [2.0, 0.5]), [np.repeat(offset, 2)[::2]]),
    ]
    expected = model.predict_on_batch(weights, x, training=False)
    for variant in variants:
        assert_same(model.predict_on_batch(variant, x, training=False), expected)


def test_a_batch_may_be_a_pair_a_list_or_a_mapping(client):
    model = client.model("keras_cnn")
    x, y = zoo.keras_batch(3)
    expected = model.forward_pass(model.initial_weights, (x, y))
    for batch in ([x, y], {"x": x, "y": y}, collections.OrderedDict(y=y, x=x)):
        assert_same(model.forward_pass(model.initial_weights, batch), expected)


def test_nan_and_infinity_are_encoded_and_decoded_unchanged(client):
    model = client.model("keras_cnn")
    x, y = zoo.keras_batch(3)
    x[1] = np.nan
    output = model.forward_pass(model.initial_weights, (x, y), training=False)
    assert np.isnan(output.loss)
    assert np.isnan(output.predictions[1]).all()
    assert np.isfinite(output.predictions[[0, 2]]).all()


def test_an_empty_batch_has_empty_predictions(client):
    model = client.model("keras_cnn")
    output = model.forward_pass(model.initial_weights, zoo.keras_batch(0), training=False)
    assert output.predictions.shape == (0, 5)
    assert output.num_examples == 0
    # Keras's mean over nothing.
    assert (output.loss, output.loss.shape) == (0, ())


def test_fields_of_the_batch_output_that_no_metric_reads_may_be_none(client):
    model = client.model("keras_cnn")
    x, y = zoo.keras_batch(4)
    output = model.forward_pass(model.initial_weights, (x, y))
    state = model.initialize_metrics_state()
    expected = model.update_metrics_state(state, y, output)
    only = forwardpass_client.BatchOutput(predictions=output.predictions)
    assert_same(model.update_metrics_state(state, y, only), expected)


def test_the_async_client_gives_what_the_sync_one_gives(server, client):
    model = client.model("keras_cnn", version=2)
    x, y = zoo.keras_batch(4)

    async def call_all() -> list[Any]:
        async with forwardpass_client.connect_async(server.address) as connected:
            await connected.wait_until_ready()
            remote = await connected.model("keras_cnn", version=2)
            weights = await remote.initial_weights
            output = await remote.forward_pass(weights, (x, y), training=False)
            state = await remote.initialize_metrics_state()
            state = await remote.update_metrics_state(state, y, output)
            return [
                weights,
                output,
                await remote.predict_on_batch(weights, x),
                await remote.loss(output.predictions, y, np.float32([1, 2, 3, 4])),
                state,
                await remote.finalize_metrics(state),
                [found.name for found in await connected.models()],
            ]

    output = model.forward_pass(model.initial_weights, (x, y), training=False)
    state = model.update_metrics_state(model.initialize_metrics_state(), y, output)
    expected = [
        model.initial_weights,
        output,
        model.predict_on_batch(model.initial_weights, x),
        model.loss(output.predictions, y, np.float32([1, 2, 3, 4])),
        state,
        model.finalize_metrics(state),
        [found.name for found in client.models()],
    ]
    *found, names = asyncio.run(call_all())
    *expected, expected_names = expected
    assert names == expected_names
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_the_highest_version_is_the_default(client):
    assert client.model("keras_cnn").version == 2
    assert [version.version for version in client.model("keras_cnn", 1).versions] == [1, 2]


def test_versions_of_a_model_differ(client):
    first, second = client.model("keras_cnn", 1), client.model("keras_cnn", 2)
    assert first.content_hash != second.content_hash
    x, _ = zoo.keras_batch(2)
    one, other = (model.predict_on_batch(model.initial_weights, x, training=False) for model in (first, second))
    assert not np.allclose(one, other)


def test_every_model_is_listed_with_its_state(client):
    listed = {(found.name, found.version): found for found in client.models()}
    assert listed["keras_cnn", 2].state == "available"
    assert listed["keras_cnn", 2].content_hash == client.model("keras_cnn", 2).content_hash
    assert listed["broken", 1].state == "failed"
    assert "expected a saved_model.pb or one .keras file, found ['notes.txt']" in listed["broken", 1].error
    assert {found.state for found in listed.values()} == {"available", "failed"}
