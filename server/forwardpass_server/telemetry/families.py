"""Families of metrics: each is registered with Prometheus and listed for the catalogue."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import prometheus_client as prometheus
from prometheus_client.registry import Collector

# From less than the overhead of gRPC (100 us) to more than a usual deadline (60 s).
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """The catalogue entry of one metric.

    subject: the heading under which it is listed. name: as in a scrape; for a histogram without _bucket, _sum, _count.
    condition: a sentence that says when the metric exists; "" for always.
    """

    subject: str
    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    condition: str = ""


class Families:
    """Creates the metrics of one subject. registry, made: shared by all subjects; new metrics are added to both."""

    def __init__(self, subject: str, registry: prometheus.CollectorRegistry, made: list[Family]) -> None:
        self._subject = subject
        self._registry = registry
        self._made = made

    def counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> prometheus.Counter:
        """Creates a counter."""
        self._note(name, "counter", labels, meaning)
        return prometheus.Counter(name, meaning, labels, registry=self._registry)

    def gauge(self, name: str, meaning: str, labels: Sequence[str] = (), condition: str = "") -> prometheus.Gauge:
        """Creates a gauge."""
        self._note(name, "gauge", labels, meaning, condition)
        return prometheus.Gauge(name, meaning, labels, registry=self._registry)

    def histogram(
        self, name: str, meaning: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS
    ) -> prometheus.Histogram:
        """Creates a histogram. buckets: their upper bounds."""
        self._note(name, "histogram", labels, meaning)
        return prometheus.Histogram(name, meaning, labels, buckets=buckets, registry=self._registry)

    def read(self, collector: Collector, metrics: Sequence[tuple[str, str, str]], condition: str = "") -> None:
        """Adds metrics that a collector reads at the scrape. metrics: name, kind and meaning; they have no labels."""
        for name, kind, meaning in metrics:
            self._note(name, kind, (), meaning, condition)
        self._registry.register(collector)

    def _note(self, name: str, kind: str, labels: Sequence[str], meaning: str, condition: str = "") -> None:
        self._made.append(Family(self._subject, name, kind, tuple(labels), meaning, condition))
