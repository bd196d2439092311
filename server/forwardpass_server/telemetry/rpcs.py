"""What is counted of RPCs, by the names of go-grpc-prometheus, and of calls on pipelines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import prometheus_client as prometheus

from forwardpass_server.telemetry.families import Families

# Looking a labelled child up costs three times what counting in it does.
_CACHED_CHILDREN = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class MethodMetrics:
    """What is counted of one method. handled: by gRPC's name of the status, e.g. "INVALID_ARGUMENT"."""

    started: prometheus.Counter
    handled: Callable[[str], prometheus.Counter]
    seconds: prometheus.Histogram
    received_bytes: prometheus.Counter
    sent_bytes: prometheus.Counter


class RpcMetrics:
    """Of all methods of all services, health and reflection included."""

    def __init__(self, families: Families) -> None:
        rpc = ("grpc_type", "grpc_service", "grpc_method")
        self._started = families.counter("grpc_server_started_total", "RPCs started on the server.", rpc)
        self._handled = families.counter(
            "grpc_server_handled_total", "RPCs completed on the server, whatever their code.", (*rpc, "grpc_code")
        )
        self._seconds = families.histogram(
            "grpc_server_handling_seconds", "Seconds from the arrival of an RPC to its answer.", rpc
        )
        self._received_bytes = families.counter(
            "forwardpass_received_bytes_total", "Bytes of messages that callers sent, those of streams included.", rpc
        )
        self._sent_bytes = families.counter(
            "forwardpass_sent_bytes_total", "Bytes of messages that callers were sent, those of streams included.", rpc
        )
        self._pipeline_calls = families.counter(
            "forwardpass_pipeline_calls_total",
            "Calls on pipelines that ended, whatever their code. Each pipeline is one RPC besides.",
            ("method", "code"),
        )
        self._pipeline_seconds = families.histogram(
            "forwardpass_pipeline_call_seconds",
            "Seconds from the arrival of a whole call on a pipeline to its answer.",
            ("method",),
        )
        self._messages = families.gauge(
            "forwardpass_messages_bytes",
            "Bytes of requests that arrive, wait or run, and of responses that are not read yet.",
        )
        self._messages_limit = families.gauge(
            "forwardpass_messages_limit_bytes", "How many there may be at once; further requests are refused."
        )
        self._pipeline_call_child = functools.lru_cache(_CACHED_CHILDREN)(
            lambda method, status: self._pipeline_calls.labels(method, _go_name(status))
        )
        self._pipeline_seconds_child = functools.lru_cache(_CACHED_CHILDREN)(self._pipeline_seconds.labels)

    def messages(self, size_bytes: Callable[[], int], limit_bytes: Callable[[], int]) -> None:
        """Shows size_bytes() as what there is now, and limit_bytes() as what there may be."""
        self._messages.set_function(size_bytes)
        self._messages_limit.set_function(limit_bytes)

    def method(self, kind: str, service: str, method: str) -> MethodMetrics:
        """The metrics of one method. kind: "unary" or "server_stream" and so on."""
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
    """As Go's codes print, in whose words dashboards for gRPC are written."""
    special = {"OK": "OK", "CANCELLED": "Canceled"}
    return special.get(status) or "".join(word.capitalize() for word in status.split("_"))
