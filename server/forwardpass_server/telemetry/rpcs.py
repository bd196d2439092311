"""Metrics of RPCs, with the names of go-grpc-prometheus, and of calls on pipelines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import prometheus_client as prometheus

from forwardpass_server.telemetry.families import Families

# Cached, because looking up a labelled child costs three times as much as counting in it.
_CACHED_CHILDREN = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class MethodMetrics:
    """The metrics of one method. handled: the counter for a gRPC status, such as "INVALID_ARGUMENT"."""

    started: prometheus.Counter
    handled: Callable[[str], prometheus.Counter]
    seconds: prometheus.Histogram
    received_bytes: prometheus.Counter
    sent_bytes: prometheus.Counter


class RpcMetrics:
    """The metrics of all methods of all services, including health and reflection."""

    def __init__(self, families: Families) -> None:
        rpc = ("grpc_type", "grpc_service", "grpc_method")
        self._started = families.counter("grpc_server_started_total", "RPCs started on the server.", rpc)
        self._handled = families.counter(
            "grpc_server_handled_total", "RPCs completed on the server, by status code.", (*rpc, "grpc_code")
        )
        self._seconds = families.histogram(
            "grpc_server_handling_seconds", "Seconds from the arrival of an RPC to its response.", rpc
        )
        self._received_bytes = families.counter(
            "forwardpass_received_bytes_total", "Bytes of received messages, including those of streams.", rpc
        )
        self._sent_bytes = families.counter(
            "forwardpass_sent_bytes_total", "Bytes of sent messages, including those of streams.", rpc
        )
        self._pipeline_calls = families.counter(
            "forwardpass_pipeline_calls_total",
            "Calls on pipelines that ended, by status code. The pipeline itself counts as one RPC in addition.",
            ("method", "code"),
        )
        self._pipeline_seconds = families.histogram(
            "forwardpass_pipeline_call_seconds",
            "Seconds from the arrival of a complete call on a pipeline to its response.",
            ("method",),
        )
        self._messages = families.gauge(
            "forwardpass_messages_bytes",
            "Bytes of requests that are being received, waiting or running, and of unread responses.",
        )
        self._messages_limit = families.gauge(
            "forwardpass_messages_limit_bytes",
            "Limit of these bytes (--max-concurrent-mib); requests beyond it are refused.",
        )
        self._pipeline_call_child = functools.lru_cache(_CACHED_CHILDREN)(
            lambda method, status: self._pipeline_calls.labels(method, _go_name(status))
        )
        self._pipeline_seconds_child = functools.lru_cache(_CACHED_CHILDREN)(self._pipeline_seconds.labels)

    def messages(self, size_bytes: Callable[[], int], limit_bytes: Callable[[], int]) -> None:
        """Reports size_bytes() as the present size of messages, and limit_bytes() as its limit."""
        self._messages.set_function(size_bytes)
        self._messages_limit.set_function(limit_bytes)

    def method(self, kind: str, service: str, method: str) -> MethodMetrics:
        """The metrics of one method. kind: "unary", "server_stream", "client_stream" or "bidi_stream"."""
        labels = (kind, service, method)
        return MethodMetrics(
            self._started.labels(*labels),
            functools.lru_cache(lambda status: self._handled.labels(*labels, _go_name(status))),
            self._seconds.labels(*labels),
            self._received_bytes.labels(*labels),
            self._sent_bytes.labels(*labels),
        )

    def pipeline_call(self, method: str, status: str, seconds: float) -> None:
        """Counts a call that ended on a pipeline. status: as for `MethodMetrics.handled`."""
        self._pipeline_call_child(method, status).inc()
        self._pipeline_seconds_child(method).observe(seconds)


def _go_name(status: str) -> str:
    """The status code as Go prints it: dashboards for gRPC use these names."""
    special = {"OK": "OK", "CANCELLED": "Canceled"}
    return special.get(status) or "".join(word.capitalize() for word in status.split("_"))
