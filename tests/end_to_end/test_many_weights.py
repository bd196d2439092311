"""Calls with different weights at the same time: each gets the numbers of its own weights."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest

import forwardpass_client
from support.servers import ServerProcess

CALLERS = 64
CALLS = 10_000

# Of float32 predictions near 1, whatever the order of summation.
TOLERANCE = 1e-5

Weights = tuple[tuple[np.ndarray, ...], tuple[()]]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Any:
    """One network under three names, which say how it is vectorized."""
    folder = tmp_path_factory.mktemp("many")
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [keras.Input((32,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(64, "relu"), keras.layers.Dense(3)]
    )
    x = {"dtype": "float32", "shape": [None, 32]}
    config = {"loss": "mean_squared_error", "input_spec": {"x": x, "y": {"dtype": "float32", "shape": [None, 3]}}}
    for name, vectorize in (("rounding", "rounding"), ("exact", "exact"), ("never", False)):
        version = folder / name / "1"
        version.mkdir(parents=True)
        network.save(version / "model.keras")
        (version / "forwardpass.json").write_text(json.dumps({**config, "vectorize": vectorize}))
    return folder


@pytest.fixture(scope="module")
def server(repository) -> Iterator[ServerProcess]:
    with ServerProcess("--model-repository", str(repository)) as process:
        yield process


def stacked(server: ServerProcess) -> float:
    """How many sets of weights were in computations for several sets."""
    return server.metrics()["forwardpass_stacked_sets_sum"]


def weights_of(initial: Weights, count: int, *, only_last: bool) -> list[Weights]:
    """Sets that differ in all leaves, or in the last layer only."""
    trainable, non_trainable = initial
    rng = np.random.default_rng(0)
    shared = len(trainable) - 2 if only_last else 0
    return [
        (
            (
                *trainable[:shared],
                *(leaf + rng.standard_normal(leaf.shape, np.float32) / 8 for leaf in trainable[shared:]),
            ),
            non_trainable,
        )
        for _ in range(count)
    ]


def predictions(weights: Weights, x: np.ndarray) -> np.ndarray:
    """What the network computes, in float64."""
    values = x.astype(np.float64)
    leaves = [leaf.astype(np.float64) for leaf in weights[0]]
    for index in range(0, len(leaves), 2):
        values = values @ leaves[index] + leaves[index + 1]
        values = np.maximum(values, 0) if index < len(leaves) - 2 else values
    return values


def assert_own(found: Any, weights: Weights, x: np.ndarray) -> None:
    expected = predictions(weights, x)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= TOLERANCE * max(np.abs(expected).max(initial=1), 1)


@pytest.mark.parametrize("only_last", [True, False])
def test_64_callers_with_a_set_each_get_their_own_numbers(server, only_last):
    before = stacked(server)

    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("rounding")
            sets = weights_of(await model.initial_weights, CALLERS, only_last=only_last)
            handles = [await model.put_weights(one) for one in sets]

            async def caller(index: int) -> int:
                rng = np.random.default_rng(index)
                calls = CALLS // CALLERS + 1
                for step in range(calls):
                    # Mostly one row: sets with the same number of rows are computed together.
                    rows = int(rng.integers(0, 4)) if step % 4 == 0 else 1
                    x = rng.standard_normal((rows, 32), np.float32)
                    if step % 5:
                        found = await model.predict_on_batch(handles[index], x, training=False)
                    else:
                        y = np.zeros((rows, 3), np.float32)
                        found = (await model.forward_pass(handles[index], (x, y), training=False)).predictions
                    assert_own(found, sets[index], x)
                return calls

            assert sum(await asyncio.gather(*map(caller, range(CALLERS)))) >= CALLS

    asyncio.run(run())
    assert stacked(server) > before


def rounds(model: Any, handles: list[Any], sets: list[Weights], is_done: Callable[[], bool], **options: Any) -> int:
    """Predicts under each set in one stream, round after round, until it is done. Returns how many predictions."""
    rng = np.random.default_rng(0)
    count = 0
    for _ in range(300):
        xs = [rng.standard_normal((2, 32), np.float32) for _ in sets]
        found = model.predict_each(zip(handles, xs, strict=True), training=False, **options)
        for one, weights, x in zip(found, sets, xs, strict=True):
            assert_own(one, weights, x)
            count += 1
        if is_done():
            break
    return count


def test_predict_each_computes_sets_together(server):
    with forwardpass_client.connect(server.address) as client:
        model = client.model("rounding")
        sets = weights_of(model.initial_weights, 16, only_last=True)
        handles = [model.put_weights(one) for one in sets]
        before = stacked(server)
        rounds(model, handles, sets, lambda: stacked(server) > before + 100)
        assert stacked(server) > before + 100


def test_exact_calls_have_the_bits_of_single_calls_and_others_may_not(server):
    with forwardpass_client.connect(server.address) as client:
        model, alone = client.model("exact"), client.model("never")
        vectorization = model.description.vectorization
        assert not vectorization.unavailable_reason
        assert vectorization.largest_difference > 0, "products of float32 have another order of summation"
        assert "only for calls that allow differences" in str(vectorization)
        assert "the operator forbids it" in str(alone.description.vectorization)
        sets = weights_of(model.initial_weights, 16, only_last=True)
        handles = [model.put_weights(one) for one in sets]
        before = stacked(server)
        for _ in range(50):
            x = np.random.default_rng(0).standard_normal((1, 32), np.float32)
            found = list(model.predict_each(((handle, x) for handle in handles), training=False))
            for one, weights in zip(found, sets, strict=True):
                np.testing.assert_array_equal(one, alone.predict_on_batch(weights, x, training=False))
        assert stacked(server) == before
        rounds(model, handles, sets, lambda: stacked(server) > before, exact=False)
        assert stacked(server) > before


def test_sets_are_evicted_and_leased_while_stacks_are_in_use(repository):
    """The store holds a quarter of the sets, so that stacks and sets come and go. 16 sets have a lease."""
    with (
        ServerProcess("--model-repository", str(repository), "--weights-mib", "1") as server,
        forwardpass_client.connect(server.address) as client,
    ):
        model = client.model("rounding")
        sets = weights_of(model.initial_weights, 96, only_last=False)
        handles = [model.put_weights(one) for one in sets]
        leased = handles[:16]
        for handle in leased:
            model.predict_on_batch(handle, np.zeros((1, 32), np.float32), training=False)
            handle.lease(600)
        before = stacked(server)
        for start in range(0, 96, 4):
            part = slice(start, start + 4)
            rounds(model, handles[part], sets[part], lambda: stacked(server) > before)
        metrics = server.metrics()
        assert metrics["forwardpass_weights_evictions_total"] > 100
        assert metrics["forwardpass_weights_bytes"] <= 2**20
        assert stacked(server) > before
        # The leased ones are still there: a handle without arrays finds them.
        for handle in leased:
            model.predict_on_batch(client.weights_handle(handle.id), np.zeros((1, 32), np.float32), training=False)


def test_a_call_that_the_model_refuses_fails_alone(server):
    """The weights of one caller have the wrong shape for the model: the others get their numbers."""
    with forwardpass_client.connect(server.address) as client:
        model = client.model("rounding")
        sets = weights_of(model.initial_weights, 8, only_last=True)
        handles = [model.put_weights(one) for one in sets]
        missing = client.weights_handle("ab" * 32)
        x = np.ones((1, 32), np.float32)
        for _ in range(20):
            with model.pipeline() as pipeline:
                futures = [pipeline.predict_on_batch(handle, x, training=False) for handle in (*handles, missing)]
                for future, weights in zip(futures, sets, strict=False):
                    assert_own(future.result(), weights, x)
                with pytest.raises(forwardpass_client.errors.WeightsNotFound):
                    futures[-1].result()
