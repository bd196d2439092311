"""Decisions about calls with different weights: one by one, or as one computation."""

from __future__ import annotations

import asyncio
import types

import numpy as np
import pytest

from forwardpass.wire.description import Vectorization
from forwardpass.wire.manifests import WeightsManifest, of_tensor
from forwardpass.wire.trees import LEAF, Kind, TreeDef
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.calls.batching import Batcher
from forwardpass_server.calls.model import CannotVectorize
from forwardpass_server.calls.scheduling import CallTimes, Estimates, Scheduler
from forwardpass_server.calls.vectorizing import Vectorizer
from forwardpass_server.weights.stacks import FittedWeights
from forwardpass_server.weights.store import StoreOptions, WeightStore

SHAPES = ((1, 3),)
SHARED = np.ones(3, np.float32)


class Device:
    def place(self, array):
        return array

    def fetch(self, placed):
        return placed


class Observer:
    def __init__(self):
        self.stacked = []

    def __getattr__(self, name):
        return lambda *arguments: None

    def stacked_sets(self, sets):
        self.stacked.append(sets)


class Adding:
    """A model that adds two weights to x, and its computation for several sets."""

    def __init__(self, difference: float = 0.0, allows_rounding: bool = False, error: float = 0.0):
        self.difference = difference
        self.error = error
        self.stacks = 0
        self.plan = types.SimpleNamespace(run=self.run_one, estimates=Estimates())
        vectorization = Vectorization("", difference, allows_rounding)
        self.description = types.SimpleNamespace(vectorization=vectorization, identity="adding/1")
        self.prepared = []

    def stack_for(self, differing):
        self.prepared.append(tuple(differing))
        if tuple(differing) == (True, False):
            raise CannotVectorize("this leaf")
        self.differing = differing
        return self

    def run_one(self, leaves):
        first, second, x = leaves
        if (x < 0).any():
            raise ValueError("negative")
        return [x + first + second]

    def stack(self, sets):
        self.stacks += 1
        return [
            np.stack(leaves)[:, np.newaxis] if differs else leaves[0]
            for leaves, differs in zip(zip(*sets, strict=True), self.differing, strict=True)
        ]

    def run(self, weights, x):
        first, second = weights
        if (x[0] < 0).any():
            raise ValueError("negative")
        return [x[0] + first + second + np.float32(self.error)]


def model_of(adding: Adding):
    return types.SimpleNamespace(
        description=adding.description, stack=adding.stack_for, has_loops=lambda function, training: False
    )


def store(budget_bytes: int = 2**20) -> WeightStore:
    return WeightStore(StoreOptions(budget_bytes=budget_bytes), Device(), Observer())


def weights(count: int) -> list[FittedWeights]:
    """Sets that share their first leaf."""
    return [FittedWeights([SHARED, np.full(3, index, np.float32)]) for index in range(count)]


async def prepared(vectorizer: Vectorizer, sets, **options):
    """What is chosen, once the computation is prepared. The first choice asks for the preparation."""
    assert vectorizer.choose(sets, SHAPES, **{"allow_rounding": False, **options}) is None
    for _ in range(200):
        chosen = vectorizer.choose(sets, SHAPES, **{"allow_rounding": False, **options})
        if chosen is not None:
            return chosen
        await asyncio.sleep(0.01)
    return None


def after_trials(vectorizer: Vectorizer, together, one_by_one_s: float, seconds: float, is_equal: bool = True) -> None:
    """Three trials. A computation takes `seconds` without the copies."""
    for _ in range(3):
        together.compute([np.zeros((len(together.sets), 1, 3), np.float32)])
        vectorizer.tried(together, one_by_one_s, seconds + together.copied_s, is_equal)


def test_one_computation_is_tried_and_then_used_where_it_is_faster():
    async def scenario():
        adding = Adding()
        vectorizer, sets = Vectorizer(model_of(adding), store()), weights(4)
        together = await prepared(vectorizer, sets)
        assert together.is_trial
        assert adding.prepared == [(False, True)]
        after_trials(vectorizer, together, one_by_one_s=0.002, seconds=0.0002)
        chosen = vectorizer.choose(sets, SHAPES, False)
        assert not chosen.is_trial
        # Another number of sets, or another size, is another kind of group. Trials take at most 5 % of the time.
        await asyncio.sleep(0.1)
        assert vectorizer.choose(weights(64), SHAPES, False).is_trial
        assert vectorizer.choose(sets, ((20, 3),), False) is None, "there is a trial already"

    asyncio.run(scenario())


def test_calls_run_one_by_one_where_that_is_faster_and_trials_are_rare():
    async def scenario():
        vectorizer, sets = Vectorizer(model_of(Adding()), store()), weights(4)
        after_trials(vectorizer, await prepared(vectorizer, sets), one_by_one_s=1.0, seconds=0.95)
        assert vectorizer.choose(sets, SHAPES, False) is None

    asyncio.run(scenario())


def test_sets_that_are_the_same_are_not_computed_together():
    vectorizer = Vectorizer(model_of(Adding()), store())
    (one,) = weights(1)
    assert vectorizer.choose([one, one], SHAPES, True) is None


def test_empty_batches_are_not_computed_together():
    adding = Adding()
    vectorizer = Vectorizer(model_of(adding), store())
    assert vectorizer.choose(weights(2), ((0, 3),), True) is None
    assert adding.prepared == []


def test_what_cannot_be_vectorized_is_asked_for_once():
    async def scenario():
        adding = Adding()
        vectorizer = Vectorizer(model_of(adding), store())
        sets = [FittedWeights([np.full(3, index, np.float32), SHARED]) for index in range(2)]
        assert await prepared(vectorizer, sets) is None
        assert adding.prepared == [(True, False)]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "difference, model_allows, call_allows, expected",
    [
        (0.0, False, False, True),
        (1e-7, False, False, False),
        (1e-7, False, True, True),
        (1e-7, True, False, True),
    ],
)
def test_rounding_needs_a_permission(difference, model_allows, call_allows, expected):
    vectorizer = Vectorizer(model_of(Adding(difference, model_allows)), store())
    assert vectorizer.may(call_allows) is expected


def test_other_bits_in_a_trial_forbid_one_computation_to_calls_that_do_not_allow_rounding(caplog):
    async def scenario():
        vectorizer, sets = Vectorizer(model_of(Adding()), store()), weights(4)
        together = await prepared(vectorizer, sets)
        after_trials(vectorizer, together, one_by_one_s=1.0, seconds=0.1, is_equal=False)
        assert vectorizer.choose(sets, SHAPES, False) is None
        assert vectorizer.choose(sets, SHAPES, True) is not None
        assert caplog.text.count("had other bits") == 1

    asyncio.run(scenario())


def test_the_stack_of_sets_that_come_again_is_kept_and_counts_once():
    async def scenario():
        adding, weight_store = Adding(), store()
        vectorizer, sets = Vectorizer(model_of(adding), weight_store), weights(4)
        together = await prepared(vectorizer, sets)
        after_trials(vectorizer, together, one_by_one_s=1.0, seconds=0.1)
        assert adding.stacks == 1
        # Only the leaf that differs is copied.
        assert weight_store.stacks_bytes == 4 * 12
        again = vectorizer.choose(sets, SHAPES, False)
        again.compute([np.zeros((4, 1, 3), np.float32)])
        assert adding.stacks == 1

    asyncio.run(scenario())


def test_sets_whose_stack_is_large_run_one_by_one():
    async def scenario():
        vectorizer = Vectorizer(model_of(Adding()), store(budget_bytes=8 * 48 - 1))
        assert await prepared(vectorizer, weights(4)) is None

    asyncio.run(scenario())


def test_stacks_are_dropped_before_any_set_and_with_their_sets():
    async def scenario():
        weight_store = store(budget_bytes=100)
        tree = TreeDef(Kind.TUPLE, (TreeDef(Kind.TUPLE, (LEAF,)), TreeDef(Kind.TUPLE)))

        async def put(number: int) -> bytes:
            array = np.full(10, number, np.float32)
            manifest = WeightsManifest(tree, (of_tensor(array),))
            await weight_store.put("", manifest)
            await weight_store.upload("", manifest.tensors[0].digest, 0, memoryview(array.tobytes()))
            await weight_store.put("", manifest)
            return manifest.weights_id

        first = await put(1)
        async with weight_store.use("", first) as held:
            spec = types.SimpleNamespace()
            fitted = held.fitted.setdefault(b"model", FittedWeights([held.leaf(0)]))
            assert held.leaves(b"model", spec) is fitted
        weight_store.keep_stack((fitted.number, -1), ["stack"], 60)
        assert weight_store.stacks_bytes == 60
        await put(2)
        assert (weight_store.set_count, weight_store.stacks_bytes) == (2, 0)
        weight_store.keep_stack((fitted.number, -1), ["stack"], 20)
        assert weight_store.stack_of((fitted.number, -1)) == ["stack"]
        await weight_store.delete("", first)
        assert weight_store.stack_of((fitted.number, -1)) is None
        assert weight_store.stacks_bytes == 0
        # A stack that does not fit beside the sets is not kept.
        weight_store.keep_stack((-2, -3), ["stack"], 70)
        assert weight_store.stacks_bytes == 0

    asyncio.run(scenario())


def run_batches(adding: Adding, scenario):
    async def main():
        scheduler, observer = Scheduler(2), Observer()
        try:
            batcher = Batcher(scheduler, Arrivals(), observer, 100)
            vectorizer = Vectorizer(model_of(adding), store())

            async def together(sets, values, *, joins=True):
                calls = [
                    batcher.predict(
                        adding.plan,
                        one,
                        [np.full((1, 3), value, np.float32)],
                        100,
                        CallTimes(),
                        vectorizer,
                        joins=joins,
                    )
                    for one, value in zip(sets, values, strict=True)
                ]
                return await asyncio.gather(*calls, return_exceptions=True)

            await scenario(together, observer)
        finally:
            await scheduler.close(10)

    asyncio.run(main())


@pytest.mark.parametrize("joins", [True, False])
def test_each_call_of_a_computation_gets_the_results_of_its_own_weights(joins):
    async def scenario(together, observer):
        sets = weights(5)
        # Two calls with the same weights are among them.
        used = [*sets, sets[2], sets[2]]
        for step in range(100):
            found = await together(used, range(step, step + 7), joins=joins)
            for index, (results, (first, second)) in enumerate(zip(found, used, strict=True)):
                np.testing.assert_array_equal(results[0], np.full((1, 3), step + index) + first + second)
            await asyncio.sleep(0.005)
        assert observer.stacked

    run_batches(Adding(), scenario)


def test_a_call_that_fails_fails_alone():
    async def scenario(together, observer):
        sets = weights(5)
        for step in range(60):
            values = [1, 2, 3, -1 if step % 2 else 4, 5]
            found = await together(sets, values)
            for index, results in enumerate(found):
                if values[index] < 0:
                    assert isinstance(results, ValueError)
                else:
                    np.testing.assert_array_equal(results[0], np.full((1, 3), values[index] + 1 + index))
            await asyncio.sleep(0.005)
        assert observer.stacked

    run_batches(Adding(), scenario)


def test_a_computation_with_other_bits_never_answers_a_call_that_does_not_allow_rounding():
    async def scenario(together, observer):
        sets = weights(5)
        for _ in range(60):
            for index, results in enumerate(await together(sets, range(5))):
                np.testing.assert_array_equal(results[0], np.full((1, 3), 2 * index + 1))
            await asyncio.sleep(0.005)
        assert observer.stacked  # It was tried.

    run_batches(Adding(error=1e-3), scenario)
