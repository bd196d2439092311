"""Calls over one stream: each answered as soon as it is done."""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections.abc import AsyncIterator, Mapping

from forwardpass.wire import errors, frames
from forwardpass.wire.frames import Frame, Outbox
from forwardpass_server.access import principals
from forwardpass_server.calls.admission import Admission
from forwardpass_server.rpc.admitted_inbox import AdmittedInbox
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.rpc.failures import failure_of
from forwardpass_server.rpc.handlers import Method
from forwardpass_server.telemetry.rpcs import RpcMetrics

# Of one stream at once; beyond it no more is read of it, and its caller has to wait.
_MAX_CALLS = 1024

# Of answers that wait for their caller to read them.
_MAX_UNSENT_BYTES = 64 * 2**20

# Taken without a look at other callers.
_FRAMES_AT_ONCE = 64

# What is counted for a method that a caller made up, or that a stray piece does not name.
_UNKNOWN = "unknown"


class _Running:
    """A call that is being answered. started: by time.perf_counter, when all of it was there.

    deadline: by the event loop's clock; infinite where it has none.
    """

    __slots__ = ("deadline", "method", "started", "task")

    task: asyncio.Task[None]

    def __init__(self, method: str, deadline: float) -> None:
        self.method = method
        self.deadline = deadline
        self.started = time.perf_counter()


class Pipeline:
    """The calls of one stream.

    methods: what may be called, by the name of its RPC. max_message_bytes: of one call. admission: is asked for the
    bytes of those that arrive in pieces. drain: ends the stream once what was received of it is answered.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        max_message_bytes: int,
        admission: Admission,
        metrics: RpcMetrics,
        drain: Drain,
    ) -> None:
        self._methods = methods
        self._admission = admission
        self._principal = principals.current()
        self._inbox = AdmittedInbox(max_message_bytes, admission, self._principal)
        self._outbox = Outbox(answers=True)
        # Of the outbox, as the admission has it.
        self._held_bytes = 0
        self._metrics = metrics
        self._drain = drain
        self._running: dict[int, _Running] = {}
        # One timer, for the first of them: of most calls' deadlines nothing is ever heard.
        self._deadlines: list[tuple[float, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        # Set by whatever the writer, or the reader, or an answer may wait for; each looks for itself what it was.
        self._changed = asyncio.Event()
        self._room = asyncio.Event()

    async def run(self, requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        """The stream's responses, until its requests have ended and every call is answered.

        Raises ServerUnavailable where the server leaves first.
        """
        reading = asyncio.ensure_future(self._read(requests, context))
        reading.add_done_callback(lambda _: self._changed.set())
        try:
            with self._drain.notifying(self._changed.set):
                while self._is_read(reading) or self._running or self._outbox:
                    while self._outbox:
                        yield self._outbox.next_message()
                        self._hold_answers()
                        self._room.set()
                    if self._is_read(reading) or self._running:
                        await self._changed.wait()
                        self._changed.clear()
            if not reading.done():
                raise self._drain.error()
            # What was wrong with the requests is wrong with the stream.
            await reading
        finally:
            if self._timer is not None:
                self._timer.cancel()
            tasks = [reading, *(one.task for one in self._running.values())]
            for task in tasks:
                task.cancel()
            for one in self._running.values():
                self._count(one, "CANCELLED")
            # Before anything is awaited: gRPC may cancel this a second time. Tasks that are cancelled add nothing more.
            self._outbox.clear()
            self._hold_answers()
            self._inbox.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _is_read(self, reading: asyncio.Future[None]) -> bool:
        """Whether another call may still come."""
        return not reading.done() and not self._drain.has_begun

    async def _read(self, requests: AsyncIterator[bytes], context: object) -> None:
        async for message in requests:
            if self._drain.has_begun:
                raise self._drain.error()
            for index, frame in enumerate(frames.decode_calls(message), 1):
                self._take(frame, context)
                while len(self._running) + len(self._outbox) >= _MAX_CALLS:
                    await self._wait_for_room()
                if not index % _FRAMES_AT_ONCE:
                    await asyncio.sleep(0)

    async def _wait_for_room(self) -> None:
        self._room.clear()
        await self._room.wait()

    def _take(self, frame: Frame, context: object) -> None:
        try:
            whole = self._inbox.take(frame)
            if whole is None:
                return
            first, data = whole
            method = self._methods.get(first.method)
            if method is None:
                raise errors.MethodNotSupported(
                    place=f"method of call {first.call}",
                    expected=f"one of {', '.join(self._methods)}",
                    found=first.method,
                )
            if first.call in self._running:
                raise errors.InvalidRequest(place=f"call {first.call}", expected="another number", found="one in use")
        except errors.ForwardPassError as error:
            # Never begun: a call of the same number that is running goes on.
            self._metrics.pipeline_call(frame.method if frame.method in self._methods else _UNKNOWN, error.status, 0.0)
            self._put_error(frame.call, error)
            return
        loop = asyncio.get_running_loop()
        running = _Running(first.method, loop.time() + first.timeout_s if first.timeout_s > 0 else math.inf)
        running.task = loop.create_task(self._answer(running, first, method, data, context))
        self._running[first.call] = running
        if first.timeout_s > 0:
            heapq.heappush(self._deadlines, (running.deadline, first.call))
            self._set_timer()

    async def _answer(
        self, running: _Running, first: Frame, method: Method, data: bytes | memoryview, context: object
    ) -> None:
        try:
            if self._outbox.size_bytes > _MAX_UNSENT_BYTES:
                await self._wait_until_sent(len(data))
            response = await method(data, context)
        except Exception as error:
            failure = failure_of(error, f"call {first.method} of a pipeline")
            self._count(running, failure.status)
            self._put_error(first.call, failure)
        else:
            self._count(running, "OK")
            self._outbox.put(first.call, frames.encode_answer(len(response)), response)
            self._hold_answers()
            self._changed.set()
        finally:
            # One that has expired is not there any more, and another may have its number.
            if self._running.get(first.call) is running:
                self._end(first.call)

    def _hold_answers(self) -> None:
        """Tells the admission how much has been answered and not been read."""
        grown = self._outbox.size_bytes - self._held_bytes
        self._held_bytes += grown
        if grown > 0:
            self._admission.hold(self._principal, grown)
        elif grown < 0:
            self._admission.leave(self._principal, -grown, calls=0)

    async def _wait_until_sent(self, size_bytes: int) -> None:
        """Waits for the caller to read answers: no more are made before. Raises ServerOverloaded.

        size_bytes: of the request that waits, which is counted meanwhile.
        """
        self._admission.enter(self._principal, size_bytes, calls=0)
        try:
            while self._outbox.size_bytes > _MAX_UNSENT_BYTES:
                await self._wait_for_room()
        finally:
            self._admission.leave(self._principal, size_bytes, calls=0)

    def _set_timer(self) -> None:
        """Sees to it that the first deadline of a call that runs is noticed."""
        deadlines = self._deadlines
        while deadlines and not self._is_running(*deadlines[0]):
            heapq.heappop(deadlines)
        if len(deadlines) > 2 * _MAX_CALLS:
            # Behind one call that takes long those pile up that have ended.
            deadlines[:] = [one for one in deadlines if self._is_running(*one)]
            heapq.heapify(deadlines)
        if deadlines and (self._timer is None or deadlines[0][0] < self._timer.when()):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(deadlines[0][0], self._expire)

    def _is_running(self, deadline: float, call: int) -> bool:
        running = self._running.get(call)
        return running is not None and running.deadline == deadline

    def _expire(self) -> None:
        """Gives up the calls whose time is over."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, call = heapq.heappop(self._deadlines)
            if self._is_running(deadline, call):
                running = self._running[call]
                running.task.cancel()
                self._end(call)
                error = errors.DeadlineExceeded()
                self._count(running, error.status)
                self._put_error(call, error)
        self._set_timer()

    def _count(self, running: _Running, status: str) -> None:
        """Counts a call that ends, before its caller hears of it: who may look at once."""
        self._metrics.pipeline_call(running.method, status, time.perf_counter() - running.started)

    def _put_error(self, call: int, error: errors.ForwardPassError) -> None:
        self._outbox.put(call, frames.encode_error(error))
        self._changed.set()

    def _end(self, call: int) -> None:
        del self._running[call]
        self._room.set()
        if not self._running:
            self._changed.set()
