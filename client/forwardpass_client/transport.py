"""Calls over gRPC, for threads and for asyncio: bytes out, bytes in, errors of the catalogue."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from types import TracebackType
from typing import Any, TypeVar

import grpc

from forwardpass.wire import errors
from forwardpass.wire.chunks import Pieces
from forwardpass_client import channel_policy, long_calls, replicas, retries, routes, targets
from forwardpass_client.call import Call
from forwardpass_client.credentials import Credentials
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.options import Options
from forwardpass_client.processes import OneLoop, asyncio_use
from forwardpass_client.routes import STICKY, Route, Routes
from forwardpass_client.transfers import Exchange, Pause, Receive, Resolve, Send, Steps, Unary

ResultT = TypeVar("ResultT")

_CLOSED = "the client is closed"

# grpc.aio's message where a connection ends while a stream sends: the status INTERNAL does not come from the server.
_LOST_IN_MID_SEND = "Internal error from Core"


class Transport:
    """Calls to one server, or to several replicas, from any thread.

    sticky: of a call that needs what other calls left on the server. Streams are sticky.
    address: of the replica that a call goes to instead; None for no certain one. See `routes`.
    """

    def __init__(self, credentials: Credentials, options: Options, first: str | None = None) -> None:
        """first: the address that sticky calls prefer, of a target that lists several; None for any."""
        self.routes = _routes(credentials)
        self._channels = _Channels(grpc, credentials, options, first, self.routes)
        self._metadata = credentials.metadata
        self._max_message_bytes = options.max_message_bytes
        self._errors = _Errors(credentials.proxy, is_tls=credentials.tls is not None)

    def attempt(
        self,
        path: str,
        request: bytes | Pieces,
        deadline: Deadline,
        *,
        sticky: bool = False,
        address: str | None = None,
    ) -> bytes:
        """One attempt of a unary call. Raises the error that its status stands for."""
        if len(request) >= long_calls.MIN_BYTES:
            steps = long_calls.exchange(path, request, deadline, self._max_message_bytes, sticky, address)
            answer: bytes = self.run(steps, deadline)
            return answer
        channel = self._channels.find(sticky, address)
        with self._errors:
            response: bytes = channel.unary(path)(request, timeout=deadline.remaining_s(), metadata=self._metadata())
        return response

    def ask(self, call: Call[ResultT], deadline: Deadline, *, sticky: bool = False) -> ResultT:
        """The result of a call, after as many attempts as it takes: see `retries`, `replicas` and `routes`.

        sticky: whether the sticky server must answer, as it must where the call names weights that only this server
          has.
        """
        address = None if call.held is None else self.pick(call)
        sticky = sticky or call.held is not None
        try:
            # A small call pays for the machinery of steps only where its first attempt fails.
            return call.read(self.attempt(call.path, call.request, deadline, sticky=sticky, address=address))
        except errors.ForwardPassError as error:
            if self.is_closed:
                raise
            is_one = sticky or not self.has_several_servers
            steps = _further(call, error, deadline, is_one, address, self.routes)
        answer: ResultT = self.run(steps, deadline)
        return answer

    def pick(self, call: Call[Any]) -> str | None:
        """The replica for a call. None where the sticky server, or any, is to answer it."""
        self._maintain()
        return self.routes.next_in_turn() if call.held is None else self.routes.pick(call.held.weights_id)

    def _maintain(self) -> None:
        if self.routes.must_maintain():
            threading.Thread(target=self._run_maintenance, name="forwardpass-replicas", daemon=True).start()

    def _run_maintenance(self) -> None:
        # Ends with CallCancelled where the client is closed meanwhile.
        with contextlib.suppress(errors.ForwardPassError):
            self.run(self.routes.maintain(), Deadline(None))

    def route(self, held: HeldWeights | None) -> Route:
        """The route of a piece of work that uses these weights: see `Route`."""
        self._maintain()
        return Route(self.routes, None if held is None else held.weights_id)

    def share_weights(self, shares_weights: bool, deadline: Deadline) -> None:
        """Notes whether the replicas of the target share weights, as the server of a look-up says."""
        if shares_weights:
            self.run(self.routes.begin(), deadline)
        else:
            self.routes.end()

    def run(self, steps: Steps, deadline: Deadline, route: Route = STICKY) -> Any:
        """Carries out the steps until the deadline, and returns their result."""
        answer = _Answer(steps if route is STICKY else route.along(steps))
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
            within = deadline if step.timeout_s is None else Deadline(step.timeout_s)
            return self.attempt(step.path, step.request, within, sticky=step.sticky, address=step.address)
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, Resolve):
            return _resolved(_look_up(step), step)
        timeout_s = deadline.remaining_s()
        if isinstance(step, Exchange):
            with contextlib.closing(
                self.stream(step.path, step.requests, timeout_s, sticky=step.sticky, address=step.address)
            ) as exchanged:
                return next((answer for answer in map(step.take, exchanged) if answer is not None), None)
        channel = self._channels.find(True, step.address)
        with self._errors:
            if isinstance(step, Send):
                return channel.grpc.stream_unary(step.path)(
                    iter(step.requests), timeout=timeout_s, metadata=self._metadata()
                )
            assert isinstance(step, Receive)
            responses = channel.grpc.unary_stream(step.path)(step.request, timeout=timeout_s, metadata=self._metadata())
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
        address: str | None = None,
    ) -> Generator[bytes, None, None]:
        """The responses of a stream. gRPC asks for the requests on a thread of its own.

        opened: is called with a function that cancels the stream, for use by another thread.
        """
        channel = self._channels.find(sticky, address)
        with self._errors:
            responses = channel.grpc.stream_stream(path)(requests, timeout=timeout_s, metadata=self._metadata())
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
        self.routes.end()
        for channel in self._channels.all:
            channel.close()


class AsyncTransport:
    """`Transport` on the event loop of its first call."""

    def __init__(self, credentials: Credentials, options: Options, first: str | None = None) -> None:
        """first: see `Transport`."""
        self.routes = _routes(credentials)
        self._maintaining: asyncio.Task[None] | None = None
        self._make_channels = functools.partial(_Channels, grpc.aio, credentials, options, first, self.routes)
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

    async def attempt(
        self,
        path: str,
        request: bytes | Pieces,
        deadline: Deadline,
        *,
        sticky: bool = False,
        address: str | None = None,
    ) -> bytes:
        """See `Transport.attempt`."""
        if len(request) >= long_calls.MIN_BYTES:
            steps = long_calls.exchange(path, request, deadline, self._max_message_bytes, sticky, address)
            answer: bytes = await self.run(steps, deadline)
            return answer
        channel = self._channels.find(sticky, address)
        with self._errors:
            response: bytes = await channel.unary(path)(
                request, timeout=deadline.remaining_s(), metadata=self._metadata()
            )
        return response

    async def ask(self, call: Call[ResultT], deadline: Deadline, *, sticky: bool = False) -> ResultT:
        """See `Transport.ask`."""
        address = None if call.held is None else self.pick(call)
        sticky = sticky or call.held is not None
        try:
            return call.read(await self.attempt(call.path, call.request, deadline, sticky=sticky, address=address))
        except errors.ForwardPassError as error:
            if self.is_closed:
                raise
            is_one = sticky or not self.has_several_servers
            steps = _further(call, error, deadline, is_one, address, self.routes)
        answer: ResultT = await self.run(steps, deadline)
        return answer

    def pick(self, call: Call[Any]) -> str | None:
        """The replica for a call. None where the sticky server, or any, is to answer it."""
        self._maintain()
        return self.routes.next_in_turn() if call.held is None else self.routes.pick(call.held.weights_id)

    def _maintain(self) -> None:
        if self.routes.must_maintain():
            self._maintaining = asyncio.ensure_future(self._run_maintenance())

    async def _run_maintenance(self) -> None:
        # Ends with CallCancelled where the client is closed meanwhile.
        with contextlib.suppress(errors.ForwardPassError):
            await self.run(self.routes.maintain(), Deadline(None))

    def route(self, held: HeldWeights | None) -> Route:
        """See `Transport.route`."""
        self._maintain()
        return Route(self.routes, None if held is None else held.weights_id)

    async def share_weights(self, shares_weights: bool, deadline: Deadline) -> None:
        """See `Transport.share_weights`."""
        if shares_weights:
            await self.run(self.routes.begin(), deadline)
        else:
            self.routes.end()

    async def run(self, steps: Steps, deadline: Deadline, route: Route = STICKY) -> Any:
        """See `Transport.run`."""
        answer = _Answer(steps if route is STICKY else route.along(steps))
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
            within = deadline if step.timeout_s is None else Deadline(step.timeout_s)
            return await self.attempt(step.path, step.request, within, sticky=step.sticky, address=step.address)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Resolve):
            return _resolved(await asyncio.to_thread(_look_up, step), step)
        timeout_s = deadline.remaining_s()
        if isinstance(step, Exchange):
            async with contextlib.aclosing(
                self.stream(step.path, step.requests, timeout_s, sticky=step.sticky, address=step.address)
            ) as exchanged:
                async for message in exchanged:
                    answer = step.take(message)
                    if answer is not None:
                        return answer
            return None
        channel = self._channels.find(True, step.address)
        with self._errors:
            if isinstance(step, Send):
                return await channel.grpc.stream_unary(step.path)(
                    step.requests, timeout=timeout_s, metadata=self._metadata()
                )
            assert isinstance(step, Receive)
            responses = channel.grpc.unary_stream(step.path)(step.request, timeout=timeout_s, metadata=self._metadata())
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
        address: str | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """The responses of a stream."""
        channel = self._channels.find(sticky, address)
        with self._errors:
            responses = channel.grpc.stream_stream(path)(requests, timeout=timeout_s, metadata=self._metadata())
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
        self.routes.end()
        if self._maintaining is not None:
            self._maintaining.cancel()
        for channel in channels:
            await channel.close()


def _routes(credentials: Credentials) -> Routes:
    """The routes to the replicas of a target. A proxy looks the name up itself, so it hides the replicas."""
    if credentials.proxy:
        return Routes([], None)
    return Routes(targets.listed(credentials.target), targets.named(credentials.target))


def _look_up(step: Resolve) -> list[str] | OSError:
    """The addresses of a name, or the error of the look-up."""
    try:
        found = socket.getaddrinfo(step.host, step.port, type=socket.SOCK_STREAM)
    except OSError as error:
        return error
    # Each entry ends with a socket address, which begins with the host.
    hosts = {str(entry[-1][0]) for entry in found}
    return sorted(f"[{host}]:{step.port}" if ":" in host else f"{host}:{step.port}" for host in hosts)


def _resolved(found: list[str] | OSError, step: Resolve) -> list[str]:
    if isinstance(found, OSError):
        raise errors.ServerUnavailable(f"the name {step.host} cannot be looked up: {found}")
    return found


def _further(
    call: Call[Any],
    error: errors.ForwardPassError,
    deadline: Deadline,
    sticky: bool,
    address: str | None,
    table: Routes,
) -> Steps:
    """The steps after the first attempt of a call failed. Raises the error where no other attempt may succeed.

    address: of the replica that failed; None for the sticky server or the next in turn. table: the routes.
    """
    if address is not None and call.held is not None:
        return routes.ask_others(call, call.held, address, error, deadline, table)
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


class _Channel:
    """A channel of gRPC with its unary methods.

    A call keeps it: the channel of a replica that is gone is closed by `__del__` of gRPC when the last call has ended.
    """

    def __init__(self, channel: Any) -> None:
        self.grpc = channel
        self._unary: dict[str, Any] = {}

    def unary(self, path: str) -> Any:
        """gRPC's callable for a unary method; it is made once for each method."""
        return self._unary.get(path) or self._unary.setdefault(path, self.grpc.unary_unary(path))


class _Channels:
    """The channel of sticky calls, the channel of calls that any replica may answer, and one for each replica.

    The first two are one where the target is one server. Those of replicas are made when they are first used.
    api: `grpc` or `grpc.aio`. first: see `Transport`.
    """

    def __init__(self, api: Any, credentials: Credentials, options: Options, first: str | None, table: Routes) -> None:
        policy = channel_policy.sticky(options, in_order=first is not None)
        target = credentials.target if first is None else targets.beginning_with(credentials.target, first)
        self._sticky = _Channel(dataclasses.replace(credentials, target=target).channel(api, policy))
        self._spread = self._sticky
        self.are_two = targets.are_several(credentials.target)
        if self.are_two:
            self._spread = _Channel(credentials.channel(api, channel_policy.spread(options)))
        self._api = api
        self._credentials = credentials
        self._options = options
        self._routes = table
        self._lock = threading.Lock()
        self._replicas: dict[str, _Channel] = {}

    @property
    def all(self) -> list[Any]:
        """All channels of gRPC, which are to be closed."""
        two = {id(one): one for one in (self._sticky, self._spread)}.values()
        with self._lock:
            return [one.grpc for one in (*two, *self._replicas.values())]

    def find(self, sticky: bool, address: str | None) -> _Channel:
        """The channel of a replica; without an address, that of sticky calls or of others."""
        if address is None:
            return self._sticky if sticky else self._spread
        return self._replicas.get(address) or self._open(address)

    def _open(self, address: str) -> _Channel:
        with self._lock:
            for former in self._replicas.keys() - self._routes.addresses:
                del self._replicas[former]
            found = self._replicas.get(address)
            if found is None:
                policy = channel_policy.sticky(self._options)
                found = _Channel(self._credentials.of_replica(address).channel(self._api, policy))
                self._replicas[address] = found
            return found


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
