"""Keras models as people train them, served from their files and from our export, equal to local Keras."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

import forwardpass_client
from forwardpass.wire import trees
from forwardpass_server import functional_model_from_keras, save_functional_model
from support import keras_zoo
from support.servers import ServerProcess

EXAMPLES = 6
CALLERS = 8

FILE, EXPORT = 1, 2
"""Versions: a `.keras` file, and the export of the same model."""


def _json_spec(spec: Any) -> Any:
    if isinstance(spec, dict):
        return {name: _json_spec(item) for name, item in spec.items()}
    return {"dtype": spec.dtype.name, "shape": spec.shape.as_list()}


def _write(folder: pathlib.Path, name: str) -> None:
    entry = keras_zoo.ENTRIES[name]
    model = entry.model()
    version = folder / name / str(FILE)
    version.mkdir(parents=True)
    model.save(version / "model.keras")
    # Losses and metrics are in the file: it is compiled.
    config = {
        "input_spec": dict(zip("xy", map(_json_spec, entry.input_spec), strict=True)),
        "sample_weight_spec": _json_spec(entry.sample_weight_spec),
        # No test of this module trains, and a load prepares several optimizers by default.
        "optimizers": [],
    }
    (version / "forwardpass.json").write_text(json.dumps(config))
    if not entry.has_tables:
        compiled = entry.compile()
        functional = functional_model_from_keras(
            model,
            compiled["loss"],
            entry.input_spec,
            compiled["metrics"],
            loss_weights=compiled.get("loss_weights"),
            # As in `compile`: `metrics` do not count sample weights.
            weighted_metrics=[],
            sample_weight_spec=entry.sample_weight_spec,
        )
        save_functional_model(functional, folder / name / str(EXPORT))
        (folder / name / str(EXPORT) / "forwardpass.json").write_text('{"optimizers": []}')


class Pair(NamedTuple):
    """A remote model, the same model in local Keras, the weights of both, and a batch."""

    remote: Any
    local: keras.Model
    weights: Any
    x: Any
    y: Any
    sample_weight: Any
    tolerance: float

    @property
    def tensors(self) -> Any:
        return tf.nest.map_structure(tf.convert_to_tensor, self.x)

    def assert_close(self, found: Any, local: Any) -> None:
        found_leaves, local_leaves = (trees.flatten(one)[1] for one in (found, local))
        for one, other in zip(map(np.asarray, found_leaves), map(np.asarray, local_leaves), strict=True):
            assert one.shape == other.shape
            one, other = one.astype(np.float64), other.astype(np.float64)
            scale = max(float(np.abs(other).max(initial=0)), 1e-6)
            np.testing.assert_allclose(one, other, rtol=0, atol=self.tolerance * scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("zoo")
    for name in keras_zoo.ENTRIES:
        _write(folder, name)
    return folder


@pytest.fixture(scope="module")
def connected(folder: pathlib.Path) -> Iterator[forwardpass_client.Client]:
    with ServerProcess("--model-repository", str(folder)) as server:
        with forwardpass_client.connect(server.address) as client:
            yield client


SERVED = [
    (name, version)
    for name, entry in keras_zoo.ENTRIES.items()
    for version in ((FILE,) if entry.has_tables else (FILE, EXPORT))
]


@pytest.fixture(scope="module", params=SERVED, ids=[f"{name}/{version}" for name, version in SERVED])
def pair(request: pytest.FixtureRequest, connected: forwardpass_client.Client, folder: pathlib.Path) -> Pair:
    name, version = request.param
    entry = keras_zoo.ENTRIES[name]
    remote = connected.model(name, version)
    # Keras does not read the state of an optimizer that has made no step.
    local = keras.saving.load_model(folder / name / str(FILE) / "model.keras", compile=False)
    local.compile(**entry.compile())
    x, y = entry.batch(np.random.default_rng(1), EXAMPLES)
    shape = tf.nest.flatten(y)[0].shape[: entry.weight_rank]
    sample_weight = np.random.default_rng(2).random(shape, np.float32)
    return Pair(remote, local, remote.initial_weights, x, y, sample_weight, entry.tolerance)


@pytest.mark.parametrize("training", [False, True])
def test_predictions_and_loss_of_a_forward_pass_equal_kerass(pair: Pair, training: bool):
    predictions, _, added = pair.local.stateless_call(
        *pair.weights, pair.tensors, training=training, return_losses=True
    )
    loss = pair.local.compute_loss(pair.tensors, pair.y, predictions, training=training)
    # compute_loss adds what the layers collected in the last stateful call: the stateless one's stand here.
    loss += sum(map(tf.reduce_sum, added)) - sum(map(tf.reduce_sum, pair.local.losses))
    pair.assert_close(pair.remote.predict_on_batch(pair.weights, pair.x, training), predictions)
    output = pair.remote.forward_pass(pair.weights, (pair.x, pair.y), training)
    pair.assert_close(output.predictions, predictions)
    pair.assert_close(output.loss, loss)
    assert output.num_examples == EXAMPLES


def _keras_metrics(pair: Pair, batches: int, **options: Any) -> dict[str, float]:
    """What Model.evaluate says, without losses."""
    result = pair.local.evaluate(
        pair.tensors, pair.y, batch_size=EXAMPLES // batches, verbose=0, return_dict=True, **options
    )
    return {name: value for name, value in sorted(result.items()) if not name.endswith("loss")}


def _slices(pair: Pair, batches: int, *more: Any) -> list[tuple[Any, ...]]:
    size = EXAMPLES // batches
    starts = range(0, EXAMPLES, size)
    return [_rows((pair.x, pair.y, *more), slice(start, start + size)) for start in starts]


def _rows(structure: Any, rows: slice) -> Any:
    return tf.nest.map_structure(lambda array: array[rows], structure)


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_equal_those_of_evaluate(pair: Pair, weighted: bool):
    more = (pair.sample_weight,) if weighted else ()
    expected = _keras_metrics(pair, 2, **({"sample_weight": pair.sample_weight} if weighted else {}))
    batches = _slices(pair, 2, *more)
    remote, handle = pair.remote, pair.remote.put_weights(pair.weights)

    found = remote.evaluate(handle, batches)
    assert sorted(found) == list(expected)
    pair.assert_close([found[name] for name in expected], list(expected.values()))

    with remote.metrics_session() as session:
        for x, y, *w in batches:
            output = remote.forward_pass(handle, (x, y), training=False)
            session.update(y, output, *w)
        pair.assert_close([session.result()[name] for name in expected], list(expected.values()))

    state = remote.initialize_metrics_state()
    for x, y, *w in batches:
        output = remote.forward_pass(pair.weights, (x, y), training=False)
        state = remote.update_metrics_state(state, y, output, *w)
    by_value = remote.finalize_metrics(state)
    pair.assert_close([by_value[name] for name in expected], list(expected.values()))


def test_the_loss_of_predictions_equals_that_of_a_forward_pass(pair: Pair):
    output = pair.remote.forward_pass(pair.weights, (pair.x, pair.y), training=False)
    loss = pair.remote.loss(output.predictions, pair.y)
    penalty = sum(float(tf.reduce_sum(one)) for one in pair.local.losses)
    pair.assert_close(loss + penalty, output.loss)


def test_a_weighted_loss_equals_kerass(pair: Pair):
    predictions = pair.local(pair.tensors, training=False)
    penalty = sum(float(tf.reduce_sum(one)) for one in pair.local.losses)
    expected = pair.local.compute_loss(pair.tensors, pair.y, predictions, sample_weight=pair.sample_weight)
    output = pair.remote.forward_pass(pair.weights, (pair.x, pair.y), training=False)
    loss = pair.remote.loss(output.predictions, pair.y, pair.sample_weight)
    pair.assert_close(loss + penalty, expected)


def test_each_concurrent_caller_gets_its_own_results(pair: Pair):
    handle = pair.remote.put_weights(pair.weights)
    name = pair.remote.description.identity.name
    batches = [keras_zoo.ENTRIES[name].batch(np.random.default_rng(10 + caller), 3) for caller in range(CALLERS)]
    expected = [pair.local(tf.nest.map_structure(tf.convert_to_tensor, x), training=False) for x, _ in batches]

    def call(index: int) -> None:
        for _ in range(5):
            output = pair.remote.forward_pass(handle, batches[index], training=False)
            pair.assert_close(output.predictions, expected[index])

    with concurrent.futures.ThreadPoolExecutor(CALLERS) as pool:
        for done in [pool.submit(call, index) for index in range(CALLERS)]:
            done.result()
