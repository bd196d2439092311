"""A stream of numbered batches, each run once and in order in every lane, and acknowledged by its number."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from forwardpass.wire import errors
from forwardpass.wire.structures import Structure
from forwardpass_server.calls import ids
from forwardpass_server.calls.admission import Admission

# Batches in progress; beyond these limits no further message is read from the stream, so that its client has to wait.
_MAX_BATCHES = 32
_MAX_BYTES = 64 * 2**20

# One commit costs as much as running a small batch, so up to eight batches share one. Eight is a fraction of what is in
# progress: some batches are always acknowledged while others run. With a slow model a batch is committed after 20 ms,
# so that a client that shows its progress does not wait.
_BATCHES_PER_COMMIT = 8
_COMMIT_DELAY_S = 0.02

# A batch waits for others that are on their way, until none has come for so many turns of the event loop. A turn takes
# some microseconds, and gRPC delivers a message in two or three.
_QUIET_TURNS = 12

ResultT = TypeVar("ResultT")

Reader = Callable[[], Awaitable[Mapping[str, Structure]]]
"""Decodes the structures of a request, named as in its message. Called once the request is admitted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One batch. sequence: its number, from 1. parts: its structures, named as in its message.

    update_id: of the update that the batch is; None in a stream whose batches are no updates of a session.
    """

    sequence: int
    update_id: bytes | None
    parts: Mapping[str, Structure]
    size_bytes: int


class Lane(Protocol[ResultT]):
    """What is done with each batch: one lane of an evaluation is one set of weights and its session."""

    @property
    def position(self) -> int:
        """The number of the last batch that was committed by an earlier stream; 0 for none."""

    @property
    def joins(self) -> int:
        """How many batches `run` would take, so that it is worth a wait of microseconds for them; 1 for no wait."""

    async def run(self, batches: Sequence[Batch]) -> tuple[int, ResultT]:
        """Runs the first of these batches, or several from the first on. Returns how many, and their result.

        Called for one batch after the other. What it raises ends the stream at the first of these batches.
        """

    def commit(self, result: ResultT) -> asyncio.Future[None]:
        """Starts to commit what `run` returned, after what it returned before.

        Called for several results in one turn of the event loop, so that one write can commit them all.
        The future fails where the result cannot be committed, which ends the stream at the first of its batches.
        """


class _Progress(Generic[ResultT]):
    """A lane, its batches that are still to be run, and the number of the last batch that it has committed."""

    def __init__(self, lane: Lane[ResultT]) -> None:
        self.lane = lane
        self.committed = lane.position
        self._waiting: collections.deque[Batch] = collections.deque()
        self._has_batch = asyncio.Event()

    def put(self, batch: Batch) -> None:
        """Adds the next batch."""
        self._waiting.append(batch)
        self._has_batch.set()

    def done(self, count: int) -> None:
        """Removes the first batches."""
        for _ in range(count):
            self._waiting.popleft()

    @property
    def is_idle(self) -> bool:
        """Whether no batch waits."""
        return not self._waiting

    async def next(self) -> list[Batch]:
        """The batches that wait; waits for one, and a little for as many as the lane would take."""
        while not self._waiting:
            self._has_batch.clear()
            await self._has_batch.wait()
        quiet, known = 0, len(self._waiting)
        while known < self.lane.joins and quiet < _QUIET_TURNS:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == known else 0
            known = len(self._waiting)
        return list(itertools.islice(self._waiting, _BATCHES_PER_COMMIT))


class _Finished(NamedTuple, Generic[ResultT]):
    """Batches that were run together, from the number `first` to `last`, and what `Lane.run` returned for them."""

    first: int
    last: int
    result: ResultT


class OrderedBatches(Generic[ResultT]):
    """Runs a stream of batches. `position`: every lane has committed all batches up to this number.

    Used on one event loop only. `end` must be called.
    """

    def __init__(self, lanes: Sequence[Lane[ResultT]], admission: Admission, principal: str) -> None:
        self._admission = admission
        self._principal = principal
        self._lanes = [_Progress(lane) for lane in lanes]
        self.position = min(lane.committed for lane in self._lanes)
        self._last_added = 0
        self._is_complete = False
        # The first batch that failed, and its error: no batch after it is run.
        self._failed: tuple[int, Exception] | None = None
        # Batches that some lane has not committed yet. Each is admitted as a call.
        self._in_progress: dict[int, Batch] = {}
        self._in_progress_bytes = 0
        self._changed = asyncio.Event()
        self._workers = [asyncio.ensure_future(self._work(lane)) for lane in self._lanes]

    @property
    def in_progress(self) -> int:
        """How many batches were added and are not committed in every lane yet."""
        return len(self._in_progress)

    async def add(self, sequence: int, update_id: bytes | None, size_bytes: int, read: Reader) -> None:
        """Adds the next batch; waits while too many are in progress.

        update_id: see `Batch`. size_bytes: of its message. read: decodes its structures.
        Raises InvalidRequest for a batch that does not follow the one before. All other errors of a batch, such as
        ServerOverloaded where too many requests wait already, are raised by `advance`.
        """
        if update_id is not None:
            ids.check(update_id, "update_id")
        # A client may send batches again that were committed before the last stream broke.
        expected = (
            range(self._last_added + 1, self._last_added + 2) if self._last_added else range(1, self.position + 2)
        )
        if sequence not in expected:
            raise errors.InvalidRequest(place="call", expected=f"batch {expected[-1]}", found=f"{sequence}")
        self._last_added = sequence
        if sequence <= self.position:
            return
        try:
            # Admit it first: its message takes memory while it waits for its turn.
            await self._admit(size_bytes)
            try:
                await self._until(lambda: self._has_room(size_bytes))
                batch = Batch(sequence, update_id, await read(), size_bytes)
            except BaseException:
                self._admission.leave(self._principal, size_bytes)
                raise
        except errors.ForwardPassError as error:
            self._fail(sequence, _of_batch(error, sequence))
            return
        self._in_progress[sequence] = batch
        self._in_progress_bytes += size_bytes
        for lane in self._lanes:
            lane.put(batch)

    def _has_room(self, size_bytes: int) -> bool:
        return (
            not self._in_progress
            or self._failed is not None
            or (len(self._in_progress) < _MAX_BATCHES and self._in_progress_bytes + size_bytes <= _MAX_BYTES)
        )

    async def _admit(self, size_bytes: int) -> None:
        """Admits a batch as one of the server's calls. Waits for room; meanwhile the stream is not read.

        Raises ServerOverloaded where too many requests wait already.
        """
        while True:
            try:
                self._admission.enter(self._principal, size_bytes)
            except errors.ServerOverloaded as error:
                with self._admission.waiting(self._principal, size_bytes, error):
                    await asyncio.sleep(error.retry_after_s)
            else:
                return

    @property
    def is_complete(self) -> bool:
        """Whether no further batch will be added."""
        return self._is_complete

    def complete(self) -> None:
        """Tells that no further batch will be added."""
        self._is_complete = True
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Ends the stream with this error, after the batches that were added."""
        self._fail(self._last_added + 1, error)

    async def advance(self, position: int) -> int | None:
        """Waits until more batches than those up to `position` are committed.

        Returns the number of the last committed batch; None after the last one of the stream.
        Raises the error of the first batch that failed, once all batches before it are committed. Its message names the
        batch.
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
        return self._is_complete and self.position >= self._last_added

    async def _work(self, progress: _Progress[ResultT]) -> None:
        """Runs the batches of one lane, and commits several at a time."""
        finished: list[_Finished[ResultT]] = []
        commit_at_s, first, last = 0.0, 0, 0
        try:
            while True:
                count = last + 1 - finished[0].first if finished else 0
                if progress.is_idle or count >= _BATCHES_PER_COMMIT or time.monotonic() >= commit_at_s:
                    self._commit(progress, finished)
                batches = await progress.next()
                first = batches[0].sequence
                if first <= progress.committed:
                    # An earlier stream committed it in this lane, and broke before another lane had committed it.
                    progress.done(1)
                    continue
                if self._failed is not None:
                    batches = [batch for batch in batches if batch.sequence < self._failed[0]]
                    if not batches:
                        return
                if not finished:
                    commit_at_s = time.monotonic() + _COMMIT_DELAY_S
                count, result = await progress.lane.run(batches)
                progress.done(count)
                last = first + count - 1
                finished.append(_Finished(first, last, result))
        except Exception as error:
            self._fail(first, _of_batch(error, first))
        finally:
            # Also after the stream broke: these batches need not be run again.
            self._commit(progress, finished)

    def _commit(self, progress: _Progress[ResultT], finished: list[_Finished[ResultT]]) -> None:
        for one in finished:
            committed = progress.lane.commit(one.result)
            committed.add_done_callback(functools.partial(self._committed, progress, one.first, one.last))
        finished.clear()

    def _committed(self, progress: _Progress[ResultT], first: int, last: int, future: asyncio.Future[None]) -> None:
        """The commit of batches in one lane has ended, or failed."""
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, Exception):
            self._fail(first, _of_batch(error, first))
            return
        progress.committed = last
        self.position = min(lane.committed for lane in self._lanes)
        for done in [one for one in self._in_progress if one <= self.position]:
            self._leave(self._in_progress.pop(done))
        self._changed.set()

    def _fail(self, sequence: int, error: Exception) -> None:
        if self._failed is None or sequence < self._failed[0]:
            self._failed = sequence, error
        self._changed.set()

    async def end(self) -> None:
        """Stops running batches. Those that were run are committed."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for batch in self._in_progress.values():
            self._leave(batch)
        self._in_progress.clear()

    def _leave(self, batch: Batch) -> None:
        self._admission.leave(self._principal, batch.size_bytes)
        self._in_progress_bytes -= batch.size_bytes


def _of_batch(error: Exception, sequence: int) -> Exception:
    """The error with the batch's number in its place. Errors that callers are not told of stay as they are."""
    if not isinstance(error, errors.ForwardPassError):
        return error
    found = type(error)(f"batch {sequence}: {error}", retry_after_s=error.retry_after_s)
    found.place, found.expected, found.found = f"batch {sequence}", error.expected, error.found
    return found
