"""What is counted of models: their versions, their loads, and their calls on the way through the server."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import prometheus_client as prometheus

from forwardpass.wire.description import Function
from forwardpass_server.telemetry.families import Families

_CALLS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_EXAMPLES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
# A small model takes half a second to trace and warm; a large one on a busy machine minutes.
_LOAD_SECONDS = (0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180, 600)

_CALL = ("model", "function")


@dataclasses.dataclass(frozen=True, slots=True)
class _Calls:
    """What is counted of one function of one model."""

    examples: prometheus.Histogram
    queue: prometheus.Histogram
    execute: prometheus.Histogram


class ModelMetrics:
    """Of all models. What is labelled with a model goes when the model does."""

    def __init__(self, families: Families) -> None:
        self._versions = families.gauge("forwardpass_models", "Model versions by state.", ("state",))
        self._loads = families.counter(
            "forwardpass_model_loads_total", 'Loads of versions that ended "loaded" or "failed".', ("model", "outcome")
        )
        self._load_seconds = families.histogram(
            "forwardpass_model_load_seconds",
            "Seconds to read, trace and warm a version.",
            ("outcome",),
            _LOAD_SECONDS,
        )
        # Prometheus sees no growth in a series that begins with it.
        for outcome in ("loaded", "failed"):
            self._load_seconds.labels(outcome)
        self._traces = families.counter(
            "forwardpass_traces_total", "Graphs traced from Python: only loading a model makes them."
        )
        self._decode_seconds = families.histogram(
            "forwardpass_decode_seconds", "Seconds from a call's bytes to its arrays."
        )
        self._queue_seconds = families.histogram(
            "forwardpass_queue_seconds",
            "Seconds that a call waited, for others to share a batch and for a thread, until its computation began.",
            _CALL,
        )
        self._batch_wait_seconds = families.histogram(
            "forwardpass_batch_wait_seconds", "Seconds of it for others to share a batch, of calls that waited for any."
        )
        self._execute_seconds = families.histogram(
            "forwardpass_execute_seconds",
            "Seconds that a call's computation took; a batch's for each of its calls.",
            _CALL,
        )
        self._encode_seconds = families.histogram(
            "forwardpass_encode_seconds", "Seconds from a call's results to the bytes of its answer."
        )
        self._batch_examples = families.histogram(
            "forwardpass_batch_examples", "Examples in the batches that callers sent.", _CALL, _EXAMPLES
        )
        self._batched_calls = families.histogram(
            "forwardpass_batched_calls", "Calls run as one batch, where a model lets them be.", (), _CALLS
        )
        self.decoded = self._decode_seconds.observe
        self.encoded = self._encode_seconds.observe
        self.batched_calls = self._batched_calls.observe
        self.batch_wait = self._batch_wait_seconds.observe
        self.trace = self._traces.inc
        self._outcomes: set[tuple[str, str]] = set()
        self._by_model: dict[str, dict[Function, _Calls]] = {}
        # Calls may run on when their model is gone: they are counted here, where nobody looks.
        self._forgotten: set[str] = set()
        unseen = prometheus.Histogram("unseen", "Of models that are gone.", registry=None)
        self._unseen = _Calls(unseen, unseen, unseen)

    def in_state(self, state: str, count: Callable[[], int]) -> None:
        """Shows count() as the number of model versions in this state."""
        self._versions.labels(state).set_function(count)

    def loaded(self, model: str, is_available: bool, seconds: float) -> None:
        """Counts a load that ended. On any thread."""
        outcome = "loaded" if is_available else "failed"
        self._forgotten.discard(model)
        self._loads.labels(model, outcome).inc()
        self._outcomes.add((model, outcome))
        self._load_seconds.labels(outcome).observe(seconds)

    def forget(self, model: str) -> None:
        """Drops the series of a model that has no version any more."""
        self._forgotten.add(model)
        for labels in [labels for labels in self._outcomes if labels[0] == model]:
            self._outcomes.remove(labels)
            self._loads.remove(*labels)
        for function in self._by_model.pop(model, ()):
            for metric in (self._queue_seconds, self._execute_seconds, self._batch_examples):
                metric.remove(model, function.name.lower())

    def batch(self, model: str, function: Function, examples: int) -> None:
        self._calls(model, function).examples.observe(examples)

    def call_ran(self, model: str, function: Function, arrived: float, began: float, ended: float) -> None:
        """See `calls.execution.CallObserver`. A call that was given up waited until now."""
        calls = self._calls(model, function)
        calls.queue.observe((began or time.perf_counter()) - arrived)
        if ended:
            calls.execute.observe(ended - began)

    def _calls(self, model: str, function: Function) -> _Calls:
        try:
            return self._by_model[model][function]
        except KeyError:
            return self._unseen if model in self._forgotten else self._new_calls(model, function)

    def _new_calls(self, model: str, function: Function) -> _Calls:
        labels = (model, function.name.lower())
        made = _Calls(
            self._batch_examples.labels(*labels),
            self._queue_seconds.labels(*labels),
            self._execute_seconds.labels(*labels),
        )
        self._by_model.setdefault(model, {})[function] = made
        return made
