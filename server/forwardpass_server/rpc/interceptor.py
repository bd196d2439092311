"""What every method of every service shares: requests read safely, errors as statuses, metrics."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from forwardpass.wire import errors
from forwardpass_server.telemetry.metrics import Metrics

_LOGGER = logging.getLogger(__name__)

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
        read = handler.request_deserializer or (lambda data: data)
        answer: Callable[[Any, Any], Awaitable[Any]]
        if handler.request_streaming:
            make, kind = grpc.stream_stream_rpc_method_handler, "bidi_stream"

            async def answer_stream(requests: AsyncIterator[bytes], context: Any) -> None:
                async for response in handler.stream_stream(_read_all(requests, read), context):
                    await context.write(response)

            answer = answer_stream
        elif handler.response_streaming:
            make, kind = grpc.unary_stream_rpc_method_handler, "server_stream"

            async def answer_with_stream(request: bytes, context: Any) -> None:
                await handler.unary_stream(_read(request, read), context)

            answer = answer_with_stream
        else:
            make, kind = grpc.unary_unary_rpc_method_handler, "unary"

            async def answer_unary(request: bytes, context: Any) -> Any:
                return await handler.unary_unary(_read(request, read), context)

            answer = answer_unary
        return make(self._guard(answer, kind, path), None, handler.response_serializer)

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
            except errors.ForwardPassError as error:
                code = grpc.StatusCode[error.status]
                await _abort(context, error)
            except grpc.aio.AbortError:
                code = context.code()
                raise
            except asyncio.CancelledError:
                remaining = context.time_remaining()
                expired = remaining is not None and remaining <= 0
                code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
                raise
            except Exception as error:
                code = grpc.StatusCode.INTERNAL
                request_id = secrets.token_hex(8)
                # Its message may hold an example or a weight: where it happened must do.
                places = "".join(traceback.format_tb(error.__traceback__))
                _LOGGER.error("request %s: %s failed: %s\n%s", request_id, path, type(error).__name__, places)
                await _abort(
                    context, errors.InternalError(f"the server failed; request {request_id}", request_id=request_id)
                )
            finally:
                metrics.handled(_GO_NAMES[code]).inc()
                metrics.seconds.observe(time.perf_counter() - started)

        return guarded


async def _abort(context: Any, error: errors.ForwardPassError) -> None:
    await context.abort(
        grpc.StatusCode[error.status],
        errors.encode_message(error),
        trailing_metadata=((errors.DETAIL_KEY, errors.encode_detail(error)),),
    )


def _read(request: bytes, read: Callable[[bytes], Any]) -> Any:
    """gRPC would answer bytes that it cannot read with UNKNOWN and the exception's text."""
    try:
        return read(request)
    except errors.ForwardPassError:
        raise
    except Exception:
        raise errors.InvalidRequest() from None


async def _read_all(requests: AsyncIterator[bytes], read: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _read(request, read)


# As Go's codes print, in whose words dashboards for gRPC are written.
_GO_NAMES = {code: "".join(word.capitalize() for word in code.name.split("_")) for code in grpc.StatusCode} | {
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}
