"""What every method of every service shares: requests read safely, errors as statuses, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from forwardpass.wire import errors
from forwardpass_server.rpc import handlers
from forwardpass_server.rpc.failures import failure_of
from forwardpass_server.telemetry.metrics import Metrics

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every handler, those of health and reflection included. Nothing else aborts a call of ours."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
        wrapped = self._wrapped.get(details.method)
        if wrapped is None:
            handler = await continuation(details)
            if handler is None:
                # gRPC answers UNIMPLEMENTED. A name that a stranger made up must not be kept, nor become a label.
                return None
            wrapped = self._wrapped[details.method] = self._wrap(handler, details.method)
        return wrapped

    def _wrap(self, handler: Any, path: str) -> Any:
        """The handler with `_guard` around it, of the same kind; requests reach it as bytes."""
        method = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        if handler.request_deserializer is not None:
            method = _reading(method, handler.request_deserializer, handler.request_streaming)
        answer = _writing(method) if handler.response_streaming else method
        streams = handler.request_streaming, handler.response_streaming
        return handlers.MAKERS[streams](self._guard(answer, _KINDS[streams], path), None, handler.response_serializer)

    def _guard(self, answer: Callable[..., Awaitable[Any]], kind: str, path: str) -> Callable[..., Awaitable[Any]]:
        """`answer` with its errors turned into statuses, counted and timed."""
        _, service, method = path.split("/")
        metrics = self._metrics.rpc(kind, service, method)

        async def guarded(request: Any, context: Any) -> Any:
            started = time.perf_counter()
            metrics.started.inc()
            code = grpc.StatusCode.OK
            try:
                return await answer(request, context)
            except grpc.aio.AbortError:
                code = context.code()
                raise
            except asyncio.CancelledError:
                remaining = context.time_remaining()
                expired = remaining is not None and remaining <= 0
                code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
                raise
            except Exception as error:
                failure = failure_of(error, path)
                code = grpc.StatusCode[failure.status]
            finally:
                # Before the caller hears of it, who may look at once.
                metrics.handled(_GO_NAMES[code]).inc()
                metrics.seconds.observe(time.perf_counter() - started)
            return await _abort(context, failure)

        return guarded


async def _abort(context: Any, error: errors.ForwardPassError) -> None:
    await context.abort(
        grpc.StatusCode[error.status],
        errors.encode_message(error),
        trailing_metadata=((errors.DETAIL_KEY, errors.encode_detail(error)),),
    )


# As go-grpc-prometheus calls them, by whether requests and responses are streams.
_KINDS = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}


def _reading(
    method: Callable[[Any, Any], Any], read: Callable[[bytes], Any], streams: bool
) -> Callable[[Any, Any], Any]:
    """The method, given what `read` makes of each request. streams: the requests are a stream."""
    read_requests = functools.partial(_read_all if streams else _read, read)
    return lambda request, context: method(read_requests(request), context)


def _writing(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[None]]:
    """The method, with the responses that it yields written to the context."""

    async def answer(request: Any, context: Any) -> None:
        responses = method(request, context)
        # Some write to the context themselves.
        if not hasattr(responses, "__aiter__"):
            await responses
            return
        async with contextlib.aclosing(responses):
            async for response in responses:
                await context.write(response)

    return answer


def _read(read: Callable[[bytes], Any], request: bytes) -> Any:
    """gRPC would answer bytes that it cannot read with UNKNOWN and the exception's text."""
    try:
        return read(request)
    except errors.ForwardPassError:
        raise
    except Exception:
        raise errors.InvalidRequest() from None


async def _read_all(read: Callable[[bytes], Any], requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _read(read, request)


# As Go's codes print, in whose words dashboards for gRPC are written.
_GO_NAMES = {code: "".join(word.capitalize() for word in code.name.split("_")) for code in grpc.StatusCode} | {
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}
