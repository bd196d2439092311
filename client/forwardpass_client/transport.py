"""gRPC channels: the only module that knows them. Bytes out, bytes in, errors of the catalogue."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from forwardpass.wire import errors
from forwardpass.wire.chunks import Pieces
from forwardpass_client import channel_policy, long_calls, replicas, targets
from forwardpass_client.credentials import Credentials
from forwardpass_client.options import Options
from forwardpass_client.processes import OneLoop
from forwardpass_client.transfers import Exchange, Pause, Receive, Send, Steps, Unary

if TYPE_CHECKING:
    from forwardpass_client.calls import Call

ResultT = TypeVar("ResultT")

_CLOSED = "the client is closed"

# What grpc.aio makes of a connection that ends while a message of a stream is being sent: no status of the server's.
_LOST_IN_MID_SEND = "Internal error from Core"


class Transport:
    """Calls to one server, or to several that stand for each other, from any thread.

    stays: of a call that needs what other calls left on the server. Streams, and all that `run` makes, stay.
    """

    def __init__(self, credentials: Credentials, options: Options) -> None:
        self._channels = _Channels(grpc, credentials, options)
        self._metadata = credentials.metadata
        self._max_message_bytes = options.max_message_bytes
        self._errors = _Errors(credentials.proxy)

    def call(self, path: str, request: bytes | Pieces, timeout_s: float | None, *, stays: bool = False) -> bytes:
        """One unary call. Raises the error that its status stands for."""
        if len(request) >= long_calls.MIN_BYTES:
            steps = long_calls.steps(path, request, timeout_s, self._max_message_bytes, stays)
            answer: bytes = self.run(steps, timeout_s)
            return answer
        method = self._channels.unary(path, stays)
        with self._errors:
            response: bytes = method(request, timeout=timeout_s, metadata=self._metadata())
        return response

    def ask(self, call: Call[ResultT], timeout_s: float | None) -> ResultT:
        """The result of a call that any server may answer. Another is asked where one cannot: see `replicas`."""
        deadline = replicas.deadline(timeout_s)
        try:
            return call.read(self.call(call.path, call.request, timeout_s))
        except replicas.TRY_ANOTHER as error:
            if self.is_closed or not self.has_several_servers:
                raise
            steps = replicas.ask_others(call, error, deadline)
        answer: ResultT = self.run(steps, timeout_s)
        return answer

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
            step_timeout_s = timeout_s if step.timeout_s is None else step.timeout_s
            return self.call(step.path, step.request, step_timeout_s, stays=step.stays)
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, Exchange):
            with contextlib.closing(
                self.stream(step.path, step.requests, step.timeout_s, stays=step.stays)
            ) as exchanged:
                return next((answer for answer in map(step.take, exchanged) if answer is not None), None)
        with self._errors:
            if isinstance(step, Send):
                return self._channels.staying.stream_unary(step.path)(
                    iter(step.requests), timeout=step.timeout_s, metadata=self._metadata()
                )
            assert isinstance(step, Receive)
            responses = self._channels.staying.unary_stream(step.path)(
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
        *,
        stays: bool = True,
    ) -> Generator[bytes, None, None]:
        """The responses of a stream. gRPC asks for the requests on a thread of its own.

        opened: is given what ends the stream, for another thread.
        """
        with self._errors:
            responses = self._channels.channel(stays).stream_stream(path)(
                requests, timeout=timeout_s, metadata=self._metadata()
            )
            opened(responses.cancel)
            try:
                yield from responses
            finally:
                responses.cancel()

    @property
    def is_closed(self) -> bool:
        return self._errors.is_closed

    @property
    def has_several_servers(self) -> bool:
        """Whether the target stands, or may stand, for several servers."""
        return self._channels.are_two

    def close(self) -> None:
        self._errors.is_closed = True
        for channel in self._channels.all:
            channel.close()


class AsyncTransport:
    """`Transport` on the event loop of its first call."""

    def __init__(self, credentials: Credentials, options: Options) -> None:
        self._make_channels = functools.partial(_Channels, grpc.aio, credentials, options)
        self._made: _Channels | None = None
        self._loop = OneLoop()
        self._metadata = credentials.metadata
        self._max_message_bytes = options.max_message_bytes
        self._errors = _Errors(credentials.proxy)

    @property
    def _channels(self) -> _Channels:
        self.check_loop()
        if self._made is None:
            if self.is_closed:
                raise errors.CallCancelled(_CLOSED)
            self._made = self._make_channels()
        return self._made

    def check_loop(self) -> None:
        """Raises RuntimeError on another event loop than that of the first call."""
        self._loop.check()

    async def call(self, path: str, request: bytes | Pieces, timeout_s: float | None, *, stays: bool = False) -> bytes:
        """One unary call. Raises the error that its status stands for."""
        if len(request) >= long_calls.MIN_BYTES:
            steps = long_calls.steps(path, request, timeout_s, self._max_message_bytes, stays)
            answer: bytes = await self.run(steps, timeout_s)
            return answer
        method = self._channels.unary(path, stays)
        with self._errors:
            response: bytes = await method(request, timeout=timeout_s, metadata=self._metadata())
        return response

    async def ask(self, call: Call[ResultT], timeout_s: float | None) -> ResultT:
        """See `Transport.ask`."""
        deadline = replicas.deadline(timeout_s)
        try:
            return call.read(await self.call(call.path, call.request, timeout_s))
        except replicas.TRY_ANOTHER as error:
            if self.is_closed or not self.has_several_servers:
                raise
            steps = replicas.ask_others(call, error, deadline)
        answer: ResultT = await self.run(steps, timeout_s)
        return answer

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
            step_timeout_s = timeout_s if step.timeout_s is None else step.timeout_s
            return await self.call(step.path, step.request, step_timeout_s, stays=step.stays)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Exchange):
            async with contextlib.aclosing(
                self.stream(step.path, step.requests, step.timeout_s, stays=step.stays)
            ) as exchanged:
                async for message in exchanged:
                    answer = step.take(message)
                    if answer is not None:
                        return answer
            return None
        with self._errors:
            if isinstance(step, Send):
                return await self._channels.staying.stream_unary(step.path)(
                    step.requests, timeout=step.timeout_s, metadata=self._metadata()
                )
            assert isinstance(step, Receive)
            responses = self._channels.staying.unary_stream(step.path)(
                step.request, timeout=step.timeout_s, metadata=self._metadata()
            )
            try:
                async for response in responses:
                    step.take(response)
            finally:
                responses.cancel()

    async def stream(
        self,
        path: str,
        requests: AsyncIterator[bytes] | Iterator[bytes],
        timeout_s: float | None = None,
        *,
        stays: bool = True,
    ) -> AsyncGenerator[bytes, None]:
        """The responses of a stream."""
        with self._errors:
            responses = self._channels.channel(stays).stream_stream(path)(
                requests, timeout=timeout_s, metadata=self._metadata()
            )
            try:
                async for response in responses:
                    yield response
            finally:
                responses.cancel()

    @property
    def is_closed(self) -> bool:
        return self._errors.is_closed

    @property
    def has_several_servers(self) -> bool:
        """Whether the target stands, or may stand, for several servers."""
        return self._channels.are_two

    async def close(self) -> None:
        channels = [] if self._made is None else self._channels.all
        self._errors.is_closed = True
        for channel in channels:
            await channel.close()


class _Channels:
    """The channel of calls that stay with one server, and the channel of calls that any server may answer.

    They are one where the target is one server. api: `grpc` or `grpc.aio`.
    """

    def __init__(self, api: Any, credentials: Credentials, options: Options) -> None:
        self.staying = credentials.channel(api, channel_policy.staying(options))
        self.all = [self.staying]
        self._spread = self.staying
        self.are_two = targets.are_several(credentials.target)
        if self.are_two:
            self._spread = credentials.channel(api, channel_policy.spread(options))
            self.all.append(self._spread)
        self._unary: dict[tuple[str, bool], Any] = {}

    def channel(self, stays: bool) -> Any:
        return self.staying if stays else self._spread

    def unary(self, path: str, stays: bool) -> Any:
        """What makes unary calls of a method."""
        key = path, stays
        return self._unary.get(key) or self._unary.setdefault(key, self.channel(stays).unary_unary(path))


class _Errors:
    """Raises, in a `with`, the errors that statuses stand for. is_closed: whether its channel is.

    proxy: what the channel goes through, as `proxies.of` says it.

    A class: a generator would cost a small call more than all that it does.
    """

    def __init__(self, proxy: str = "") -> None:
        self.is_closed = False
        self._proxy = proxy

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, errors.ForwardPassError) or not isinstance(error, Exception):
            return
        if isinstance(error, grpc.RpcError):
            raise _decode(error, self._proxy) from None
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


def _decode(error: Any, proxy: str) -> errors.ForwardPassError:
    trailing = dict(error.trailing_metadata() or ())
    status, message = error.code().name, error.details() or ""
    if status == "INTERNAL" and message == _LOST_IN_MID_SEND:
        status = "UNAVAILABLE"
    detail = trailing.get(errors.DETAIL_KEY)
    if proxy and detail is None:
        # No server of ours has answered: it may be the proxy that cannot be reached, or refuses.
        message += (
            f"; calls to this server go through the proxy {proxy}: name the server in no_proxy to call it directly"
        )
    return errors.decode(status, message, detail)
