"""Evaluations of a real model: batches count in order, none beyond what failed, no more at once than may be."""

from __future__ import annotations

import asyncio
import contextlib
import re

import numpy as np
import pytest

from forwardpass.wire import errors, manifests, tensors
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.evaluation_steps import EvaluationSteps
from forwardpass_server.calls.ordered_batches import Reader
from support.metric_sessions import OTHER, SESSION, Rig, Writer, batch, counted, given, registry_of, run

WRITER = b"e" * 16

Arguments = tuple[int, bytes, int, Reader]


def numbered(number: int, *, label: int | None = None, examples: int = 3, size_bytes: int = 100) -> Arguments:
    """What `add` takes of a batch whose labels are its number, or others."""
    parts = batch(number if label is None else label, examples)
    return number, number.to_bytes(16, "big"), size_bytes, given(parts)


async def put_weights(rig: Rig, seed: int = 0) -> bytes:
    """The id of weights of `counting`."""
    structure = Structure.of(((np.arange(10, dtype=np.float32) + seed,), ()))
    manifest = manifests.of_structure(structure, "weights")
    for digest, _ in await rig.weights.put("", manifest):
        await rig.weights.upload("", digest, 0, tensors.element_bytes(structure.leaves[0]))
    assert not await rig.weights.put("", manifest)
    return manifest.weights_id


@contextlib.asynccontextmanager
async def evaluation(rig: Rig, *session_ids: bytes, writer_id: bytes = WRITER):
    """The batches of an evaluation in these sessions, which are opened; each has weights of its own."""
    targets = []
    for index, session_id in enumerate(session_ids or (SESSION,)):
        await rig.sessions.open("", session_id, "counting", 0)
        targets.append((session_id, await put_weights(rig, index)))
    async with rig.evaluations.begin("", writer_id, False, targets) as found:
        yield found.batches


async def counts_of(rig: Rig, session_id: bytes = SESSION) -> tuple[int, int]:
    """How many updates, and the sum of what they counted, three of each."""
    session = await rig.sessions.get("", session_id)
    return session.record.updates, (await rig.result(session_id))["labels"]


async def finish(found) -> list[int]:
    """The positions that are told, until the last."""
    positions = []
    while (position := await found.advance(positions[-1] if positions else found.position)) is not None:
        positions.append(position)
    return positions


def test_batches_count_in_order_and_the_stream_reports_its_end():
    async def scenario(rig):
        async with evaluation(rig) as found:
            for number in range(1, 11):
                await found.add(*numbered(number))
            found.complete()
            positions = await finish(found)
            assert positions == sorted(set(positions))
            assert positions[-1] == 10
        assert await counts_of(rig) == (10, 165)
        assert (await rig.sessions.get("", SESSION)).record.sequence(WRITER) == 10

    run(scenario)


def test_an_evaluation_without_batches_ends_at_once():
    async def scenario(rig):
        async with evaluation(rig) as found:
            found.complete()
            assert await finish(found) == []

    run(scenario)


@pytest.mark.parametrize("first", [0, 2, 5])
def test_the_first_batch_follows_the_position(first):
    async def scenario(rig):
        async with evaluation(rig) as found:
            with pytest.raises(errors.InvalidRequest, match=f"call: expected batch 1, got {first}"):
                await found.add(*numbered(first))

    run(scenario)


def test_each_batch_follows_the_one_before():
    async def scenario(rig):
        async with evaluation(rig) as found:
            await found.add(*numbered(1))
            for number in (1, 3):
                with pytest.raises(errors.InvalidRequest, match=f"call: expected batch 2, got {number}"):
                    await found.add(*numbered(number))
            with pytest.raises(errors.InvalidRequest, match="update_id: expected 16 bytes, got 3"):
                await found.add(2, b"bad", 0, given(batch(2)))

    run(scenario)


def test_a_new_stream_continues_after_a_broken_one_and_no_batch_counts_twice():
    async def scenario(rig):
        async with evaluation(rig) as found:
            for number in range(1, 6):
                await found.add(*numbered(number))
            await found.advance(0)
        # What was handed to the session may still be on its way there.
        async with evaluation(rig) as found:
            assert found.position >= 1
            for number in range(2, 9):
                await found.add(*numbered(number))
            found.complete()
            await finish(found)
        assert await counts_of(rig) == (8, 3 * 36)
        async with evaluation(rig) as found:
            assert found.position == 8
            for number in (8, 9):
                await found.add(*numbered(number))
            found.complete()
            assert await finish(found) == [9]
        assert await counts_of(rig) == (9, 3 * 45)

    run(scenario)


def test_sessions_that_had_counted_more_than_others_count_no_batch_again():
    async def scenario(rig):
        async with evaluation(rig) as found:
            await found.add(*numbered(1))
            await found.add(*numbered(2))
            found.complete()
            await finish(found)
        async with evaluation(rig, SESSION, OTHER) as found:
            assert found.position == 0
            for number in (1, 2, 3):
                await found.add(*numbered(number))
            found.complete()
            assert (await finish(found))[-1] == 3
        assert await counts_of(rig) == await counts_of(rig, OTHER) == (3, 18)

    run(scenario)


@pytest.mark.parametrize("sessions", [1, 3])
def test_a_batch_that_the_model_refuses_is_reported_after_the_earlier_batches_have_counted(sessions):
    # Other weights lag behind, and have to get as far.
    ids = [bytes([index]) * 16 for index in range(sessions)]

    async def scenario(rig):
        async with evaluation(rig, *ids) as found:
            for number in range(1, 12):
                await found.add(*numbered(number, label=-1 if number == 7 else None))
            with pytest.raises(errors.ModelRefusedInput, match=r"^batch 7: "):
                await finish(found)
            assert found.position == 6
        for session_id in ids:
            assert await counts_of(rig, session_id) == (6, 3 * 21)

    run(scenario)


def test_batches_before_a_broken_message_count():
    async def scenario(rig):
        async with evaluation(rig) as found:
            await found.add(*numbered(1))
            found.fail(errors.InvalidRequest("malformed"))
            with pytest.raises(errors.InvalidRequest, match="malformed"):
                await finish(found)
            assert found.position == 1

    run(scenario)


def test_a_batch_waits_while_the_window_is_full():
    async def scenario(rig):
        async with evaluation(rig) as found:
            adding = asyncio.ensure_future(add_all(found, 100))
            most = 0
            while not adding.done():
                most = max(most, found.in_progress)
                await asyncio.sleep(0)
            found.complete()
            await finish(found)
            assert 1 < most <= 32
        assert (await counts_of(rig))[0] == 100

    run(scenario)


async def add_all(found, count: int) -> None:
    for number in range(1, count + 1):
        await found.add(*numbered(number))


def test_long_batches_wait_for_each_other():
    async def scenario(rig):
        async with evaluation(rig) as found:
            for number in (1, 2, 3):
                await found.add(*numbered(number, size_bytes=40 * 2**20))
                assert found.in_progress == 1
            found.complete()
            assert (await finish(found))[-1] == 3

    run(scenario)


def test_a_batch_waits_for_admission_and_occupies_a_call():
    async def scenario(rig):
        async with evaluation(rig) as found:
            with rig.admission.admitted("", 0):
                adding = asyncio.ensure_future(add_all(found, 3))
                done, _ = await asyncio.wait([adding], timeout=0.3)
                assert not done
                assert found.position == 0
            await adding
            found.complete()
            assert (await finish(found))[-1] == 3
            # All of it is given back.
            with rig.admission.admitted("", 0):
                pass
        assert await counts_of(rig) == (3, 18)

    run(scenario, max_calls=1)


def test_an_abandoned_evaluation_releases_its_admission():
    async def scenario(rig):
        for _ in range(5):
            async with evaluation(rig, writer_id=WRITER) as found:
                for number in range(found.position + 1, found.position + 3):
                    await found.add(*numbered(number))
        with rig.admission.admitted("", 0), rig.admission.admitted("", 0):
            pass

    run(scenario, max_calls=2)


def test_an_evaluation_and_updates_of_the_same_session_all_count():
    async def scenario(rig):
        async with evaluation(rig) as found:
            writer = Writer()

            async def update() -> None:
                for _ in range(20):
                    await rig.sessions.update("", writer.identity(), given(counted(1)), 100)

            await asyncio.gather(add_all(found, 20), update())
            found.complete()
            await finish(found)
        assert await counts_of(rig) == (40, 3 * 210 + 60)

    run(scenario)


def test_weights_deleted_during_an_evaluation_raise_weights_not_found():
    async def scenario(rig):
        async with evaluation(rig) as found:
            await found.add(*numbered(1))
            await found.advance(0)
            await rig.weights.delete("", await put_weights(rig))
            await found.add(*numbered(2))
            with pytest.raises(errors.WeightsNotFound, match=r"^batch 2: "):
                await finish(found)
        async with evaluation(rig) as found:
            assert found.position == 1

    run(scenario)


def test_an_evaluation_with_invalid_targets_is_refused():
    async def scenario(rig):
        for session_id, name in ((SESSION, "counting"), (OTHER, "remembering")):
            await rig.sessions.open("", session_id, name, 0)
        weights_id = await put_weights(rig)
        for error, message, targets in (
            (errors.InvalidRequest, "start.targets: expected 1 to 1024, got 0", []),
            (errors.InvalidRequest, "expected a different session for each", [(SESSION, weights_id)] * 2),
            (errors.SessionNotFound, "no metrics session", [(b"n" * 16, weights_id)]),
            (errors.WeightsNotFound, "does not hold weights", [(SESSION, bytes(32))]),
            (errors.ShapeMismatch, "model_weights[0][0]: expected float32[], got float32[10]", [(OTHER, weights_id)]),
            (
                errors.InvalidRequest,
                "expected sessions of one model, counting/1, got one of remembering/1",
                [(SESSION, weights_id), (OTHER, weights_id)],
            ),
        ):
            with pytest.raises(error, match=re.escape(message)):
                async with rig.evaluations.begin("", WRITER, False, targets):
                    pass
        with pytest.raises(errors.InvalidRequest, match=r"start\.writer_id: expected 16 bytes"):
            async with rig.evaluations.begin("", b"", False, [(SESSION, weights_id)]):
                pass

    run(scenario, names=("counting", "remembering"))


class Runs:
    """Takes note of how many batches each computation of an evaluation had."""

    def __init__(self, monkeypatch) -> None:
        self.single: list[int] = []
        self.stacked: list[int] = []
        run, run_stacked = EvaluationSteps.run, EvaluationSteps.run_stacked

        async def noting(steps, plan, weights, state, batches, size_bytes):
            self.single.append(len(batches))
            return await run(steps, plan, weights, state, batches, size_bytes)

        async def noting_stacked(steps, plan, evaluator, weights, states, batches, size_bytes, estimates):
            self.stacked.append(len(batches))
            return await run_stacked(steps, plan, evaluator, weights, states, batches, size_bytes, estimates)

        monkeypatch.setattr(EvaluationSteps, "run", noting)
        monkeypatch.setattr(EvaluationSteps, "run_stacked", noting_stacked)


def test_waiting_batches_of_different_sizes_run_together_and_count_as_one_by_one(monkeypatch):
    runs = Runs(monkeypatch)

    async def scenario(rig):
        async with evaluation(rig) as found:
            for number in range(1, 61):
                await found.add(*numbered(number, examples=1 + number % 5))
            found.complete()
            assert (await finish(found))[-1] == 60
        assert (await rig.result(SESSION))["labels"] == sum(number * (1 + number % 5) for number in range(1, 61))
        assert (await rig.sessions.get("", SESSION)).record.updates == 60

    run(scenario)
    assert sum(runs.single) == 60
    assert max(runs.single) > 1


def test_batches_without_rows_count():
    async def scenario(rig):
        async with evaluation(rig) as found:
            for number in range(1, 13):
                await found.add(*numbered(number, examples=0 if number % 4 == 0 else 3))
            found.complete()
            await finish(found)
        assert await counts_of(rig) == (12, 3 * (78 - 24))

    run(scenario)


def test_several_sets_run_together_and_count_what_each_counts_by_itself(monkeypatch):
    ids = [bytes([index]) * 16 for index in range(5)]
    model = registry_of("counting").get("counting", 1).model
    assert model.description.vectorization.largest_difference == 0
    assert not model.description.vectorization.unavailable_reason
    model.evaluator_of_stacks(False, [True])
    runs = Runs(monkeypatch)

    async def scenario(rig):
        for start in (0, 40):
            async with evaluation(rig, *ids) as found:
                for number in range(start + 1, start + 41):
                    await found.add(*numbered(number))
                    if number > start + 2:
                        await found.advance(number - 2)
                found.complete()
                await finish(found)
        for session_id in ids:
            assert await counts_of(rig, session_id) == (80, 3 * 40 * 81)

    run(scenario)
    assert runs.stacked


def test_another_update_of_one_session_does_not_disturb_sets_that_run_together():
    registry_of("counting").get("counting", 1).model.evaluator_of_stacks(False, [True])

    async def scenario(rig):
        async with evaluation(rig, SESSION, OTHER) as found:
            writer = Writer()

            async def update() -> None:
                for _ in range(20):
                    await rig.sessions.update("", writer.identity(), given(counted(1)), 100)

            await asyncio.gather(add_all(found, 30), update())
            found.complete()
            await finish(found)
        assert await counts_of(rig) == (50, 3 * 465 + 60)
        assert await counts_of(rig, OTHER) == (30, 3 * 465)

    run(scenario)
