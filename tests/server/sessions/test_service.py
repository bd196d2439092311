"""Metric sessions of a real model: each update counts once, whatever comes between."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import numpy as np
import pytest

from forwardpass.wire import errors
from forwardpass.wire.description import Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.execution import Invocation
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.sessions.cache import CacheLimits
from forwardpass_server.sessions.store import SessionKey
from forwardpass_server.sessions.stores.memory import MemorySessionStore
from forwardpass_server.sessions.stores.redis import RedisSessionStore
from support.metric_sessions import (
    LIMITS,
    OTHER,
    SESSION,
    Observer,
    Writer,
    counted,
    forward,
    given,
    registry_of,
    rig,
    run,
)
from support.redis_servers import RedisProcess


def counts(updates: int, examples: int, labels: int) -> tuple[int, int, int]:
    return updates, examples, labels


async def found(rig, session_id=SESSION) -> tuple[int, int, int]:
    metrics = await rig.result(session_id)
    session = await rig.sessions.get("", session_id)
    return session.record.updates, metrics["examples"], metrics["labels"]


def test_updates_count_in_order_and_a_retried_one_once():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        writer = Writer()
        for number in (1, 2, 3):
            await rig.update(writer, number)
        await rig.update(writer, 3, sequence=3)
        assert await found(rig) == counts(3, 9, 18)
        assert (rig.observer.applied, rig.observer.duplicates) == (3, 1)

    run(scenario)


def test_an_update_with_a_gap_or_a_used_number_is_refused_and_changes_nothing():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        writer = Writer()
        await rig.update(writer, 1)
        with pytest.raises(errors.SequenceMismatch, match=r"update\.sequence: expected 2, got 3"):
            await rig.update(writer, 2, sequence=3)
        with pytest.raises(errors.SequenceMismatch, match="that of update 1, or the next sequence number"):
            await rig.update(writer, 2, sequence=1, update_id=b"another one here")
        await rig.update(writer, 2)
        assert await found(rig) == counts(2, 6, 9)

    run(scenario)


def test_several_writers_count_in_one_session_each_with_its_own_numbers():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        writers = [Writer(str(index)) for index in range(10)]

        async def write(writer):
            for number in range(20):
                await rig.update(writer, number)

        await asyncio.gather(*map(write, writers))
        assert await found(rig) == counts(200, 600, 10 * 3 * 190)

    run(scenario)


def test_an_update_that_the_model_refuses_does_not_count_and_delays_no_other():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        good, bad = Writer("good"), Writer("bad")
        done = await asyncio.gather(
            rig.update(good, 1), rig.update(bad, -1), rig.update(Writer("third"), 2), return_exceptions=True
        )
        assert [type(one) for one in done] == [type(None), errors.ModelRefusedInput, type(None)]
        assert await found(rig) == counts(2, 6, 9)
        # Its number is free again.
        await rig.update(bad, 5, sequence=1)
        assert await found(rig) == counts(3, 9, 24)

    run(scenario)


def test_an_update_whose_caller_disconnects_still_counts():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        writer = Writer()
        calling = asyncio.ensure_future(rig.update(writer, 1))
        # Handed over with its first step, and stored some steps later.
        await asyncio.sleep(0)
        assert rig.cache.find(SessionKey("", SESSION)).is_committing
        calling.cancel()
        await rig.update(writer, 1, sequence=1)
        assert await found(rig) == counts(1, 3, 3)

    run(scenario)


def test_a_forward_pass_is_answered_counted_and_answered_again():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        writer = Writer()
        _, first = await rig.sessions.forward_pass("", writer.identity(), given(forward(1)), 100, False)
        _, again = await rig.sessions.forward_pass("", writer.identity(sequence=1), given(forward(1)), 100, False)
        for results in (first, again):
            assert results["batch_output.predictions"].leaves[0].tolist() == [0, 1, 2]
            assert results["batch_output.loss"].leaves[0] == 3
        # Too long to be recorded: computed again.
        _, long = await rig.sessions.forward_pass("", writer.identity(), given(forward(2, 1000)), 100, False)
        _, again = await rig.sessions.forward_pass("", writer.identity(sequence=2), given(forward(2, 1000)), 100, False)
        assert np.array_equal(long["batch_output.predictions"].leaves[0], again["batch_output.predictions"].leaves[0])
        assert await found(rig) == counts(2, 1003, 2003)
        assert (rig.observer.applied, rig.observer.duplicates) == (2, 2)
        _, short = await rig.sessions.forward_pass("", writer.identity(), given(forward(3)), 100, True)
        assert set(short) == {"batch_output.loss", "batch_output.num_examples"}

    run(scenario)


def test_sample_weights_are_passed_to_the_metrics():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        weight = {"sample_weight": Structure.of(np.float32([1, 2, 0.5]))}
        request = forward(1)
        writer = Writer()
        await rig.sessions.forward_pass(
            "", writer.identity(), given(request._replace(parts={**request.parts, **weight})), 100, False
        )
        await rig.sessions.update("", writer.identity(), given({**counted(1), **weight}), 100)
        assert await rig.result() == {"examples": 6, "labels": 6, "weights": 7.0}

    run(scenario)


class Failing(MemorySessionStore):
    """A store that loses its answers: fails as often as it is told, before or after it has done what it was to do."""

    def __init__(self, *, does_it: bool) -> None:
        super().__init__(LIMITS, Observer())
        self._does_it = does_it
        self.failures = 0

    async def replace(self, key, version, record):
        if not self.failures:
            return await super().replace(key, version, record)
        self.failures -= 1
        if self._does_it:
            await super().replace(key, version, record)
        raise errors.SessionStoreUnavailable


@pytest.mark.parametrize("does_it", [True, False])
@pytest.mark.parametrize("kind", ["update", "forward_pass"])
def test_an_update_counts_once_whether_or_not_a_failed_store_wrote_it(does_it, kind):
    store = Failing(does_it=does_it)

    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        writer = Writer()

        async def count(number, **changes):
            if kind == "update":
                await rig.update(writer, number, **changes)
            else:
                await rig.sessions.forward_pass("", writer.identity(**changes), given(forward(number)), 100, False)

        await count(1)
        store.failures = 2
        with pytest.raises(errors.SessionStoreUnavailable):
            await count(2)
        # What was acknowledged is shown, and what was not as the store has it.
        assert await found(rig) == (counts(2, 6, 9) if does_it else counts(1, 3, 3))
        if not does_it:
            with pytest.raises(errors.SessionStoreUnavailable):
                await count(2, sequence=2)
        await count(2, sequence=2)
        store.failures = 0
        await count(3)
        assert await found(rig) == counts(3, 9, 18)

    run(scenario, store)


def test_sessions_are_merged_with_states_and_with_each_other_once():
    async def scenario(rig):
        for session_id in (SESSION, OTHER):
            await rig.sessions.open("", session_id, "counting", 0)
        writer, other = Writer(), Writer(session_id=OTHER)
        await rig.update(writer, 1)
        await rig.update(other, 5)
        for _ in range(2):
            await rig.sessions.merge("", writer.identity(sequence=2), OTHER, given({}), 0)
        assert await found(rig) == counts(2, 6, 18)
        assert await found(rig, OTHER) == counts(1, 3, 15)
        state = (await rig.sessions.get("", OTHER)).record.state
        await rig.sessions.merge("", writer.identity(sequence=3), b"", given({"state": state}), 0)
        assert await found(rig) == counts(3, 9, 33)
        with pytest.raises(errors.InvalidRequest, match="other_session_id: expected another session of counting/1"):
            await rig.sessions.merge("", writer.identity(sequence=4), SESSION, given({}), 0)
        with pytest.raises(errors.SessionNotFound):
            await rig.sessions.merge("", writer.identity(sequence=4), b"n" * 16, given({}), 0)
        with pytest.raises(errors.InvalidRequest, match="other_session_id: expected 16 bytes, got 0"):
            await rig.sessions.merge("", writer.identity(sequence=4), b"", given({}), 0)

    run(scenario)


def test_a_session_begins_with_any_state_of_its_model():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        await rig.update(Writer(), 7)
        state = (await rig.sessions.get("", SESSION)).record.state
        await rig.sessions.open("", OTHER, "counting", 1, read=given({"initial_state": state}))
        assert await found(rig, OTHER) == counts(0, 3, 21)
        with pytest.raises(errors.StructureMismatch, match="initial_state: expected keys"):
            await rig.sessions.open(
                "", b"n" * 16, "counting", 1, read=given({"initial_state": Structure.of({"examples": 1})})
            )

    run(scenario)


def test_opening_a_session_again_changes_nothing():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        await rig.update(Writer(), 7)
        for resume in (False, True):
            session = await rig.sessions.open("", SESSION, "counting", 1, resume=resume)
            assert session.record.updates == 1
        with pytest.raises(errors.SessionNotFound):
            await rig.sessions.open("", OTHER, "counting", 0, resume=True)
        with pytest.raises(errors.InvalidRequest, match="session_id: expected 16 bytes, got 2"):
            await rig.sessions.open("", b"no", "counting", 0)

    run(scenario)


def test_a_session_of_another_model_or_principal_is_refused():
    async def scenario(rig):
        await rig.sessions.open("ann", SESSION, "counting", 0)
        with pytest.raises(errors.InvalidRequest, match="model: expected counting/1, that of the session, got slow/0"):
            await rig.sessions.open("ann", SESSION, "slow", 0, resume=True)
        for principal in ("", "bob"):
            with pytest.raises(errors.SessionNotFound):
                await rig.sessions.get(principal, SESSION)
        await rig.sessions.close("bob", SESSION)
        assert (await rig.sessions.get("ann", SESSION)).record.updates == 0

    run(scenario, names=("counting", "slow"))


def test_a_closed_session_is_not_found_and_can_be_closed_again():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        for _ in range(2):
            await rig.sessions.close("", SESSION)
        for call in (rig.result(), rig.update(Writer(), 1), rig.sessions.open("", SESSION, "counting", 0)):
            with pytest.raises(errors.SessionNotFound, match="was closed"):
                await call

    run(scenario)


def test_a_state_above_the_limit_is_refused_and_the_session_continues():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "remembering", 0)
        writer = Writer()
        await rig.sessions.update("", writer.identity(), given(counted(1, 10)), 100)
        with pytest.raises(errors.SessionLimitExceeded, match="state: expected at most 1000 bytes, got 1680"):
            await rig.sessions.update("", writer.identity(sequence=2), given(counted(2, 200)), 100)
        await rig.sessions.update("", writer.identity(sequence=2), given(counted(3, 10)), 100)
        assert (await rig.sessions.get("", SESSION)).record.state.leaves[0].tolist() == [1] * 10 + [3] * 10
        with pytest.raises(errors.FunctionNotAvailable, match=r"state\['labels'\] is not a sum over batches"):
            await rig.sessions.merge(
                "", writer.identity(sequence=3), b"", given({"state": Structure.of({"labels": np.int64([1])})}), 0
            )
        big = Structure.of({"labels": np.zeros(126, np.int64)})
        with pytest.raises(errors.SessionLimitExceeded, match="got 1008"):
            await rig.sessions.open("", OTHER, "remembering", 0, read=given({"initial_state": big}))

    run(scenario, names=("remembering",), max_state_bytes=1000)


def test_sessions_that_are_not_cached_are_read_from_the_store():
    # Each takes 4 KiB and its record.
    limits = CacheLimits(size_bytes=2**15)

    async def scenario(rig):
        ids = [index.to_bytes(16, "big") for index in range(20)]
        writers = [Writer(session_id=one) for one in ids]
        for one in ids:
            await rig.sessions.open("", one, "counting", 0)
        for _ in range(3):
            await asyncio.gather(*(rig.update(writer, 2) for writer in writers))
        assert 0 < len(rig.cache) < 10
        assert rig.cache.size_bytes <= 2**15
        assert [await found(rig, one) for one in ids] == [counts(3, 9, 18)] * 20

    run(scenario, cache_limits=limits)


def test_the_size_of_a_cached_session_follows_its_state():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "remembering", 0)
        writer, before = Writer(), rig.cache.size_bytes
        for number in range(3):
            await rig.sessions.update("", writer.identity(), given(counted(number, 500)), 100)
        state_bytes = sum(leaf.nbytes for leaf in (await rig.sessions.get("", SESSION)).record.state.leaves)
        assert state_bytes >= 3 * 500 * 8
        assert rig.cache.size_bytes - before >= state_bytes
        await rig.sessions.close("", SESSION)
        assert rig.cache.size_bytes == 0

    run(scenario, names=("remembering",))


def test_sessions_whose_states_grow_beyond_the_limit_leave_the_cache():
    # Two sessions fit as long as they are small.
    limits = CacheLimits(size_bytes=2**15)

    async def scenario(rig):
        for session_id in (SESSION, OTHER):
            await rig.sessions.open("", session_id, "remembering", 0)
        assert len(rig.cache) == 2
        writer = Writer()
        for number in range(7):
            await rig.sessions.update("", writer.identity(), given(counted(number, 500)), 100)
        assert rig.cache.find(SessionKey("", OTHER)) is None
        # The store has it.
        assert (await rig.sessions.get("", OTHER)).record.updates == 0
        assert (await rig.sessions.get("", SESSION)).record.updates == 7

    run(scenario, names=("remembering",), cache_limits=limits)


@pytest.mark.parametrize("idle_s, cached", [(60.0, 1), (0.0, 0)])
def test_idle_sessions_leave_the_cache_and_continue(idle_s, cached):
    async def scenario(rig):
        writer = Writer()
        await rig.sessions.open("", SESSION, "counting", 0)
        await rig.update(writer, 2)
        rig.cache.sweep()
        assert len(rig.cache) == cached
        assert bool(rig.cache.size_bytes) == bool(cached)
        await rig.update(writer, 2)
        assert await found(rig) == counts(2, 6, 12)

    run(scenario, cache_limits=CacheLimits(idle_s=idle_s))


def test_an_unloaded_model_is_kept_until_its_sessions_are_closed():
    async def scenario(rig):
        writer = Writer()
        await rig.sessions.open("", SESSION, "counting", 0)
        await rig.update(writer, 2)
        # The session is not cached when the model is unloaded.
        rig.cache.sweep()
        assert not len(rig.cache)
        with unloaded(rig):
            assert not await rig.models.release()
            await rig.update(writer, 2)
            rig.cache.sweep()
            assert await found(rig) == counts(2, 6, 12)
            with pytest.raises(errors.ModelNotFound):
                await rig.sessions.open("", OTHER, "counting", 0)
            await rig.sessions.close("", SESSION)
            assert await rig.models.release()
            # Nothing is left to release.
            assert not await rig.models.release()

    run(scenario, cache_limits=CacheLimits(idle_s=0.0))


class SlowStore(MemorySessionStore):
    """Makes a session when it is let."""

    def __init__(self):
        super().__init__(LIMITS, Observer())
        self.asked, self.let = asyncio.Event(), asyncio.Event()

    async def create(self, *arguments):
        self.asked.set()
        await self.let.wait()
        return await super().create(*arguments)


@contextlib.contextmanager
def unloaded(rig):
    """Without `counting`, which other tests share."""
    rig.models.retain(rig.registry.get("counting", 1))
    assert rig.registry.unload("counting", 1)
    try:
        yield
    finally:
        rig.registry.load(ModelSource("counting", 1, factory="support.zoo:counting"), TensorFlowLoader("cpu"))


def test_an_unloaded_model_is_kept_for_sessions_that_only_the_store_has():
    store = MemorySessionStore(LIMITS, Observer())

    async def opened(rig):
        await rig.sessions.open("", SESSION, "counting", 0)

    async def used(rig):
        with unloaded(rig):
            assert not await rig.models.release()
            await rig.update(Writer(), 2)
            assert await found(rig) == counts(1, 3, 6)

    for scenario in (opened, used):
        run(scenario, store)


def test_a_reloaded_model_with_the_same_content_is_not_kept_twice():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        rig.models.retain(rig.registry.get("counting", 1))
        assert not await rig.models.release()
        rig.registry.load(ModelSource("counting", 1, factory="support.zoo:counting"), TensorFlowLoader("cpu"))
        assert await rig.models.release()
        await rig.update(Writer(), 2)
        assert await found(rig) == counts(1, 3, 6)

    run(scenario)


def test_a_retained_model_is_not_released_while_it_has_sessions():
    async def scenario(rig):
        rig.models.retain(rig.registry.get("counting", 1))
        assert not await rig.models.release()
        await rig.sessions.open("", SESSION, "counting", 0)
        rig.cache.remove(SessionKey("", SESSION))
        assert rig.registry.unload("counting", 1)
        try:
            await rig.update(Writer(), 2)
            assert await found(rig) == counts(1, 3, 6)
        finally:
            rig.registry.load(ModelSource("counting", 1, factory="support.zoo:counting"), TensorFlowLoader("cpu"))

    run(scenario)


def test_a_model_whose_sessions_cannot_be_counted_is_not_released():
    class AwayStore(MemorySessionStore):
        is_away = True

        async def count_of(self, model):
            if self.is_away:
                raise errors.SessionStoreUnavailable
            return await super().count_of(model)

    async def scenario(rig):
        with unloaded(rig):
            assert not await rig.models.release()
            rig.store.is_away = False
            assert await rig.models.release()

    run(scenario, AwayStore(LIMITS, Observer()))


def test_a_session_that_is_being_opened_when_its_model_is_unloaded_is_served():
    async def scenario(rig):
        opening = asyncio.ensure_future(rig.sessions.open("", SESSION, "counting", 0))
        await rig.store.asked.wait()
        with unloaded(rig):
            releasing = asyncio.ensure_future(rig.models.release())
            rig.store.let.set()
            await opening
            assert not await releasing
            await rig.update(Writer(), 2)
            assert await found(rig) == counts(1, 3, 6)

    run(scenario, SlowStore())


def test_counting_the_sessions_of_a_model_waits_for_sessions_that_are_being_opened():
    async def scenario(rig):
        model = rig.registry.get("counting", 1).identity
        assert await rig.models.count(model) == 0
        opening = asyncio.ensure_future(rig.sessions.open("", SESSION, "counting", 0))
        await rig.store.asked.wait()
        # Who has left may have a session all the same.
        opening.cancel()
        await asyncio.wait([opening])
        counting = asyncio.ensure_future(rig.models.count(model))
        other = dataclasses.replace(model, content_hash=b"another")
        assert await rig.models.count(other) == 0
        assert not counting.done()
        rig.store.let.set()
        assert await counting == 1
        await rig.sessions.close("", SESSION)
        assert await rig.models.count(model) == 0

    run(scenario, SlowStore())


def test_a_session_that_fails_to_open_does_not_exist():
    async def scenario(rig):
        rig.store.let.set()
        model = rig.registry.get("counting", 1).identity
        with pytest.raises(errors.SessionLimitExceeded):
            await rig.sessions.open("", SESSION, "counting", 0)
        assert await rig.models.count(model) == 0

    run(scenario, SlowStore(), max_state_bytes=1)


def test_a_session_that_is_opened_while_they_are_counted_is_counted():
    class CountingStore(MemorySessionStore):
        """Opens a session when it has counted."""

        async def count_of(self, model):
            count = await super().count_of(model)
            if not self.opened:
                self.opened = True
                await self.open()
            return count

    async def scenario(rig):
        rig.store.opened = False
        rig.store.open = lambda: rig.sessions.open("", SESSION, "counting", 0)
        assert await rig.models.count(rig.registry.get("counting", 1).identity) == 1

    run(scenario, CountingStore(LIMITS, Observer()))


def test_a_forward_pass_works_after_its_session_has_left_the_cache():
    # Two objects stand for one session then: the store decides between them.
    limits = CacheLimits(size_bytes=0)

    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        writers = [Writer(str(index)) for index in range(8)]

        async def write(writer):
            for number in range(10):
                await rig.sessions.forward_pass("", writer.identity(), given(forward(number)), 100, False)

        await asyncio.gather(*map(write, writers))
        assert await found(rig) == counts(80, 240, 8 * 3 * 45)

    run(scenario, cache_limits=limits)


def test_a_session_of_a_changed_or_unloaded_model_raises_an_error_that_says_so():
    store = MemorySessionStore(LIMITS, Observer())

    async def opened(rig):
        await rig.sessions.open("", SESSION, "counting", 0)

    run(opened, store)

    async def gone() -> None:
        for sources, error in (
            ([], errors.ModelNotFound),
            ([ModelSource("counting", 2, factory="support.zoo:counting")], errors.ModelVersionNotFound),
            ([ModelSource("counting", 1, factory="support.zoo:structures")], errors.ModelChanged),
            ([ModelSource("counting", 1, factory="support.zoo:no_such")], errors.ModelFailed),
        ):
            registry = Registry(sources)
            for source in sources:
                registry.load(source, TensorFlowLoader("cpu"))
            async with rig(store, registry) as found:
                with pytest.raises(error):
                    await found.sessions.get("", SESSION)
        async with rig(store, Registry([ModelSource("counting", 1, factory="support.zoo:counting")])) as found:
            with pytest.raises(errors.ModelLoading):
                await found.sessions.get("", SESSION)

    asyncio.run(gone())


def test_states_of_other_shapes_are_not_added():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "rowwise", 0)
        writer = Writer()
        await rig.sessions.update("", writer.identity(), given(counted(1, 3)), 100)
        state = Structure.of({"labels": np.int64([5])})
        with pytest.raises(errors.ShapeMismatch, match=r"state\['labels'\]: expected shape \(3,\), got \(1,\)"):
            await rig.sessions.merge("", writer.identity(), b"", given({"state": state}), 0)

    run(scenario, names=("rowwise",))


def test_calls_beyond_the_servers_limit_are_refused():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        with rig.admission.admitted("", 0):
            for call in (
                rig.update(Writer(), 1),
                rig.result(),
                rig.sessions.open("", OTHER, "counting", 0),
                rig.sessions.merge("", Writer().identity(), OTHER, given({}), 0),
            ):
                with pytest.raises(errors.ServerOverloaded):
                    await call
        await rig.update(Writer(), 1)
        assert await found(rig) == counts(1, 3, 3)

    run(scenario, max_calls=1)


@pytest.fixture
def redis_process(tmp_path):
    with RedisProcess(tmp_path) as process:
        yield process


def shared(redis_process, scenario, timeout_s: float = 5.0):
    """A scenario of two servers' sessions over one Redis."""

    async def main() -> None:
        stores = [RedisSessionStore(redis_process.url, LIMITS, Observer(), timeout_s=timeout_s) for _ in range(2)]
        try:
            async with rig(stores[0], registry_of("counting")) as one, rig(stores[1], registry_of("counting")) as other:
                await scenario(one, other)
        finally:
            for store in stores:
                await store.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_servers_that_share_a_store_race_and_every_update_counts_once(redis_process):
    async def scenario(*rigs):
        await rigs[0].sessions.open("", SESSION, "counting", 0)

        async def write(index):
            writer = Writer(str(index))
            for number in range(25):
                # By any server, and now and then by both at once.
                sequence = number + 1
                calls = [rigs[(index + number) % 2].update(writer, number, sequence=sequence)]
                if number % 5 == 0:
                    calls.append(rigs[(index + number + 1) % 2].update(writer, number, sequence=sequence))
                await asyncio.gather(*calls)

        await asyncio.gather(*map(write, range(8)))
        for one in rigs:
            assert await found(one) == counts(200, 600, 8 * 3 * 300)
        applied = sum(one.observer.applied for one in rigs)
        duplicates = sum(one.observer.duplicates for one in rigs)
        assert (applied, duplicates) == (200, 40)

    shared(redis_process, scenario)


def test_another_server_sees_updates_and_closed_sessions_at_once(redis_process):
    async def scenario(one, other):
        await one.sessions.open("", SESSION, "counting", 0)
        writer = Writer()
        await other.update(writer, 1)
        await one.update(writer, 1, sequence=1)
        await one.update(writer, 2)
        await other.sessions.forward_pass("", writer.identity(), given(forward(3)), 100, False)
        _, again = await one.sessions.forward_pass("", writer.identity(sequence=3), given(forward(3)), 100, False)
        assert again["batch_output.loss"].leaves[0] == 3
        assert await found(one) == await found(other) == counts(3, 9, 18)
        with pytest.raises(errors.SequenceMismatch, match="expected 4, got 5"):
            await other.update(writer, 9, sequence=5)
        await one.sessions.close("", SESSION)
        with pytest.raises(errors.SessionNotFound, match="was closed"):
            await other.update(writer, 4)

    shared(redis_process, scenario)


def test_an_update_in_doubt_after_a_store_hangs_counts_once(redis_process):
    async def scenario(one, other):
        await one.sessions.open("", SESSION, "counting", 0)
        writer = Writer()
        await one.update(writer, 1)
        redis_process.pause()
        with pytest.raises(errors.SessionStoreUnavailable, match=r"did not answer within 0\.3 s"):
            await one.update(writer, 2)
        redis_process.resume()
        await one.store.check()  # As the server does each second: calls fail at once before.
        await other.update(writer, 2, sequence=2)
        await one.update(writer, 2, sequence=2)
        await one.update(writer, 3)
        assert await found(other) == counts(3, 9, 18)

    shared(redis_process, scenario, 0.3)


def test_the_record_of_a_store_that_has_lost_updates_replaces_the_cached_one(redis_process):
    # As Redis does that fails over to a replica which lagged behind.
    async def scenario(one, other):
        await one.sessions.open("", SESSION, "counting", 0)
        writer = Writer()
        await one.update(writer, 1)
        with redis_process.client() as client:
            (name,) = client.scan_iter("*:session:*")
            before = client.hgetall(name)
            await one.update(writer, 2)
            await one.update(writer, 3)
            client.hset(name, mapping=before)
        with pytest.raises(errors.SequenceMismatch, match="expected 2, got 4"):
            await one.update(writer, 4)
        await one.update(writer, 2, sequence=2)
        assert await found(other) == counts(2, 6, 9)

    shared(redis_process, scenario)


def test_a_forward_pass_without_a_session_changes_no_session():
    async def scenario(rig):
        await rig.sessions.open("", SESSION, "counting", 0)
        request = forward(1)
        asked = Invocation(Function.FORWARD_PASS, request.parts, 100)
        await rig.executor.admit_and_run(rig.registry.get("counting", 1), "", 100, given(asked))
        assert await found(rig) == counts(0, 0, 0)

    run(scenario)


def test_sessions_that_another_server_opened_are_counted(redis_process):
    async def scenario(one, other):
        model = one.registry.get("counting", 1).identity
        await one.sessions.open("", SESSION, "counting", 0)
        await other.sessions.open("another", OTHER, "counting", 0)
        assert await other.models.count(model) == 2
        await one.sessions.close("another", OTHER)
        assert await other.models.count(model) == 1
        redis_process.kill()
        with pytest.raises(errors.SessionStoreUnavailable):
            await other.models.count(model)

    shared(redis_process, scenario)
