"""Calls over gRPC, for threads and for asyncio: bytes out, bytes in, errors of the catalogue."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from types import TracebackType
from typing import Any, TypeVar

import grpc

from forwardpass.wire import errors
from forwardpass.wire.chunks import Pieces
from forwardpass_client import channel_policy, long_calls, replicas, retries, targets
from forwardpass_client.call import Call
from forwardpass_client.credentials import Credentials
from forwardpass_client.deadlines import Deadline
from forwardpass_client.options import Options
from forwardpass_client.processes import OneLoop, asyncio_use
from forwardpass_client.transfers import Exchange, Pause, Receive, Send, Steps, Unary

ResultT = TypeVar("ResultT")

_CLOSED = "the client is closed"

# grpc.aio's message where a connection ends while a stream sends: the status INTERNAL does not come from the server.
_LOST_IN_MID_SEND = "Internal error from Core"


class Transport:
    """Calls to one server, or to several replicas, from any thread.

    sticky: of a call that needs what other calls left on the server. Streams are sticky.
    """

    def __init__(self, credentials: Credentials, options: Options, first: str | None = None) -> None:
        """first: the address that sticky calls prefer, of a target that lists several; None for any."""
        self._channels = _Channels(grpc, credentials, options, first)
        self._metadata = credentials.metadata
        self._max_message_bytes = options.max_message_bytes
        self._errors = _Errors(credentials.proxy, is_tls=credentials.tls is not None)

    def attempt(self, path: str, request: bytes | Pieces, deadline: Deadline, *, sticky: bool = False) -> bytes:
        """One attempt of a unary call. Raises the error that its status stands for."""
        if len(request) >= long_calls.MIN_BYTES:
            steps = long_calls.exchange(path, request, deadline, self._max_message_bytes, sticky)
            answer: bytes = self.run(steps, deadline)
            return answer
        method = self._channels.unary(path, sticky)
        with self._errors:
            response: bytes = method(request, timeout=deadline.remaining_s(), metadata=self._metadata())
        return response

    def ask(self, call: Call[ResultT], deadline: Deadline, *, sticky: bool = False) -> ResultT:
        """The result of a call, after as many attempts as it takes: see `retries` and `replicas`.

        sticky: whether the sticky server must answer, as it must where the call names weights.
        """
        sticky = sticky or call.held is not None
        try:
            # A small call pays for the machinery of steps only where its first attempt fails.
            return call.read(self.attempt(call.path, call.request, deadline, sticky=sticky))
        except errors.ForwardPassError as error:
            if self.is_closed:
                raise
            steps = _further(call, error, deadline, sticky or not self.has_several_servers)
        answer: ResultT = self.run(steps, deadline)
        return answer

    def run(self, steps: Steps, deadline: Deadline) -> Any:
        """Carries out the steps until the deadline, and returns their result."""
        answer = _Answer(steps)
        while not answer.is_done:
            try:
                answer.give(self._perform(answer.step, deadline))
            except errors.ForwardPassError as error:
                if self.is_closed:
                    # No attempt can succeed any more.
                    raise
                answer.fail(deadline.explained(error))
        return answer.result

    def _perform(self, step: Any, deadline: Deadline) -> Any:
        if isinstance(step, Unary):
            return self.attempt(step.path, step.request, deadline, sticky=step.sticky)
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        timeout_s = deadline.remaining_s()
        if isinstance(step, Exchange):
            with contextlib.closing(self.stream(step.path, step.requests, timeout_s, sticky=step.sticky)) as exchanged:
                return next((answer for answer in map(step.take, exchanged) if answer is not None), None)
        with self._errors:
            if isinstance(step, Send):
                return self._channels.sticky.stream_unary(step.path)(
                    iter(step.requests), timeout=timeout_s, metadata=self._metadata()
                )
            assert isinstance(step, Receive)
            responses = self._channels.sticky.unary_stream(step.path)(
                step.request, timeout=timeout_s, metadata=self._metadata()
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
        sticky: bool = True,
    ) -> Generator[bytes, None, None]:
        """The responses of a stream. gRPC asks for the requests on a thread of its own.

        opened: is called with a function that cancels the stream, for use by another thread.
        """
        with self._errors:
            responses = self._channels.channel(sticky).stream_stream(path)(
                requests, timeout=timeout_s, metadata=self._metadata()
            )
            opened(responses.cancel)
            try:
                yield from responses
            finally:
                responses.cancel()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._errors.is_closed

    @property
    def has_several_servers(self) -> bool:
        """Whether the target stands, or may stand, for several servers."""
        return self._channels.are_two

    def close(self) -> None:
        """Closes the channels. Calls in flight, and later ones, raise CallCancelled."""
        self._errors.is_closed = True
        for channel in self._channels.all:
            channel.close()


class AsyncTransport:
    """`Transport` on the event loop of its first call."""

    def __init__(self, credentials: Credentials, options: Options, first: str | None = None) -> None:
        """first: see `Transport`."""
        self._make_channels = functools.partial(_Channels, grpc.aio, credentials, options, first)
        self._made: _Channels | None = None
        self._loop = OneLoop()
        self._metadata = credentials.metadata
        self._max_message_bytes = options.max_message_bytes
        self._errors = _Errors(credentials.proxy, is_tls=credentials.tls is not None)

    @property
    def _channels(self) -> _Channels:
        self.check_loop()
        if self._made is None:
            if self.is_closed:
                raise errors.CallCancelled(_CLOSED)
            asyncio_use.note()
            self._made = self._make_channels()
        return self._made

    def check_loop(self) -> None:
        """Raises RuntimeError on another event loop than that of the first call."""
        self._loop.check()

    async def attempt(self, path: str, request: bytes | Pieces, deadline: Deadline, *, sticky: bool = False) -> bytes:
        """See `Transport.attempt`."""
        if len(request) >= long_calls.MIN_BYTES:
            steps = long_calls.exchange(path, request, deadline, self._max_message_bytes, sticky)
            answer: bytes = await self.run(steps, deadline)
            return answer
        method = self._channels.unary(path, sticky)
        with self._errors:
            response: bytes = await method(request, timeout=deadline.remaining_s(), metadata=self._metadata())
        return response

    async def ask(self, call: Call[ResultT], deadline: Deadline, *, sticky: bool = False) -> ResultT:
        """See `Transport.ask`."""
        sticky = sticky or call.held is not None
        try:
            return call.read(await self.attempt(call.path, call.request, deadline, sticky=sticky))
        except errors.ForwardPassError as error:
            if self.is_closed:
                raise
            steps = _further(call, error, deadline, sticky or not self.has_several_servers)
        answer: ResultT = await self.run(steps, deadline)
        return answer

    async def run(self, steps: Steps, deadline: Deadline) -> Any:
        """See `Transport.run`."""
        answer = _Answer(steps)
        while not answer.is_done:
            try:
                answer.give(await self._perform(answer.step, deadline))
            except errors.ForwardPassError as error:
                if self.is_closed:
                    # No attempt can succeed any more.
                    raise
                answer.fail(deadline.explained(error))
        return answer.result

    async def _perform(self, step: Any, deadline: Deadline) -> Any:
        if isinstance(step, Unary):
            return await self.attempt(step.path, step.request, deadline, sticky=step.sticky)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        timeout_s = deadline.remaining_s()
        if isinstance(step, Exchange):
            async with contextlib.aclosing(
                self.stream(step.path, step.requests, timeout_s, sticky=step.sticky)
            ) as exchanged:
                async for message in exchanged:
                    answer = step.take(message)
                    if answer is not None:
                        return answer
            return None
        with self._errors:
            if isinstance(step, Send):
                return await self._channels.sticky.stream_unary(step.path)(
                    step.requests, timeout=timeout_s, metadata=self._metadata()
                )
            assert isinstance(step, Receive)
            responses = self._channels.sticky.unary_stream(step.path)(
                step.request, timeout=timeout_s, metadata=self._metadata()
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
        sticky: bool = True,
    ) -> AsyncGenerator[bytes, None]:
        """The responses of a stream."""
        with self._errors:
            responses = self._channels.channel(sticky).stream_stream(path)(
                requests, timeout=timeout_s, metadata=self._metadata()
            )
            try:
                async for response in responses:
                    yield response
            finally:
                responses.cancel()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._errors.is_closed

    @property
    def has_several_servers(self) -> bool:
        """Whether the target stands, or may stand, for several servers."""
        return self._channels.are_two

    async def close(self) -> None:
        """Closes the channels, if any were made. Calls in flight, and later ones, raise CallCancelled."""
        channels = [] if self._made is None else self._channels.all
        self._errors.is_closed = True
        for channel in channels:
            await channel.close()


def _further(call: Call[Any], error: errors.ForwardPassError, deadline: Deadline, sticky: bool) -> Steps:
    """The steps after the first attempt of a call failed. Raises the error where no other attempt may succeed."""
    if sticky:
        if not retries.is_retryable(error, call.request) and not (
            isinstance(error, errors.WeightsNotFound) and call.held is not None
        ):
            raise error
        return _read(call, retries.attempts(Unary(call.path, call.request), call.held, deadline, after=error))
    if not replicas.is_for_another(error, call.request):
        raise error
    return replicas.ask_others(call, error, deadline)


def _read(call: Call[Any], steps: Steps) -> Steps:
    return call.read((yield from steps))


class _Channels:
    """The channel of sticky calls, and the channel of calls that any replica may answer.

    They are one where the target is one server. api: `grpc` or `grpc.aio`. first: see `Transport`.
    """

    def __init__(self, api: Any, credentials: Credentials, options: Options, first: str | None) -> None:
        policy = channel_policy.sticky(options, in_order=first is not None)
        target = credentials.target if first is None else targets.beginning_with(credentials.target, first)
        self.sticky = dataclasses.replace(credentials, target=target).channel(api, policy)
        self.all = [self.sticky]
        self._spread = self.sticky
        self.are_two = targets.are_several(credentials.target)
        if self.are_two:
            self._spread = credentials.channel(api, channel_policy.spread(options))
            self.all.append(self._spread)
        self._unary: dict[tuple[str, bool], Any] = {}

    def channel(self, sticky: bool) -> Any:
        return self.sticky if sticky else self._spread

    def unary(self, path: str, sticky: bool) -> Any:
        """gRPC's callable for a unary method; it is made once for each method."""
        key = path, sticky
        return self._unary.get(key) or self._unary.setdefault(key, self.channel(sticky).unary_unary(path))


class _Errors:
    """Raises, in a `with`, the errors that statuses stand for. is_closed: whether its channel is closed.

    proxy: the proxy that the channel goes through, as `proxies.of` names it. is_tls: whether the channel is encrypted.
    A class, because a generator would cost a small call more than the rest of this code.
    """

    def __init__(self, proxy: str = "", *, is_tls: bool = False) -> None:
        self.is_closed = False
        self._proxy = proxy
        self._is_tls = is_tls

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, errors.ForwardPassError) or not isinstance(error, Exception):
            return
        if isinstance(error, grpc.RpcError):
            # The traceback holds grpc.aio's call, which holds the connections of the channel after it was closed.
            # The new error must not keep it, neither through its context nor through this frame.
            error.__traceback__ = None
            del trace
            raise _decode(error, self._proxy, self._is_tls) from None
        # On a closed channel gRPC raises errors of several classes, some of which it does not export.
        if self.is_closed:
            raise errors.CallCancelled(_CLOSED) from None


class _Answer:
    """Steps that are being carried out: the step to carry out now, or the result of them all."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.step: Any = None
        self.result: Any = None
        self.is_done = False
        self.give(None)

    def give(self, result: Any) -> None:
        """Gives the steps the result of one of them."""
        self._advance(lambda: self._steps.send(result))

    def fail(self, error: errors.ForwardPassError) -> None:
        """Gives the steps the error of one of them. Raises the error that they end with."""
        self._advance(lambda: self._steps.throw(error))

    def _advance(self, advance: Callable[[], Any]) -> None:
        try:
            self.step = advance()
        except StopIteration as stop:
            self.is_done, self.result = True, stop.value


def _decode(error: Any, proxy: str, is_tls: bool) -> errors.ForwardPassError:
    trailing = dict(error.trailing_metadata() or ())
    status, message = error.code().name, error.details() or ""
    if status == "INTERNAL" and message == _LOST_IN_MID_SEND:
        status = "UNAVAILABLE"
    detail = trailing.get(errors.DETAIL_KEY)
    if detail is None:
        # No forwardpass server has answered.
        if status == "UNAVAILABLE":
            message += _encryption_hint(message, is_tls)
        if proxy:
            message += (
                f"; calls to this server go through the proxy {proxy}: name the server in no_proxy to call it directly"
            )
    return errors.decode(status, message, detail)


# What gRPC says where one end of a connection speaks TLS and the other does not.
_CLOSED_WITHOUT_TLS = ("Socket closed", "Connection reset by peer", "SETTINGS frame")
_NO_TLS_AT_SERVER = ("WRONG_VERSION_NUMBER", "wrong version number")


def _encryption_hint(message: str, is_tls: bool) -> str:
    if is_tls and any(text in message for text in _NO_TLS_AT_SERVER):
        return "; the server does not use TLS: connect without tls"
    if not is_tls and any(text in message for text in _CLOSED_WITHOUT_TLS):
        return "; if the server uses TLS, connect with tls=True or tls=Tls(...)"
    return ""
