"""Metrics of models: versions, loads, and the stages of their calls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import prometheus_client as prometheus

from forwardpass.wire.description import Function
from forwardpass_server.telemetry.families import Families

_CALLS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_EXAMPLES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
# A small model takes half a second to trace and warm up; a large one on a busy machine takes minutes.
_LOAD_SECONDS = (0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180, 600)

_CALL = ("model", "function")


@dataclasses.dataclass(frozen=True, slots=True)
class _Calls:
    """The series of one function of one model."""

    examples: prometheus.Histogram
    queue: prometheus.Histogram
    execute: prometheus.Histogram


class ModelMetrics:
    """The metrics of all models. Series with the name of a model are removed with the model."""

    def __init__(self, families: Families) -> None:
        self._versions = families.gauge("forwardpass_models", "Model versions by state.", ("state",))
        self._loads = families.counter(
            "forwardpass_model_loads_total",
            'Finished loads of versions, by outcome: "loaded" or "failed".',
            ("model", "outcome"),
        )
        self._load_seconds = families.histogram(
            "forwardpass_model_load_seconds",
            "Seconds to read, trace and warm up a version.",
            ("outcome",),
            _LOAD_SECONDS,
        )
        # Create the series at 0: Prometheus cannot see the growth of a series that appears with its first count.
        for outcome in ("loaded", "failed"):
            self._load_seconds.labels(outcome)
        self._traces = families.counter(
            "forwardpass_traces_total",
            "Graphs traced from Python: by loads of models, and by preparations of optimizers. Calls never trace.",
        )
        self._decode_seconds = families.histogram(
            "forwardpass_decode_seconds", "Seconds to decode a request to arrays."
        )
        self._queue_seconds = families.histogram(
            "forwardpass_queue_seconds",
            "Seconds that a call waited for a batch and for a thread before its computation began.",
            _CALL,
        )
        self._batch_wait_seconds = families.histogram(
            "forwardpass_batch_wait_seconds",
            "Seconds of the queue time that a call waited for others to share a batch; only calls that waited.",
        )
        self._execute_seconds = families.histogram(
            "forwardpass_execute_seconds",
            "Seconds of a call's computation; for a shared batch, its duration counts for each call.",
            _CALL,
        )
        self._encode_seconds = families.histogram(
            "forwardpass_encode_seconds", "Seconds to encode the results to a response."
        )
        self._batch_examples = families.histogram(
            "forwardpass_batch_examples", "Examples in the batch of a request.", _CALL, _EXAMPLES
        )
        self._batched_calls = families.histogram(
            "forwardpass_batched_calls", "Calls that ran as one batch, for models that can be batched.", (), _CALLS
        )
        self._stacked_sets = families.histogram(
            "forwardpass_stacked_sets", "Sets of weights of computations for several sets.", (), _CALLS
        )
        self.decoded = self._decode_seconds.observe
        self.encoded = self._encode_seconds.observe
        self.batched_calls = self._batched_calls.observe
        self.stacked_sets = self._stacked_sets.observe
        self.batch_wait = self._batch_wait_seconds.observe
        self.trace = self._traces.inc
        self._outcomes: set[tuple[str, str]] = set()
        self._by_model: dict[str, dict[Function, _Calls]] = {}
        # Calls may still run after their model is unloaded. They are counted in an unregistered metric, because a
        # series with the name of the model would appear again.
        self._forgotten: set[str] = set()
        unseen = prometheus.Histogram("unseen", "Of unloaded models.", registry=None)
        self._unseen = _Calls(unseen, unseen, unseen)

    def in_state(self, state: str, count: Callable[[], int]) -> None:
        """Reports count() as the number of versions in a state."""
        self._versions.labels(state).set_function(count)

    def loaded(self, model: str, is_available: bool, seconds: float) -> None:
        """Counts a load that has ended. Thread-safe."""
        outcome = "loaded" if is_available else "failed"
        self._forgotten.discard(model)
        self._loads.labels(model, outcome).inc()
        self._outcomes.add((model, outcome))
        self._load_seconds.labels(outcome).observe(seconds)

    def forget(self, model: str) -> None:
        """Removes the series of a model without versions."""
        self._forgotten.add(model)
        for labels in [labels for labels in self._outcomes if labels[0] == model]:
            self._outcomes.remove(labels)
            self._loads.remove(*labels)
        for function in self._by_model.pop(model, ()):
            for metric in (self._queue_seconds, self._execute_seconds, self._batch_examples):
                metric.remove(model, function.name.lower())

    def batch(self, model: str, function: Function, examples: int) -> None:
        """Counts the examples of a request."""
        self._calls(model, function).examples.observe(examples)

    def call_ran(self, model: str, function: Function, arrived: float, began: float, ended: float) -> None:
        """See `calls.execution.CallObserver`. A call that was cancelled in the queue has waited until now."""
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
