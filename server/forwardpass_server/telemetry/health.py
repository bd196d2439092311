"""Metrics of the server's health: the same states that probes read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from forwardpass_server.telemetry.families import Families


class HealthReading(NamedTuple):
    """The health of a server at one moment."""

    has_started: bool
    is_live: bool
    is_ready: bool
    is_draining: bool


_HEALTH = (
    (
        "forwardpass_started",
        "gauge",
        "1 once all models are loaded or have failed, each required model can be called, and the session store works.",
    ),
    ("forwardpass_live", "gauge", "1 while the device works."),
    (
        "forwardpass_ready",
        "gauge",
        "1 while the server should receive calls: started, live, not draining, and each required model can be called.",
    ),
    (
        "forwardpass_draining",
        "gauge",
        "1 from SIGTERM on: running calls are finished, new calls should go to other servers.",
    ),
)


class HealthMetrics:
    """The health metrics of one server. `read` is called at each scrape, on any thread."""

    def __init__(self, families: Families) -> None:
        self.read: Callable[[], HealthReading] = lambda: HealthReading(False, False, False, False)
        families.read(_HealthCollector(self), _HEALTH)


class _HealthCollector(Collector):
    """Reads all states at once, so that a scrape is consistent."""

    def __init__(self, health: HealthMetrics) -> None:
        self._health = health

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The states as gauges."""
        for (name, _, meaning), value in zip(_HEALTH, self._health.read(), strict=True):
            yield GaugeMetricFamily(name, meaning, float(value))
