"""OpenTelemetry spans: one for each call, with children for its time in the queue and its computation."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, Protocol

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from forwardpass.wire import errors
from forwardpass.wire.description import Function

# The statuses that mark the span of a server as failed. Others are errors of the caller, or no errors.
_FAILURES = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


_IS_STREAM = "forwardpass.is_stream"

# Timeout for one batch of spans, including retries. The server waits for the last batch when it ends.
_EXPORT_S = 3


class CallObserver(Protocol):
    """See `calls.execution.CallObserver`."""

    def batch(self, model: str, function: Function, examples: int) -> None:
        """See `calls.execution.CallObserver.batch`."""

    def call_ran(self, model: str, function: Function, arrived: float, began: float, ended: float) -> None:
        """See `calls.execution.CallObserver.call_ran`."""


class Tracing:
    """Creates spans and sends them to a collector, on a thread of its own.

    endpoint: the collector's URL for OTLP over gRPC; http:// for no TLS.
    uses_proxy: whether to use the HTTP proxy of the environment, if one is set.
    """

    def __init__(self, endpoint: str, *, uses_proxy: bool) -> None:
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override these defaults.
        resource = Resource({"service.name": "forwardpass", "service.version": version("forwardpass")})
        self._provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()))
        # Any: the exporter's annotation allows strings only, while gRPC needs a number.
        channel_options: Any = () if uses_proxy else (("grpc.enable_http_proxy", 0),)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S, channel_options=channel_options)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("forwardpass")
        self._propagator = TraceContextTextMapPropagator()

    def of_rpc(
        self, answer: Callable[..., Awaitable[Any]], path: str, is_stream: bool
    ) -> Callable[..., Awaitable[Any]]:
        """Wraps a gRPC handler in a span. Its parent is the span in the metadata of the call."""
        name = path.removeprefix("/")

        async def traced(request: Any, context: Any) -> Any:
            with self._span(name, context.invocation_metadata()) as span:
                if is_stream:
                    span.set_attribute(_IS_STREAM, True)
                status = "CANCELLED"
                try:
                    response = await answer(request, context)
                    status = "OK"
                    return response
                except Exception:
                    status = context.code().name
                    raise
                finally:
                    _end(span, status)

        return traced

    def of_pipeline(self, methods: Mapping[str, Any]) -> dict[str, Any]:
        """Wraps the methods that pipelines call in spans. Their parent is the span of the pipeline."""
        return {name: self._of_method(name, method) for name, method in methods.items()}

    def _of_method(self, name: str, method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Any]:
        async def traced(data: Any, context: Any) -> Any:
            with self._span(f"pipeline/{name}") as span:
                try:
                    response = await method(data, context)
                except Exception as error:
                    _end(span, error.status if isinstance(error, errors.ForwardPassError) else "INTERNAL")
                    raise
                except asyncio.CancelledError:
                    _end(span, "CANCELLED")
                    raise
                _end(span, "OK")
                return response

        return traced

    @contextlib.contextmanager
    def _span(self, name: str, metadata: Iterable[tuple[str, str | bytes]] | None = None) -> Iterator[Span]:
        parent = None
        if metadata is not None:
            parent = self._propagator.extract({key: value for key, value in metadata if isinstance(value, str)})
        # Exceptions are not recorded: their messages may hold examples or weights.
        with self._tracer.start_as_current_span(
            name,
            parent,
            SpanKind.SERVER if metadata is not None else SpanKind.INTERNAL,
            {"rpc.system": "grpc"},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    def of_calls(self, observer: CallObserver) -> CallObserver:
        """Wraps an observer: each event reaches `observer` and creates spans."""
        return _CallSpans(observer, self._tracer)

    def close(self) -> None:
        """Sends the remaining spans, or drops them after some seconds."""
        self._provider.shutdown()


class _CallSpans:
    """See `Tracing.of_calls`."""

    def __init__(self, observer: CallObserver, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._observer = observer
        self.batch = observer.batch

    def call_ran(self, model: str, function: Function, arrived: float, began: float, ended: float) -> None:
        """See `calls.execution.CallObserver.call_ran`."""
        self._observer.call_ran(model, function, arrived, began, ended)
        call = trace.get_current_span()
        # An evaluation runs any number of batches: its stream is one span without children.
        if not call.is_recording() or getattr(call, "attributes", {}).get(_IS_STREAM):
            return
        call.set_attribute("forwardpass.model", model)
        call.set_attribute("forwardpass.function", function.name.lower())
        now_s, now_ns = time.perf_counter(), time.time_ns()
        for name, start, end in (("queue", arrived, began or now_s), ("execute", began, ended)):
            if start and end:
                start_ns, end_ns = (now_ns - round((now_s - moment) * 1e9) for moment in (start, end))
                self._tracer.start_span(name, start_time=start_ns).end(end_ns)


def _end(span: Span, status: str) -> None:
    span.set_attribute("rpc.grpc.status", status)
    if status in _FAILURES:
        span.set_status(StatusCode.ERROR)
