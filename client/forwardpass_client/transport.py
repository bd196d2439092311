"""gRPC channels: the only module that knows them. Bytes out, bytes in, errors of the catalogue."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from types import TracebackType
from typing import Any

import grpc

from forwardpass.wire import errors
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.methods import MODEL_SERVICE, SERVICES, SESSION_SERVICE, WEIGHTS_SERVICE
from forwardpass_client import long_calls
from forwardpass_client.credentials import Credentials
from forwardpass_client.transfers import Exchange, Pause, Receive, Send, Steps, Unary

# Every method is a pure function of its request, or an update that is applied once however often it comes: a call that
# a server dropped, or never got, may be sent again.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": MODEL_SERVICE}, {"service": WEIGHTS_SERVICE}, {"service": SESSION_SERVICE}],
            "retryPolicy": {
                # gRPC allows no more than 5. Together they span some 3 s, the restart of a process.
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                # A server that stops answers CANCELLED to calls that it had begun.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        },
        {
            # Streams are taken up where they broke: gRPC would have to keep all that was sent.
            "name": [
                {"service": service, "method": name}
                for service, methods in SERVICES.items()
                for name, method in methods.items()
                if not method.is_unary
            ]
        },
    ]
}


_CLOSED = "the client is closed"


def _options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        # A request longer than this buffer would not be sent again.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # Within the patience of whoever waits for a server that starts anew; else gRPC waits for longer each time.
        ("grpc.max_reconnect_backoff_ms", 2000),
        # A peer that is gone without a word is noticed while a call waits for it.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
    ]


class Transport:
    """Calls over one channel, from any thread."""

    def __init__(self, credentials: Credentials, max_message_bytes: int) -> None:
        self._channel = credentials.channel(grpc, _options(max_message_bytes))
        self._metadata = credentials.metadata
        self._max_message_bytes = max_message_bytes
        self._errors = _Errors()
        self._methods: dict[str, Any] = {}

    def call(self, path: str, request: bytes | Pieces, timeout_s: float | None) -> bytes:
        """One unary call. Raises the error that its status stands for."""
        if len(request) >= long_calls.MIN_BYTES:
            answer: bytes = self.run(long_calls.steps(path, request, timeout_s, self._max_message_bytes), timeout_s)
            return answer
        method = self._methods.get(path) or self._methods.setdefault(path, self._channel.unary_unary(path))
        with self._errors:
            response: bytes = method(request, timeout=timeout_s, metadata=self._metadata())
        return response

    def run(self, steps: Steps, timeout_s: float | None) -> Any:
        """Makes the calls that `steps` asks for, and returns what it returns. timeout_s: for each unary call."""
        answer = _Answer(steps)
        while not answer.is_done:
            try:
                answer.give(self._perform(answer.step, timeout_s))
            except errors.ForwardPassError as error:
                if self.is_closed:
                    # Nothing can be tried again.
                    raise
                answer.fail(error)
        return answer.result

    def _perform(self, step: Any, timeout_s: float | None) -> Any:
        if isinstance(step, Unary):
            return self.call(step.path, step.request, timeout_s if step.timeout_s is None else step.timeout_s)
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, Exchange):
            with contextlib.closing(self.stream(step.path, step.requests, step.timeout_s)) as exchanged:
                return next((answer for answer in map(step.take, exchanged) if answer is not None), None)
        with self._errors:
            if isinstance(step, Send):
                return self._channel.stream_unary(step.path)(
                    iter(step.requests), timeout=step.timeout_s, metadata=self._metadata()
                )
            assert isinstance(step, Receive)
            responses = self._channel.unary_stream(step.path)(
                step.request, timeout=step.timeout_s, metadata=self._metadata()
            )
            try:
                for response in responses:
                    step.take(response)
            finally:
                responses.cancel()

    def stream(
        self,
        path: str,
        requests: Iterator[bytes],
        timeout_s: float | None = None,
        opened: Callable[[Callable[[], None]], None] = lambda cancel: None,
    ) -> Generator[bytes, None, None]:
        """The responses of a stream. gRPC asks for the requests on a thread of its own.

        opened: is given what ends the stream, for another thread.
        """
        with self._errors:
            responses = self._channel.stream_stream(path)(requests, timeout=timeout_s, metadata=self._metadata())
            opened(responses.cancel)
            try:
                yield from responses
            finally:
                responses.cancel()

    @property
    def is_closed(self) -> bool:
        return self._errors.is_closed

    def close(self) -> None:
        self._errors.is_closed = True
        self._channel.close()


class AsyncTransport:
    """Calls over one channel, on the event loop that made it."""

    def __init__(self, credentials: Credentials, max_message_bytes: int) -> None:
        self._channel = credentials.channel(grpc.aio, _options(max_message_bytes))
        self._metadata = credentials.metadata
        self._max_message_bytes = max_message_bytes
        self._errors = _Errors()
        self._methods: dict[str, Any] = {}

    async def call(self, path: str, request: bytes | Pieces, timeout_s: float | None) -> bytes:
        """One unary call. Raises the error that its status stands for."""
        if len(request) >= long_calls.MIN_BYTES:
            steps = long_calls.steps(path, request, timeout_s, self._max_message_bytes)
            answer: bytes = await self.run(steps, timeout_s)
            return answer
        method = self._methods.get(path) or self._methods.setdefault(path, self._channel.unary_unary(path))
        with self._errors:
            response: bytes = await method(request, timeout=timeout_s, metadata=self._metadata())
        return response

    async def run(self, steps: Steps, timeout_s: float | None) -> Any:
        """See `Transport.run`."""
        answer = _Answer(steps)
        while not answer.is_done:
            try:
                answer.give(await self._perform(answer.step, timeout_s))
            except errors.ForwardPassError as error:
                if self.is_closed:
                    # Nothing can be tried again.
                    raise
                answer.fail(error)
        return answer.result

    async def _perform(self, step: Any, timeout_s: float | None) -> Any:
        if isinstance(step, Unary):
            return await self.call(step.path, step.request, timeout_s if step.timeout_s is None else step.timeout_s)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Exchange):
            async with contextlib.aclosing(self.stream(step.path, step.requests, step.timeout_s)) as exchanged:
                async for message in exchanged:
                    answer = step.take(message)
                    if answer is not None:
                        return answer
            return None
        with self._errors:
            if isinstance(step, Send):
                return await self._channel.stream_unary(step.path)(
                    step.requests, timeout=step.timeout_s, metadata=self._metadata()
                )
            assert isinstance(step, Receive)
            responses = self._channel.unary_stream(step.path)(
                step.request, timeout=step.timeout_s, metadata=self._metadata()
            )
            try:
                async for response in responses:
                    step.take(response)
            finally:
                responses.cancel()

    async def stream(
        self, path: str, requests: AsyncIterator[bytes] | Iterator[bytes], timeout_s: float | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The responses of a stream."""
        with self._errors:
            responses = self._channel.stream_stream(path)(requests, timeout=timeout_s, metadata=self._metadata())
            try:
                async for response in responses:
                    yield response
            finally:
                responses.cancel()

    @property
    def is_closed(self) -> bool:
        return self._errors.is_closed

    async def close(self) -> None:
        self._errors.is_closed = True
        await self._channel.close()


class _Errors:
    """Raises, in a `with`, the errors that statuses stand for. is_closed: whether its channel is.

    A class: a generator would cost a small call more than all that it does.
    """

    def __init__(self) -> None:
        self.is_closed = False

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, errors.ForwardPassError) or not isinstance(error, Exception):
            return
        if isinstance(error, grpc.RpcError):
            raise _decode(error) from None
        # On a closed channel gRPC raises errors of several classes, not all of which it exports.
        if self.is_closed:
            raise errors.CallCancelled(_CLOSED) from None


class _Answer:
    """Steps on their way: the one to take now, or what has come of them all."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.step: Any = None
        self.result: Any = None
        self.is_done = False
        self.give(None)

    def give(self, result: Any) -> None:
        """Hands a step's result over."""
        self._advance(lambda: self._steps.send(result))

    def fail(self, error: errors.ForwardPassError) -> None:
        """Hands a step's error over. Raises it, or what comes of it, where it is not dealt with."""
        self._advance(lambda: self._steps.throw(error))

    def _advance(self, advance: Callable[[], Any]) -> None:
        try:
            self.step = advance()
        except StopIteration as stop:
            self.is_done, self.result = True, stop.value


def _decode(error: Any) -> errors.ForwardPassError:
    trailing = dict(error.trailing_metadata() or ())
    return errors.decode(error.code().name, error.details() or "", trailing.get(errors.DETAIL_KEY))
