"""Calls over one stream: each answered as soon as it is done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping

from forwardpass.wire import errors, frames
from forwardpass.wire.frames import Frame, Inbox, Outbox
from forwardpass_server.rpc.failures import failure_of
from forwardpass_server.rpc.handlers import Method
from forwardpass_server.telemetry.metrics import Metrics

# Of one stream at once; beyond it no more is read of it, and its caller has to wait.
_MAX_CALLS = 1024

# Of answers that wait for their caller to read them.
_MAX_UNSENT_BYTES = 64 * 2**20

# Taken without a look at other callers.
_FRAMES_AT_ONCE = 64

# What is counted for a method that a caller made up, or that a stray piece does not name.
_UNKNOWN = "unknown"


class Pipeline:
    """The calls of one stream.

    methods: what may be called, by the name of its RPC. max_message_bytes: of one call. max_bytes: of all that are
    arriving.
    """

    def __init__(self, methods: Mapping[str, Method], max_message_bytes: int, max_bytes: int, metrics: Metrics) -> None:
        self._methods = methods
        self._inbox = Inbox(max_message_bytes, max_bytes)
        self._outbox = Outbox(answers=True)
        self._metrics = metrics
        self._tasks: dict[int, asyncio.Task[None]] = {}
        # Of calls that are neither answered nor counted: the method, and when all of the call was there.
        self._unanswered: dict[int, tuple[str, float]] = {}
        # Set by whatever the writer, or the reader, or an answer may wait for; each looks for itself what it was.
        self._changed = asyncio.Event()
        self._room = asyncio.Event()

    async def run(self, requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        """The stream's responses, until its requests have ended and every call is answered."""
        reading = asyncio.ensure_future(self._read(requests, context))
        reading.add_done_callback(lambda _: self._changed.set())
        try:
            while not reading.done() or self._tasks or self._outbox:
                while self._outbox:
                    yield self._outbox.next_message()
                    self._room.set()
                if not reading.done() or self._tasks:
                    await self._changed.wait()
                    self._changed.clear()
            # What was wrong with the requests is wrong with the stream.
            await reading
        finally:
            running = [reading, *self._tasks.values()]
            for task in running:
                task.cancel()
            for call in list(self._unanswered):
                self._count(call, "CANCELLED")
            await asyncio.gather(*running, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[bytes], context: object) -> None:
        async for message in requests:
            for index, frame in enumerate(frames.decode_calls(message), 1):
                self._take(frame, context)
                while len(self._tasks) + len(self._outbox) >= _MAX_CALLS:
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
            if first.call in self._tasks:
                raise errors.InvalidRequest(place=f"call {first.call}", expected="another number", found="one in use")
        except errors.ForwardPassError as error:
            # Never begun: a call of the same number that is running goes on.
            self._metrics.pipeline_call(frame.method if frame.method in self._methods else _UNKNOWN, error.status, 0.0)
            self._put_error(frame.call, error)
            return
        self._unanswered[first.call] = first.method, time.perf_counter()
        task = asyncio.ensure_future(self._answer(first, method, data, context))
        self._tasks[first.call] = task
        if first.timeout_s > 0:
            timer = asyncio.get_running_loop().call_later(first.timeout_s, self._expire, first.call, task)
            task.add_done_callback(lambda _: timer.cancel())
        task.add_done_callback(lambda _: self._end(first.call))

    async def _answer(self, first: Frame, method: Method, data: bytes | memoryview, context: object) -> None:
        # A caller that reads no answers gets no more made.
        while self._outbox.size_bytes > _MAX_UNSENT_BYTES:
            await self._wait_for_room()
        try:
            response = await method(data, context)
        except Exception as error:
            self._fail(first.call, failure_of(error, f"call {first.method} of a pipeline"))
        else:
            self._count(first.call, "OK")
            self._outbox.put(first.call, frames.encode_answer(len(response)), response)
            self._changed.set()

    def _expire(self, call: int, task: asyncio.Task[None]) -> None:
        if task.cancel():
            self._fail(call, errors.DeadlineExceeded())

    def _fail(self, call: int, error: errors.ForwardPassError) -> None:
        self._count(call, error.status)
        self._put_error(call, error)

    def _count(self, call: int, status: str) -> None:
        """Counts a call that ends, once, before its caller hears of it: who may look at once."""
        method, started = self._unanswered.pop(call, (None, 0.0))
        if method is not None:
            self._metrics.pipeline_call(method, status, time.perf_counter() - started)

    def _put_error(self, call: int, error: errors.ForwardPassError) -> None:
        self._outbox.put(call, frames.encode_error(error))
        self._changed.set()

    def _end(self, call: int) -> None:
        del self._tasks[call]
        self._room.set()
        if not self._tasks:
            self._changed.set()
