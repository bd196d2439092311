"""The interceptor around every method: access control, parsing of requests, error statuses, metrics, spans."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from grpc._cython.cygrpc import ExecuteBatchError

from forwardpass.wire import errors
from forwardpass.wire.methods import METHODS, MODEL_SERVICE, SERVICES
from forwardpass_server.access import principals
from forwardpass_server.access.access import Access
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.rpc import handlers, unsent_answers
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.rpc.failures import failure_of
from forwardpass_server.telemetry.rpcs import MethodMetrics, RpcMetrics

if TYPE_CHECKING:
    from forwardpass_server.telemetry.spans import Tracing

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


# Stands for every unknown method. A name from a request must not be kept in memory or become a label of a metric.
_UNKNOWN = "/unknown/unknown"

# Unary calls that compute on the device.
_COMPUTING = {METHODS["CombineWeights"].path} | {
    method.path
    for name, method in SERVICES[MODEL_SERVICE].items()
    if method.is_unary and name not in ("GetModel", "ListModels")
}


class _Method(NamedTuple):
    """The handlers of one method.

    handler: for admitted calls. refusing: for all others. is_open: whether every call is admitted.
    without_device, without_room: for calls while the device does not work, or while no further call can enter; None for
      a method that computes nothing.
    is_unary: whether a call has one request, so that it may share a batch with others.
    """

    handler: Any
    refusing: Any
    without_device: Any
    without_room: Any
    is_open: bool
    is_unary: bool


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every handler, including those of health and reflection. No other code aborts a call."""

    def __init__(
        self,
        metrics: RpcMetrics,
        access: Access,
        drain: Drain,
        arrivals: Arrivals,
        tracing: Tracing | None,
        admission: Admission | None = None,
        device_works: Callable[[], bool] = lambda: True,
    ) -> None:
        """device_works: returns False while the device hangs or fails; calls that need it are then refused at once."""
        self._metrics = metrics
        self._arrivals = arrivals
        self._tracing = tracing
        self._admission = admission
        self._access = access
        self._drain = drain
        self._device_works = device_works
        self._methods: dict[str, _Method] = {}
        # Of the streams' long messages: see `_received`.
        self._turn = asyncio.Lock()
        unsent_answers.expect()
        # Without a handler gRPC answers UNIMPLEMENTED.
        self._unknown = _Method(None, self._refusing(_UNKNOWN, "unary"), None, None, access.is_open, False)

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
        """Selects the handler of a call, before its request is read."""
        method = self._methods.get(details.method) or await self._find(continuation, details)
        if not method.is_open and not self._access.admits(details.invocation_metadata):
            return method.refusing
        if method.without_device is not None and not self._device_works():
            return method.without_device
        if method.without_room is not None and self._is_full():
            return method.without_room
        if method.is_unary:
            # gRPC has created this task for the call.
            self._arrivals.announce(asyncio.current_task())  # type: ignore[arg-type]
        return method.handler

    async def _find(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> _Method:
        handler, path = await continuation(details), details.method
        if handler is None:
            return self._unknown
        kind = _KINDS[handler.request_streaming, handler.response_streaming]
        is_open = self._access.is_open or path.split("/")[1] in self._access.open_services
        without_device = without_room = None
        if path in _COMPUTING:
            without_device = self._raising(_no_device, path, kind)
            without_room = self._raising(self._no_room, path, kind)
        method = _Method(
            self._wrap(handler, path, is_open),
            self._refusing(path, kind),
            without_device,
            without_room,
            is_open,
            kind == "unary",
        )
        self._methods[path] = method
        return method

    def _is_full(self) -> bool:
        return self._admission is not None and self._admission.is_full

    def _no_room(self, context: Any) -> Exception:
        assert self._admission is not None
        return self._admission.overloaded()

    def _refusing(self, path: str, kind: str) -> Any:
        """A handler that refuses calls which are not admitted."""
        return self._raising(lambda context: self._access.refusal(context.invocation_metadata()), path, kind)

    def _raising(self, error: Callable[[Any], Exception], path: str, kind: str) -> Any:
        """A handler that answers with an error before it reads requests. error: creates it from the call's context."""

        async def refuse(requests: Any, context: Any) -> None:
            raise error(context)

        return grpc.stream_stream_rpc_method_handler(
            self._guard(refuse, path, self._metrics.method(kind, *_names(path)))
        )

    def _wrap(self, handler: Any, path: str, is_open: bool) -> Any:
        """The handler inside `_guard`, of the same kind. It receives requests as bytes."""
        method = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        if handler.request_deserializer is not None:
            method = _reading(method, handler.request_deserializer, handler.request_streaming)
        streams = handler.request_streaming, handler.response_streaming
        metrics = self._metrics.method(_KINDS[streams], *_names(path))
        is_ours = _names(path)[0] in SERVICES
        # Messages of health and reflection are not counted: they are objects here, and few.
        if handler.response_serializer is None:
            method = _measured(method, metrics, self._turn, *streams)
        if not any(streams) and is_ours and self._admission is not None:
            method = _held(method, self._admission)
        answer = _writing(method) if handler.response_streaming else method
        # Streams of health and reflection last until the client ends them, so the drain cancels them. The streams of
        # our own services end themselves after their last calls.
        if any(streams) and not is_ours:
            answer = self._until_drain(answer)
        if not is_open:
            answer = self._admitted(answer, handler.request_streaming)
        guarded = self._guard(answer, path, metrics)
        # No spans for health, which probes call every few seconds, and for refused calls, which anybody may send.
        if self._tracing is not None and is_ours:
            guarded = self._tracing.of_rpc(guarded, path, is_stream=any(streams))
        return handlers.MAKERS[streams](guarded, None, handler.response_serializer)

    def _until_drain(self, answer: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def draining(request: Any, context: Any) -> Any:
            return await self._drain.until(answer(request, context))

        return draining

    def _admitted(self, answer: Callable[..., Awaitable[Any]], is_stream: bool) -> Callable[..., Awaitable[Any]]:
        """`answer` with authentication by client certificate, and with a check of the token at each message."""
        access = self._access

        async def admitted(request: Any, context: Any) -> Any:
            if access.has_client_certificates:
                access.enter_by_certificate(context)
            if is_stream and access.tokens is not None:
                request = self._while_admitted(request, context)
            return await answer(request, context)

        return admitted if access.has_client_certificates or is_stream else answer

    async def _while_admitted(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """The requests of a stream, until its token expires or is removed from the file."""
        metadata = context.invocation_metadata()
        async for request in requests:
            if not self._access.admits(metadata):
                raise self._access.refusal(metadata)
            yield request

    def _guard(
        self, answer: Callable[..., Awaitable[Any]], path: str, metrics: MethodMetrics
    ) -> Callable[..., Awaitable[Any]]:
        """`answer` with metrics, and with exceptions converted to statuses."""
        arrivals = self._arrivals

        async def guarded(request: Any, context: Any) -> Any:
            started = time.perf_counter()
            arrivals.arrive()
            metrics.started.inc()
            status: str | None = "OK"

            def count(status: str) -> None:
                metrics.handled(status).inc()
                metrics.seconds.observe(time.perf_counter() - started)

            try:
                response = await answer(request, context)
                if isinstance(response, bytes) and len(response) > unsent_answers.LONG_BYTES:
                    # The client may cancel while the response is sent: count the call after that.
                    unsent_answers.watch(path, count)
                    status = None
                return response
            except grpc.aio.AbortError:
                status = context.code().name
                raise
            except asyncio.CancelledError:
                remaining = context.time_remaining()
                expired = remaining is not None and remaining <= 0
                status = "DEADLINE_EXCEEDED" if expired else "CANCELLED"
                raise
            except ExecuteBatchError:
                # The client has cancelled a stream, and gRPC fails to write before it cancels this task.
                status = "CANCELLED"
                raise
            except Exception as error:
                failure = failure_of(error, path)
                status = failure.status
            finally:
                # Before the response is sent: a client may read the metrics at once.
                if status is not None:
                    count(status)
            return await _abort(context, failure)

        return guarded


def _no_device(context: Any) -> errors.ServerUnavailable:
    return errors.ServerUnavailable("the device hangs or fails: retry on another server, or later")


def _names(path: str) -> tuple[str, str]:
    """The names of the service and of the method in a path."""
    _, service, method = path.split("/")
    return service, method


async def _abort(context: Any, error: errors.ForwardPassError) -> None:
    metadata: list[tuple[str, str | bytes]] = [(errors.DETAIL_KEY, errors.encode_detail(error))]
    is_last = error.status == "UNAVAILABLE" and _is_last_try(context)
    # A negative pushback stops gRPC's own retries. They would take some 3 s, and lose the error if the deadline ends
    # them. The SDK has retries of its own.
    if is_last or isinstance(error, (errors.SessionStoreUnavailable, errors.WeightStoreUnavailable)):
        metadata.append((_PUSHBACK_KEY, "-1"))
    await context.abort(grpc.StatusCode[error.status], errors.encode_message(error), trailing_metadata=tuple(metadata))


# gRPC's retry policy (proposal A6): a client retries a call after 0.2 s and doubles the time with each retry.
_ATTEMPTS_KEY, _PUSHBACK_KEY = "grpc-previous-rpc-attempts", "grpc-retry-pushback-ms"
_FIRST_BACKOFF_S = 0.2
_JITTER = 1.2


def _is_last_try(context: Any) -> bool:
    """Whether the caller's deadline passes before its gRPC library would retry.

    The library would then end the call with DEADLINE_EXCEEDED and lose the reason. Without a retry it reports the
    reason.
    """
    remaining_s = context.time_remaining()
    if remaining_s is None:
        return False
    attempts = dict(context.invocation_metadata() or ()).get(_ATTEMPTS_KEY, "0")
    tries = int(attempts) if attempts.isdecimal() and len(attempts) < 3 else 0
    return bool(remaining_s <= _JITTER * _FIRST_BACKOFF_S * 2**tries)


# The names of go-grpc-prometheus, by (requests are a stream, responses are a stream).
_KINDS = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}


def _reading(
    method: Callable[[Any, Any], Any], read: Callable[[bytes], Any], streams: bool
) -> Callable[[Any, Any], Any]:
    """The method, with each request parsed by `read`. streams: whether the requests are a stream."""
    read_requests = functools.partial(_read_all if streams else _read, read)
    return lambda request, context: method(read_requests(request), context)


def _measured(
    method: Callable[[Any, Any], Any],
    metrics: MethodMetrics,
    turn: asyncio.Lock,
    streams_requests: bool,
    streams_responses: bool,
) -> Callable[[Any, Any], Any]:
    """The method, with the bytes of its requests and responses counted. turn: see `_received`."""
    received, sent = metrics.received_bytes.inc, metrics.sent_bytes.inc

    async def answer(request: Any, context: Any) -> Any:
        if not streams_requests:
            received(len(request))
        response = await method(_received(request, received, turn) if streams_requests else request, context)
        sent(len(response))
        return response

    def respond(request: Any, context: Any) -> AsyncIterator[bytes]:
        if not streams_requests:
            received(len(request))
        return _counted(method(_received(request, received, turn) if streams_requests else request, context), sent)

    return respond if streams_responses else answer


# Shorter responses are not counted: all calls at once (1,024) could hold 64 MiB of them.
_HELD_BYTES = 2**16


def _held(method: Callable[[Any, Any], Any], admission: Admission) -> Callable[[Any, Any], Any]:
    """The unary method, with its response counted by admission until the client has read it or has disconnected."""

    async def answer(request: Any, context: Any) -> Any:
        response = await method(request, context)
        size_bytes = len(response)
        if size_bytes >= _HELD_BYTES:
            principal = principals.current()
            admission.hold(principal, size_bytes)
            context.add_done_callback(lambda _: admission.leave(principal, size_bytes, calls=0))
        return response

    return answer


# gRPC copies a message twice on the event loop, and the server once more: some milliseconds for a piece of 2 MiB.
_TURN_BYTES = 2**18


async def _received(
    messages: AsyncIterator[bytes], count: Callable[[int], None], turn: asyncio.Lock
) -> AsyncIterator[bytes]:
    """The requests of a stream. After a long one, the next is read in the stream's turn.

    turn: of all streams. One long message is asked for in each turn of the event loop, so that calls proceed beside any
    number of uploads.
    """
    async for message in messages:
        size_bytes = len(message)
        count(size_bytes)
        yield message
        if size_bytes >= _TURN_BYTES:
            async with turn:
                await asyncio.sleep(0)


async def _counted(messages: Any, count: Callable[[int], None]) -> AsyncIterator[bytes]:
    # grpc's own iterator has no aclose.
    async with contextlib.aclosing(messages) if hasattr(messages, "aclose") else contextlib.nullcontext():
        async for message in messages:
            count(len(message))
            yield message


def _writing(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[None]]:
    """The method, with the responses that it yields written to the context."""

    async def answer(request: Any, context: Any) -> None:
        responses = method(request, context)
        # Some methods (of health) write to the context themselves.
        if not hasattr(responses, "__aiter__"):
            await responses
            return
        async with contextlib.aclosing(responses):
            async for response in responses:
                await context.write(response)

    return answer


def _read(read: Callable[[bytes], Any], request: bytes) -> Any:
    """Parses a request. Raises InvalidRequest: gRPC itself would answer UNKNOWN with the text of the exception."""
    try:
        return read(request)
    except errors.ForwardPassError:
        raise
    except Exception:
        raise errors.InvalidRequest() from None


async def _read_all(read: Callable[[bytes], Any], requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _read(read, request)
