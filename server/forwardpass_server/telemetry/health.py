"""What is shown of a server's health: what probes are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from forwardpass_server.telemetry.families import Families


class HealthReading(NamedTuple):
    """What a server says of itself at one moment."""

    has_started: bool
    is_live: bool
    is_ready: bool
    is_draining: bool


_HEALTH = (
    (
        "forwardpass_started",
        "gauge",
        "1 once all models were tried, each required one could be called, and the session store was reached.",
    ),
    ("forwardpass_live", "gauge", "1 while the device works."),
    (
        "forwardpass_ready",
        "gauge",
        "1 while calls are welcome: started, live, not draining, and every required model can be called.",
    ),
    ("forwardpass_draining", "gauge", "1 from SIGTERM on: clients leave, and what runs is finished."),
)


class HealthMetrics:
    """Of one server. read: is asked at each scrape, on any thread."""

    def __init__(self, families: Families) -> None:
        self.read: Callable[[], HealthReading] = lambda: HealthReading(False, False, False, False)
        families.read(_HealthCollector(self), _HEALTH)


class _HealthCollector(Collector):
    """All of it at once: no scrape sees the half of a change."""

    def __init__(self, health: HealthMetrics) -> None:
        self._health = health

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for (name, _, meaning), value in zip(_HEALTH, self._health.read(), strict=True):
            yield GaugeMetricFamily(name, meaning, float(value))
