"""Pipelines: many calls over one stream, each answered as soon as it is done."""

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

# Calls of one stream at once. Beyond it the server stops reading the stream, so that the client has to wait.
_MAX_CALLS = 1024

# Responses that wait for the client to read them.
_MAX_UNSENT_BYTES = 64 * 2**20

# Frames processed in one turn of the event loop, before other calls get their turn.
_FRAMES_AT_ONCE = 64

# The label of a metric for an unknown method, and for a frame that belongs to no call.
_UNKNOWN = "unknown"


class _Running:
    """A running call.

    started: when its last frame arrived, by time.perf_counter. deadline: by the event loop's clock; infinite for none.
    """

    __slots__ = ("deadline", "method", "started", "task")

    task: asyncio.Task[None]

    def __init__(self, method: str, deadline: float) -> None:
        self.method = method
        self.deadline = deadline
        self.started = time.perf_counter()


class Pipeline:
    """The calls of one stream.

    methods: the methods that may be called, by the names of their RPCs. max_message_bytes: the limit for one call.
    admission: limits the bytes of calls that are being received. drain: ends the stream when the received calls are
    answered.
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
        # The size of the outbox that admission counts.
        self._held_bytes = 0
        self._metrics = metrics
        self._drain = drain
        self._running: dict[int, _Running] = {}
        # One timer, for the earliest deadline: most calls end long before theirs.
        self._deadlines: list[tuple[float, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        # _changed wakes the writer; _room wakes the reader and calls that wait to answer. Each then checks its
        # condition.
        self._changed = asyncio.Event()
        self._room = asyncio.Event()

    async def run(self, requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        """The stream's responses, until its requests have ended and every call is answered.

        Raises ServerUnavailable if the server drains first.
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
            # An error in the stream of requests ends the pipeline.
            await reading
        finally:
            if self._timer is not None:
                self._timer.cancel()
            tasks = [reading, *(one.task for one in self._running.values())]
            for task in tasks:
                task.cancel()
            for one in self._running.values():
                self._count(one, "CANCELLED")
            # Before the await below, because gRPC may cancel this coroutine a second time. The cancelled tasks add no
            # more responses.
            self._outbox.clear()
            self._hold_answers()
            self._inbox.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _is_read(self, reading: asyncio.Future[None]) -> bool:
        """Whether another call may still arrive."""
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
            # This call never began: a running call with the same number continues.
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
            # Not after a timeout: another call may have the same number by now.
            if self._running.get(first.call) is running:
                self._end(first.call)

    def _hold_answers(self) -> None:
        """Updates the size of unread responses that admission counts."""
        grown = self._outbox.size_bytes - self._held_bytes
        self._held_bytes += grown
        if grown > 0:
            self._admission.hold(self._principal, grown)
        elif grown < 0:
            self._admission.leave(self._principal, -grown, calls=0)

    async def _wait_until_sent(self, size_bytes: int) -> None:
        """Waits for the client to read responses, before the next call runs. Raises ServerOverloaded.

        size_bytes: the size of the waiting request, which admission counts meanwhile.
        """
        self._admission.enter(self._principal, size_bytes, calls=0)
        try:
            while self._outbox.size_bytes > _MAX_UNSENT_BYTES:
                await self._wait_for_room()
        finally:
            self._admission.leave(self._principal, size_bytes, calls=0)

    def _set_timer(self) -> None:
        """Sets the timer to the earliest deadline of a running call."""
        deadlines = self._deadlines
        while deadlines and not self._is_running(*deadlines[0]):
            heapq.heappop(deadlines)
        if len(deadlines) > 2 * _MAX_CALLS:
            # The deadlines of ended calls accumulate behind that of one long call.
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
        """Cancels the calls whose deadline has passed."""
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
        """Counts a call that has ended, before its response is sent: a client may read the metrics at once."""
        self._metrics.pipeline_call(running.method, status, time.perf_counter() - running.started)

    def _put_error(self, call: int, error: errors.ForwardPassError) -> None:
        self._outbox.put(call, frames.encode_error(error))
        self._changed.set()

    def _end(self, call: int) -> None:
        del self._running[call]
        self._room.set()
        if not self._running:
            self._changed.set()
