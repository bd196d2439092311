"""Families of metrics: made in one registry, and known by what a catalogue says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import prometheus_client as prometheus
from prometheus_client.registry import Collector

# 100 us is less than gRPC itself needs, a minute more than a sensible deadline.
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """What there is to say of a metric.

    subject: what it is about, in words. name: as it is scraped, of a histogram without _bucket, _sum and _count.
    condition: where there is any of it, as a sentence; "" for everywhere.
    """

    subject: str
    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    condition: str = ""


class Families:
    """Makes metrics about one subject. registry, made: where they are put, beside those of other subjects."""

    def __init__(self, subject: str, registry: prometheus.CollectorRegistry, made: list[Family]) -> None:
        self._subject = subject
        self._registry = registry
        self._made = made

    def counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> prometheus.Counter:
        self._note(name, "counter", labels, meaning)
        return prometheus.Counter(name, meaning, labels, registry=self._registry)

    def gauge(self, name: str, meaning: str, labels: Sequence[str] = (), condition: str = "") -> prometheus.Gauge:
        self._note(name, "gauge", labels, meaning, condition)
        return prometheus.Gauge(name, meaning, labels, registry=self._registry)

    def histogram(
        self, name: str, meaning: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS
    ) -> prometheus.Histogram:
        self._note(name, "histogram", labels, meaning)
        return prometheus.Histogram(name, meaning, labels, buckets=buckets, registry=self._registry)

    def read(self, collector: Collector, metrics: Sequence[tuple[str, str, str]], condition: str = "") -> None:
        """Adds metrics that are read when they are scraped. metrics: the name, kind and meaning of each, unlabelled."""
        for name, kind, meaning in metrics:
            self._note(name, kind, (), meaning, condition)
        self._registry.register(collector)

    def _note(self, name: str, kind: str, labels: Sequence[str], meaning: str, condition: str = "") -> None:
        self._made.append(Family(self._subject, name, kind, tuple(labels), meaning, condition))
