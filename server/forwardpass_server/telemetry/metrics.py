"""The service's Prometheus metrics. Labels are bounded: methods, codes and the operator's model names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import prometheus_client as prometheus

from forwardpass.wire.description import Function

# 100 us is less than gRPC itself needs, a minute more than a sensible deadline.
_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
_CALLS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_EXAMPLES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)

# Looking a labelled child up costs three times what counting in it does.
_CACHED_CHILDREN = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class RpcMetrics:
    """What is counted of one method. handled: by gRPC's name of the status, e.g. "INVALID_ARGUMENT"."""

    started: prometheus.Counter
    handled: Callable[[str], prometheus.Counter]
    seconds: prometheus.Histogram


class Metrics:
    """All metrics of one server, in a registry of their own. RPC names are those of go-grpc-prometheus."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        rpc = ("grpc_type", "grpc_service", "grpc_method")
        self._started = prometheus.Counter(
            "grpc_server_started_total", "RPCs started on the server.", rpc, registry=self.registry
        )
        self._handled = prometheus.Counter(
            "grpc_server_handled_total",
            "RPCs completed on the server, whatever their code.",
            (*rpc, "grpc_code"),
            registry=self.registry,
        )
        self._seconds = prometheus.Histogram(
            "grpc_server_handling_seconds",
            "Seconds from the arrival of an RPC to its answer.",
            rpc,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._pipeline_calls = prometheus.Counter(
            "forwardpass_pipeline_calls_total",
            "Calls on pipelines that ended, whatever their code. Each pipeline is one RPC besides.",
            ("method", "code"),
            registry=self.registry,
        )
        self._pipeline_seconds = prometheus.Histogram(
            "forwardpass_pipeline_call_seconds",
            "Seconds from the arrival of a whole call on a pipeline to its answer.",
            ("method",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch_examples = prometheus.Histogram(
            "forwardpass_batch_examples",
            "Examples in the batches that callers sent.",
            ("model", "function"),
            buckets=_EXAMPLES,
            registry=self.registry,
        )
        self._batched_calls = prometheus.Histogram(
            "forwardpass_batched_calls",
            "Calls run as one batch, where a model lets them be.",
            buckets=_CALLS,
            registry=self.registry,
        )
        self._models = prometheus.Gauge(
            "forwardpass_models", "Model versions by state.", ("state",), registry=self.registry
        )
        self._traces = prometheus.Counter(
            "forwardpass_traces_total",
            "Graphs traced from Python: only loading a model makes them.",
            registry=self.registry,
        )
        self._weights_bytes = prometheus.Gauge(
            "forwardpass_weights_bytes",
            "Weights that callers put, uploads under way included, on the device.",
            registry=self.registry,
        )
        self._weights_budget = prometheus.Gauge(
            "forwardpass_weights_budget_bytes", "What they may take.", registry=self.registry
        )
        self._weights_sets = prometheus.Gauge(
            "forwardpass_weights_sets", "Sets of weights on the device.", registry=self.registry
        )
        self._weights_tensors = prometheus.Gauge(
            "forwardpass_weights_tensors", "Tensors that they share.", registry=self.registry
        )
        self._weights_lookups = prometheus.Counter(
            "forwardpass_weights_lookups_total",
            "Uses of weights by their id: a hit finds them on the device.",
            ("outcome",),
            registry=self.registry,
        )
        self._weights_hits = self._weights_lookups.labels("hit")
        self._weights_misses = self._weights_lookups.labels("miss")
        self._weights_evictions = prometheus.Counter(
            "forwardpass_weights_evictions_total", "Sets dropped to make room for others.", registry=self.registry
        )
        self._weights_spill_failures = prometheus.Counter(
            "forwardpass_weights_spill_failures_total", "Sets that could not be kept on disk.", registry=self.registry
        )
        self._sessions = prometheus.Gauge(
            "forwardpass_sessions",
            "Metric sessions that are open; where servers share them, those that this one has used of late.",
            registry=self.registry,
        )
        self._sessions_expired = prometheus.Counter(
            "forwardpass_sessions_expired_total", "Sessions dropped since nobody used them.", registry=self.registry
        )
        self._session_updates = prometheus.Counter(
            "forwardpass_session_updates_total",
            "Updates of sessions: applied, or answered since they had been applied before.",
            ("outcome",),
            registry=self.registry,
        )
        self._applied_updates = self._session_updates.labels("applied")
        self._duplicate_updates = self._session_updates.labels("duplicate")
        self._session_commit_seconds = prometheus.Histogram(
            "forwardpass_session_commit_seconds",
            "Seconds from handing a session's record to its store until it was kept.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._weights_disk_bytes = prometheus.Gauge(
            "forwardpass_weights_disk_bytes",
            "Tensors in the folder of weights; 0 where there is no folder.",
            registry=self.registry,
        )
        self._weights_disk_budget = prometheus.Gauge(
            "forwardpass_weights_disk_budget_bytes", "What they may take.", registry=self.registry
        )
        self._weights_disk_sets = prometheus.Gauge(
            "forwardpass_weights_disk_sets", "Sets of weights in the folder.", registry=self.registry
        )
        self._pipeline_call_child = functools.lru_cache(_CACHED_CHILDREN)(
            lambda method, status: self._pipeline_calls.labels(method, _go_name(status))
        )
        self._pipeline_seconds_child = functools.lru_cache(_CACHED_CHILDREN)(self._pipeline_seconds.labels)
        self._batch_child = functools.lru_cache(_CACHED_CHILDREN)(
            lambda model, function: self._batch_examples.labels(model, function.name.lower())
        )

    def rpc(self, kind: str, service: str, method: str) -> RpcMetrics:
        """The metrics of one method. kind: "unary" or "server_stream" and so on."""
        labels = (kind, service, method)
        return RpcMetrics(
            self._started.labels(*labels),
            functools.lru_cache(lambda status: self._handled.labels(*labels, _go_name(status))),
            self._seconds.labels(*labels),
        )

    def pipeline_call(self, method: str, status: str, seconds: float) -> None:
        """Counts a call that ended on a pipeline. status: as for `RpcMetrics.handled`."""
        self._pipeline_call_child(method, status).inc()
        self._pipeline_seconds_child(method).observe(seconds)

    def batch(self, model: str, function: Function, examples: int) -> None:
        self._batch_child(model, function).observe(examples)

    def trace(self) -> None:
        self._traces.inc()

    def batched_calls(self, calls: int) -> None:
        self._batched_calls.observe(calls)

    def weights_hit(self) -> None:
        self._weights_hits.inc()

    def weights_missed(self) -> None:
        self._weights_misses.inc()

    def weights_evicted(self) -> None:
        self._weights_evictions.inc()

    def weights_spill_failed(self) -> None:
        self._weights_spill_failures.inc()

    def weight_store(
        self, used_bytes: Callable[[], int], budget_bytes: int, sets: Callable[[], int], tensors: Callable[[], int]
    ) -> None:
        """Shows what the weight store holds."""
        self._weights_bytes.set_function(used_bytes)
        self._weights_budget.set(budget_bytes)
        self._weights_sets.set_function(sets)
        self._weights_tensors.set_function(tensors)

    def session_store(self, count: Callable[[], int]) -> None:
        """Shows count() as the number of open sessions."""
        self._sessions.set_function(count)

    def sessions_expired(self, count: int) -> None:
        self._sessions_expired.inc(count)

    def session_updates(self, applied: int, duplicates: int) -> None:
        self._applied_updates.inc(applied)
        self._duplicate_updates.inc(duplicates)

    def session_commit(self, seconds: float) -> None:
        self._session_commit_seconds.observe(seconds)

    def weight_files(self, used_bytes: Callable[[], int], budget_bytes: int, sets: Callable[[], int]) -> None:
        """Shows what the folder of weights holds."""
        self._weights_disk_bytes.set_function(used_bytes)
        self._weights_disk_budget.set(budget_bytes)
        self._weights_disk_sets.set_function(sets)

    def models_in_state(self, state: str, count: Callable[[], int]) -> None:
        """Shows count() as the number of model versions in this state."""
        self._models.labels(state).set_function(count)


def _go_name(status: str) -> str:
    """As Go's codes print, in whose words dashboards for gRPC are written."""
    special = {"OK": "OK", "CANCELLED": "Canceled"}
    return special.get(status) or "".join(word.capitalize() for word in status.split("_"))
