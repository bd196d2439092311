"""Metrics of training on the server."""

from __future__ import annotations

from collections.abc import Callable

import prometheus_client as prometheus

from forwardpass_server.telemetry.families import Families

_OUTCOMES = ("finished", "failed", "interrupted")
_PREPARE_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180)


class TrainingMetrics:
    """The metrics of one server's trainings. Series with the name of a model are removed with the model."""

    def __init__(self, families: Families) -> None:
        self._updates = families.counter(
            "forwardpass_training_updates_total",
            'Client updates that have ended, by outcome: "finished" with a result, "failed" by an error of its own, '
            'or "interrupted" because its stream or the server ended.',
            ("outcome",),
        )
        self._step_seconds = families.histogram(
            "forwardpass_training_step_seconds",
            "Seconds of an optimizer step, with the time that it waited for calls and for other trainings.",
            ("model",),
        )
        self._prepare_seconds = families.histogram(
            "forwardpass_training_prepare_seconds",
            'Seconds to prepare an optimizer at its first use, by outcome: "prepared", or "refused" for one that '
            "cannot train.",
            ("outcome",),
            _PREPARE_SECONDS,
        )
        self._states_bytes = families.gauge(
            "forwardpass_training_states_bytes",
            "Bytes of the states of the client updates that run: weights, optimizer variables and metrics.",
        )
        # Create the series at 0: Prometheus cannot see the growth of a series that appears with its first count.
        for outcome in _OUTCOMES:
            self._updates.labels(outcome)
        for outcome in ("prepared", "refused"):
            self._prepare_seconds.labels(outcome)
        self._by_model: dict[str, prometheus.Histogram] = {}

    def states(self, size_bytes: Callable[[], int]) -> None:
        """Reports size_bytes() as the size of the states."""
        self._states_bytes.set_function(size_bytes)

    def training_step(self, model: str, seconds: float) -> None:
        """See `training.update.StepObserver`."""
        steps = self._by_model.get(model)
        if steps is None:
            steps = self._by_model[model] = self._step_seconds.labels(model)
        steps.observe(seconds)

    def training_ended(self, outcome: str) -> None:
        """See `training.service.TrainingObserver`."""
        self._updates.labels(outcome).inc()

    def optimizer_prepared(self, is_sound: bool, seconds: float) -> None:
        """See `training.preparation.PreparationObserver`."""
        self._prepare_seconds.labels("prepared" if is_sound else "refused").observe(seconds)

    def forget(self, model: str) -> None:
        """Removes the series of a model without versions."""
        if self._by_model.pop(model, None) is not None:
            self._step_seconds.remove(model)
