"""A real receiver of OpenTelemetry's spans."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class SpanCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes OTLP over gRPC on a free port. A context manager. `spans`: what has come, in its order."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.spans: list[Span] = []
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"{host}:0")
        self.url = f"http://{host}:{self.port}"

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.spans += [
            span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
        ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def __enter__(self) -> SpanCollector:
        self._server.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.stop(0).wait()
