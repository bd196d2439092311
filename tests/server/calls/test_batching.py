"""Calls that wait at the same time, run as one batch."""

from __future__ import annotations

import asyncio
import gc
import threading
import types
import weakref

import numpy as np
import pytest

from forwardpass.wire import errors
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.calls.batching import Batcher
from forwardpass_server.calls.scheduling import CallTimes, Estimates, Scheduler

WEIGHTS = (np.float32(2),)


class Observer:
    def __init__(self):
        self.calls = []
        self.waits = []
        self.sets = []

    def batched_calls(self, calls):
        self.calls.append(calls)

    def stacked_sets(self, sets):
        self.sets.append(sets)

    def batch_wait(self, seconds):
        assert seconds >= 0
        self.waits.append(seconds)


class Doubling:
    """A plan that multiplies x by the weight, refuses negative numbers, and may be held up."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.plan = types.SimpleNamespace(run=self.run, estimates=Estimates())

    def run(self, leaves):
        self.gate.wait(10)
        weight, *x = leaves
        if any((leaf < 0).any() for leaf in x):
            raise errors.ModelRefusedInput("negative")
        return [leaf * weight for leaf in x]


def run(scenario, max_rows: int = 100, arrivals: Arrivals | None = None):
    async def main():
        scheduler, observer, doubling = Scheduler(2), Observer(), Doubling()
        try:
            batcher = Batcher(scheduler, arrivals or Arrivals(), observer, max_rows)
            return await scenario(batcher, doubling, observer)
        finally:
            doubling.gate.set()
            await scheduler.close(10)

    return asyncio.run(main())


def rows(*values) -> list[np.ndarray]:
    return [np.float32(values)]


def predict(batcher, doubling, x, weights=WEIGHTS):
    return asyncio.ensure_future(batcher.predict(doubling.plan, weights, x, 100, CallTimes()))


async def come_together(batcher, doubling, observer) -> None:
    """Teaches the batcher that calls come together."""
    await asyncio.gather(*(predict(batcher, doubling, rows(0)) for _ in range(3)))
    observer.calls.clear()


def test_calls_that_wait_together_run_together_and_each_gets_its_own_rows():
    async def scenario(batcher, doubling, observer):
        # The first of calls that come together again finds nobody; from then on they are waited for.
        for joined in ([1, 5], [6]):
            calls = [predict(batcher, doubling, rows(*range(count))) for count in range(6)]
            found = [(await call)[0].tolist() for call in calls]
            assert found == [[2 * value for value in range(count)] for count in range(6)]
            assert observer.calls[-len(joined) :] == joined

    run(scenario)


def test_calls_that_arrive_while_a_batch_runs_form_the_next_batch():
    async def scenario(batcher, doubling, observer):
        doubling.gate.clear()
        first = predict(batcher, doubling, rows(1))
        await asyncio.sleep(0.05)
        others = [predict(batcher, doubling, rows(value)) for value in (2, 3, 4)]
        await asyncio.sleep(0.05)
        doubling.gate.set()
        assert [(await call)[0].tolist() for call in (first, *others)] == [[2], [4], [6], [8]]
        assert observer.calls == [1, 3]

    run(scenario)


def test_a_single_call_does_not_wait_for_a_batch():
    async def scenario(batcher, doubling, observer):
        for value in range(20):
            assert (await predict(batcher, doubling, rows(value)))[0].tolist() == [2 * value]
        assert observer.calls == [1] * 20
        assert observer.waits == []

    run(scenario)


def test_a_call_waits_for_an_announced_call():
    arrivals = Arrivals()

    async def scenario(batcher, doubling, observer):
        async def come_later():
            for _ in range(5):
                await asyncio.sleep(0)
            arrivals.arrive()
            return await predict(batcher, doubling, rows(2))

        later = asyncio.ensure_future(come_later())
        arrivals.announce(later)
        found = await asyncio.gather(predict(batcher, doubling, rows(1)), later)
        assert [leaves[0].tolist() for leaves in found] == [[2], [4]]
        assert observer.calls == [2]
        assert not arrivals.count

    run(scenario, arrivals=arrivals)


def test_an_announced_call_that_never_arrives_delays_no_other_call():
    arrivals = Arrivals()

    async def scenario(batcher, doubling, observer):
        never = asyncio.ensure_future(asyncio.Event().wait())
        arrivals.announce(never)
        for value in range(5):
            assert (await predict(batcher, doubling, rows(value)))[0].tolist() == [2 * value]
        assert observer.calls == [1] * 5
        assert arrivals.count == 1
        never.cancel()
        await asyncio.wait([never])
        assert not arrivals.count

    run(scenario, arrivals=arrivals)


def test_calls_with_other_weights_or_row_shapes_have_separate_batches():
    async def scenario(batcher, doubling, observer):
        other = (np.float32(3),)
        await come_together(batcher, doubling, observer)
        calls = [
            predict(batcher, doubling, rows(1)),
            predict(batcher, doubling, rows(1), other),
            predict(batcher, doubling, [np.ones((1, 2), np.float32)]),
            predict(batcher, doubling, rows(5)),
        ]
        found = [(await call)[0].tolist() for call in calls]
        assert found == [[2], [3], [[2, 2]], [10]]
        assert sorted(observer.calls) == [1, 1, 2]

    run(scenario)


def test_a_bad_request_in_a_batch_fails_alone():
    async def scenario(batcher, doubling, observer):
        calls = [predict(batcher, doubling, rows(value)) for value in (1, -1, 2)]
        assert (await calls[0])[0].tolist() == [2]
        with pytest.raises(errors.ModelRefusedInput):
            await calls[1]
        assert (await calls[2])[0].tolist() == [4]

    run(scenario)


def test_a_call_that_is_cancelled_in_the_queue_never_runs():
    async def scenario(batcher, doubling, observer):
        doubling.gate.clear()
        first = predict(batcher, doubling, rows(1))
        await asyncio.sleep(0.05)
        given_up, kept = predict(batcher, doubling, rows(2)), predict(batcher, doubling, rows(3))
        await asyncio.sleep(0.05)
        given_up.cancel()
        await asyncio.sleep(0)
        doubling.gate.set()
        assert [(await call)[0].tolist() for call in (first, kept)] == [[2], [6]]
        assert observer.calls == [1, 1]

    run(scenario)


def test_a_batch_has_at_most_max_rows_and_a_longer_call_runs_alone():
    async def scenario(batcher, doubling, observer):
        await come_together(batcher, doubling, observer)
        calls = [predict(batcher, doubling, rows(*range(count))) for count in (4, 4, 4, 30, 2)]
        assert [len((await call)[0]) for call in calls] == [4, 4, 4, 30, 2]
        assert observer.calls == [2, 1, 1, 1]

    run(scenario, max_rows=10)


def test_leaves_of_different_length_are_passed_to_the_model():
    async def scenario(batcher, doubling, observer):
        found = await predict(batcher, doubling, [np.float32([1]), np.float32([1, 2])])
        assert [leaf.tolist() for leaf in found] == [[2], [2, 4]]
        assert observer.calls == []

    run(scenario)


SPOILED = {
    "fewer rows": lambda leaf: leaf[:3],
    "more rows": lambda leaf: np.concatenate([leaf, leaf]),
    "no rows": lambda leaf: leaf[:0],
    "no dimension": lambda leaf: leaf.sum(),
    "the batch behind": lambda leaf: leaf[None],
}


@pytest.mark.parametrize("name", SPOILED)
def test_results_with_another_number_of_rows_are_never_split(name, caplog):
    async def scenario(batcher, doubling, observer):
        def spoil_batches(leaves):
            results = Doubling.run(doubling, leaves)
            # One result of two is enough.
            return [*results, SPOILED[name](results[0])] if len(results[0]) > 2 else results

        await come_together(batcher, doubling, observer)
        doubling.plan.run = spoil_batches
        calls = [predict(batcher, doubling, rows(value, value)) for value in (1, 2)]
        # Each is run again, alone.
        assert [[leaf.tolist() for leaf in await call] for call in calls] == [[[2, 2]], [[4, 4]]]

    run(scenario)
    assert "a batch of 4 rows had results of shapes" in caplog.text


def test_each_caller_gets_as_many_rows_as_it_sent():
    async def scenario(batcher, doubling, observer):
        await come_together(batcher, doubling, observer)
        counts = [0, 3, 1, 0, 7, 2]
        values = [np.arange(count, dtype=np.float32) + 10 * index for index, count in enumerate(counts)]
        found = await asyncio.gather(*(predict(batcher, doubling, [value]) for value in values))
        assert [leaves[0].tolist() for leaves in found] == [(2 * value).tolist() for value in values]
        assert observer.calls == [len(counts)]

    run(scenario)


def test_every_queue_is_removed_after_use():
    async def scenario(batcher, doubling, observer):
        await come_together(batcher, doubling, observer)
        kept = []

        async def call(value: int) -> None:
            weights = (np.full(1, value, np.float32),)
            kept.append(weakref.ref(weights[0]))
            await asyncio.gather(*(predict(batcher, doubling, rows(1), weights) for _ in range(value % 3 + 1)))

        for value in range(10):
            await call(value)
        # Another call, because the scheduler's threads may keep their last one.
        for _ in range(3):
            await predict(batcher, doubling, rows(1))
        gc.collect()
        assert [reference() for reference in kept] == [None] * 10
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(scenario)
