"""Batches run under one or several sets of weights, each counted in a session of its own, in order."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from forwardpass.wire import errors
from forwardpass.wire.description import Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.execution import Executor, Invocation
from forwardpass_server.sessions.records import UpdateIdentity, check_id
from forwardpass_server.sessions.service import Reader, Sessions, update_parts
from forwardpass_server.sessions.session import Session, Update
from forwardpass_server.weights.store import WeightStore

# On their way at once; beyond it no more is read of the stream, and its caller has to wait.
_MAX_BATCHES = 32
_MAX_BYTES = 64 * 2**20

# A commit costs as much as running a small batch; a fraction of what is on its way, so that some is always acknowledged
# while others run. Who looks at the progress of a slow model is not kept waiting.
_BATCHES_PER_COMMIT = 8
_HELD_BACK_S = 0.02

MAX_TARGETS = 1024
"""Of one evaluation. Each takes a worker, and weights that stay on the device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One batch. parts: batch_input.x, batch_input.y, and maybe sample_weight."""

    sequence: int
    update_id: bytes
    parts: Mapping[str, Structure]
    size_bytes: int


class _Target:
    """Weights, and the session in which the batches that they are tried on are counted. counted: the last of them."""

    def __init__(self, session: Session, weights_id: bytes, counted: int) -> None:
        self.session = session
        self.weights_id = weights_id
        self.counted = counted
        self.batches: asyncio.Queue[Batch] = asyncio.Queue()


class Evaluations:
    """Begins evaluations."""

    def __init__(self, sessions: Sessions, weights: WeightStore, executor: Executor, admission: Admission) -> None:
        self._sessions = sessions
        self._weights = weights
        self._executor = executor
        self._admission = admission

    @contextlib.asynccontextmanager
    async def begin(
        self, principal: str, writer_id: bytes, training: bool, targets: Sequence[tuple[bytes, bytes]]
    ) -> AsyncIterator[Evaluation]:
        """An evaluation, whose weights stay on the device as long as it lasts.

        targets: pairs of a session's id and a weights id. writer_id: of the updates of each session.
        Raises InvalidRequest, SessionNotFound, SessionExpired, WeightsNotFound, WeightStoreFull.
        """
        check_id(writer_id, "start.writer_id")
        if not 1 <= len(targets) <= MAX_TARGETS:
            raise errors.InvalidRequest(place="start.targets", expected=f"1 to {MAX_TARGETS}", found=f"{len(targets)}")
        if len({session_id for session_id, _ in targets}) < len(targets):
            # Each batch would count once, under whichever weights came first.
            raise errors.InvalidRequest(place="start.targets", expected="a session for each", found="one of them twice")
        async with contextlib.AsyncExitStack() as stack:
            found: list[Session] = []
            for session_id, weights_id in targets:
                session = await self._sessions.get(principal, session_id)
                if session.servable.identity != (found or [session])[0].servable.identity:
                    raise errors.InvalidRequest(
                        place="start.targets",
                        expected=f"sessions of one model, {found[0].servable.identity}",
                        found=f"one of {session.servable.identity}",
                    )
                found.append(session)
                weights = await stack.enter_async_context(self._weights.use(principal, weights_id))
                weights.leaves(session.servable.identity.content_hash, session.servable.spec.weights)
            evaluation = Evaluation(
                self._sessions,
                self._executor,
                self._admission,
                principal,
                writer_id,
                training,
                [
                    _Target(session, weights_id, session.record.sequence(writer_id))
                    for session, (_, weights_id) in zip(found, targets, strict=True)
                ],
            )
            try:
                yield evaluation
            finally:
                await evaluation.end()


class Evaluation:
    """One evaluation. `position`: the last batch that has counted in every session, and all before it."""

    def __init__(
        self,
        sessions: Sessions,
        executor: Executor,
        admission: Admission,
        principal: str,
        writer_id: bytes,
        training: bool,
        targets: Sequence[_Target],
    ) -> None:
        self._sessions = sessions
        self._executor = executor
        self._admission = admission
        self._principal = principal
        self._writer_id = writer_id
        self._training = training
        self._targets = targets
        self.identity = targets[0].session.servable.identity
        self.position = min(target.counted for target in targets)
        self._added = 0
        self._is_complete = False
        # Of the first batch that failed: nothing behind it is run.
        self._failed: tuple[int, Exception] | None = None
        # Batches that have not counted everywhere, and what ends their stay among the server's calls.
        self._arriving: dict[int, tuple[Batch, contextlib.ExitStack]] = {}
        self._changed = asyncio.Event()
        self._workers = [asyncio.ensure_future(self._work(target)) for target in targets]

    async def add(self, sequence: int, update_id: bytes, size_bytes: int, read: Reader) -> None:
        """Takes the next batch; waits while as many as may be are on their way.

        size_bytes: of its message. read: decodes batch_input.x, batch_input.y, and maybe sample_weight.
        Raises InvalidRequest for one that does not follow the one before. What is wrong with it otherwise is raised by
        `advance`: ServerOverloaded too, where too much waits already.
        """
        check_id(update_id, "update_id")
        expected = range(self._added + 1, self._added + 2) if self._added else range(1, self.position + 2)
        if sequence not in expected:
            raise errors.InvalidRequest(place="call", expected=f"batch {expected[-1]}", found=f"{sequence}")
        self._added = sequence
        if sequence <= self.position:
            return
        try:
            # Before anything else is waited for: what waits holds its memory.
            with await self._admitted(size_bytes) as admitted:
                await self._until(lambda: self._has_room(size_bytes))
                batch = Batch(sequence, update_id, await read(), size_bytes)
                self._arriving[sequence] = batch, admitted.pop_all()
        except errors.ForwardPassError as error:
            self._fail(sequence, _of_batch(error, sequence))
            return
        for target in self._targets:
            target.batches.put_nowait(batch)

    def _has_room(self, size_bytes: int) -> bool:
        arriving_bytes = sum(batch.size_bytes for batch, _ in self._arriving.values())
        return (
            not self._arriving
            or self._failed is not None
            or (len(self._arriving) < _MAX_BATCHES and arriving_bytes + size_bytes <= _MAX_BYTES)
        )

    async def _admitted(self, size_bytes: int) -> contextlib.ExitStack:
        """Counts a batch among the server's calls. One that does not fit waits, and holds up its caller with it.

        Raises ServerOverloaded where too much waits already.
        """
        stack = contextlib.ExitStack()
        while True:
            try:
                stack.enter_context(self._admission.admitted(self._principal, size_bytes))
            except errors.ServerOverloaded as error:
                with self._admission.waiting(self._principal, size_bytes, error):
                    await asyncio.sleep(error.retry_after_s)
            else:
                return stack

    def complete(self) -> None:
        """No batch follows those that were added."""
        self._is_complete = True
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Nothing follows: what comes next is broken."""
        self._fail(self._added + 1, error)

    async def advance(self, position: int) -> int | None:
        """Waits until more batches have counted than up to `position`, and returns up to which; None after the last.

        Raises what went wrong with a batch, once those before it have counted. Which it was stands in the message.
        """
        await self._until(lambda: self.position > position or self._is_over())
        if self.position > position:
            return self.position
        if self._failed is not None:
            raise self._failed[1]
        return None

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _is_over(self) -> bool:
        if self._failed is not None:
            return self.position >= self._failed[0] - 1
        return self._is_complete and self.position >= self._added

    async def _work(self, target: _Target) -> None:
        """Runs batch after batch. What has been run is counted some at a time, in one commit."""
        ready: list[tuple[int, Update]] = []
        due = 0.0
        try:
            while True:
                if target.batches.empty() or len(ready) >= _BATCHES_PER_COMMIT or time.monotonic() >= due:
                    self._hand_over(target, ready)
                batch = await target.batches.get()
                if batch.sequence <= target.counted:
                    # By an earlier stream, that broke before another session had counted it.
                    continue
                if self._failed is not None and batch.sequence >= self._failed[0]:
                    return
                if not ready:
                    due = time.monotonic() + _HELD_BACK_S
                ready.append((batch.sequence, await self._run(target, batch)))
        except Exception as error:
            self._fail(batch.sequence, _of_batch(error, batch.sequence))
        finally:
            # Of a stream that broke, too: what has been run need not be run again.
            self._hand_over(target, ready)

    def _hand_over(self, target: _Target, ready: list[tuple[int, Update]]) -> None:
        """To the session, which counts all of it in its next commit."""
        for sequence, update in ready:
            counted = self._sessions.submit(target.session, update)
            counted.add_done_callback(functools.partial(self._note, target, sequence))
        ready.clear()

    async def _run(self, target: _Target, batch: Batch) -> Update:
        model = target.session.servable
        invocation = Invocation(
            Function.FORWARD_PASS,
            batch.parts,
            batch.size_bytes,
            self._training,
            target.weights_id,
            self._principal,
            is_alone=True,
        )
        results = await self._executor.run(model, invocation)
        identity = UpdateIdentity(target.session.key.session_id, self._writer_id, batch.sequence, batch.update_id)
        return self._sessions.counting(identity, update_parts(batch.parts, results), batch.size_bytes)

    def _note(self, target: _Target, sequence: int, future: asyncio.Future[None]) -> None:
        """A batch has counted in a session, or not."""
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, Exception):
            self._fail(sequence, _of_batch(error, sequence))
            return
        target.counted = sequence
        self.position = min(target.counted for target in self._targets)
        for arrived in [one for one in self._arriving if one <= self.position]:
            _, admitted = self._arriving.pop(arrived)
            admitted.close()
        self._changed.set()

    def _fail(self, sequence: int, error: Exception) -> None:
        if self._failed is None or sequence < self._failed[0]:
            self._failed = sequence, error
        self._changed.set()

    async def end(self) -> None:
        """Ends what runs. What was handed to a session is stored."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for _, admitted in self._arriving.values():
            admitted.close()
        self._arriving.clear()


def _of_batch(error: Exception, sequence: int) -> Exception:
    """The error with the batch's number in its place, where it is one that callers are told of."""
    if not isinstance(error, errors.ForwardPassError):
        return error
    found = type(error)(f"batch {sequence}: {error}", retry_after_s=error.retry_after_s)
    found.place, found.expected, found.found = f"batch {sequence}", error.expected, error.found
    return found
