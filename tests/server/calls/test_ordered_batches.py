"""Ordered batches with steps of their own kind: run once and in order, committed together, acknowledged by number."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Sequence

import numpy as np
import pytest

from forwardpass.wire import errors
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.admission import Admission, Limits
from forwardpass_server.calls.ordered_batches import Batch, OrderedBatches


class Descent:
    """A lane as training would have one: each batch changes the weights that the next one starts from.

    A commit stores the weights of a batch at the end of the turn of the event loop in which it was asked for; one write
    stores all of them. delays: seconds that a batch takes, by its number. refused: a batch that fails.
    """

    def __init__(self, position: int = 0, *, delays=(), refused: int = 0, uncommittable: int = 0) -> None:
        self.position = position
        self.weights = 0.0
        self.ran: list[int] = []
        self.stored: list[tuple[int, float]] = []
        self.writes = 0
        self._delays = dict(delays)
        self._refused = refused
        self._uncommittable = uncommittable
        self.began = collections.defaultdict(asyncio.Event)
        self._waiting: list[tuple[tuple[int, float], asyncio.Future[None]]] = []

    joins = 1

    async def run(self, batches: Sequence[Batch]) -> tuple[int, tuple[int, float]]:
        batch = batches[0]
        assert batch.sequence == (self.ran[-1] if self.ran else self.position) + 1
        self.began[batch.sequence].set()
        await asyncio.sleep(self._delays.get(batch.sequence, 0))
        if batch.sequence == self._refused:
            raise errors.ModelRefusedInput("not this one")
        self.ran.append(batch.sequence)
        self.weights = 2 * self.weights + float(batch.parts["gradient"].leaves[0])
        return 1, (batch.sequence, self.weights)

    def commit(self, result: tuple[int, float]) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._write)
        future = loop.create_future()
        self._waiting.append((result, future))
        return future

    def _write(self) -> None:
        self.writes += 1
        for (sequence, weights), future in self._waiting:
            if sequence == self._uncommittable:
                future.set_exception(errors.SessionStoreUnavailable("full"))
            else:
                self.stored.append((sequence, weights))
                future.set_result(None)
        self._waiting.clear()


@contextlib.asynccontextmanager
async def stream(*lanes: Descent, max_calls: int = 100):
    limits = Limits(calls=max_calls, size_bytes=2**30)
    batches = OrderedBatches(lanes, Admission(limits, limits), "")
    try:
        yield batches
    finally:
        await batches.end()


def read_gradient(number: int):
    async def read():
        return {"gradient": Structure.of(np.float32(number))}

    return read


async def add(batches, *numbers: int) -> None:
    for number in numbers:
        await batches.add(number, number.to_bytes(16, "big"), 100, read_gradient(number))


async def finish(batches) -> list[int]:
    batches.complete()
    positions = []
    while (position := await batches.advance(positions[-1] if positions else batches.position)) is not None:
        positions.append(position)
    return positions


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def expected(last: int, weights: float = 0.0, first: int = 1) -> list[tuple[int, float]]:
    stored = []
    for number in range(first, last + 1):
        weights = 2 * weights + number
        stored.append((number, weights))
    return stored


def test_each_step_starts_from_the_one_before_and_every_step_is_committed_once():
    async def scenario():
        lane = Descent()
        async with stream(lane) as batches:
            await add(batches, *range(1, 21))
            positions = await finish(batches)
        assert positions == sorted(set(positions))
        assert positions[-1] == 20
        assert lane.stored == expected(20)
        assert batches.in_progress == 0

    run(scenario)


def test_quick_steps_share_commits_and_no_more_than_eight_of_them():
    async def scenario():
        lane = Descent()
        async with stream(lane) as batches:
            await add(batches, *range(1, 25))
            await finish(batches)
        assert 24 / 8 <= lane.writes < 24

    run(scenario)


def test_a_slow_step_is_committed_while_the_next_one_runs():
    async def scenario():
        lane = Descent(delays={1: 0.05, 2: 3600})
        async with stream(lane) as batches:
            await add(batches, 1, 2, 3)
            assert await batches.advance(0) == 1
            assert lane.stored == expected(1)

    run(scenario)


def test_lanes_at_other_positions_run_only_missing_batches():
    async def scenario():
        behind, ahead = Descent(), Descent(3)
        async with stream(behind, ahead) as batches:
            assert batches.position == 0
            await add(batches, 1, 2, 3, 4, 5)
            assert (await finish(batches))[-1] == 5
        assert behind.stored == expected(5)
        assert ahead.stored == expected(5, first=4)

    run(scenario)


def test_batches_before_the_position_are_skipped_when_they_are_sent_again():
    async def scenario():
        lane = Descent(3)
        async with stream(lane) as batches:
            with pytest.raises(errors.InvalidRequest, match="call: expected batch 4, got 5"):
                await add(batches, 5)
            await add(batches, 2, 3, 4)
            assert await finish(batches) == [4]
        assert lane.ran == [4]

    run(scenario)


def test_the_first_batch_that_fails_ends_the_stream_after_those_before_it_are_committed():
    async def scenario():
        slow, failing = Descent(delays={2: 0.05}), Descent(refused=4)
        async with stream(slow, failing) as batches:
            await add(batches, *range(1, 7))
            with pytest.raises(errors.ModelRefusedInput, match=r"^batch 4: "):
                await finish(batches)
            assert batches.position == 3
        assert failing.stored == expected(3)

    run(scenario)


def test_a_batch_that_cannot_be_committed_ends_the_stream_there():
    async def scenario():
        lane = Descent(uncommittable=3)
        async with stream(lane) as batches:
            await add(batches, *range(1, 4))
            with pytest.raises(errors.SessionStoreUnavailable, match=r"^batch 3: "):
                await finish(batches)
            assert batches.position == 2

    run(scenario)


def test_finished_batches_are_committed_when_the_stream_breaks():
    async def scenario():
        lane = Descent(delays={3: 3600})
        async with stream(lane) as batches:
            await add(batches, 1, 2, 3)
            await lane.began[3].wait()
            assert lane.stored == []
        # The writes of this turn.
        await asyncio.sleep(0)
        assert lane.stored == expected(2)
        assert batches.in_progress == 0

    run(scenario)


def test_no_more_than_thirty_two_batches_are_in_progress():
    async def scenario():
        lane = Descent(delays={1: 3600})
        async with stream(lane) as batches:
            adding = asyncio.ensure_future(add(batches, *range(1, 40)))
            done, _ = await asyncio.wait([adding], timeout=0.2)
            assert not done
            assert batches.in_progress == 32
            # What comes next is broken: nobody has to wait for its turn any more.
            batches.fail(errors.InvalidRequest("malformed"))
            await adding

    run(scenario)
