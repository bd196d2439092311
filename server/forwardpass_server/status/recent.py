"""Rates and quantiles of the last minute, computed in the process, without Prometheus."""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping

import prometheus_client as prometheus

WINDOW_S = 60.0
INTERVAL_S = 5.0

_Series = dict[tuple[tuple[str, str], ...], float]
_Snapshot = dict[str, _Series]


class Recent:
    """Snapshots of a registry. Call `take` every `INTERVAL_S` seconds, always on the same thread."""

    def __init__(self, registry: prometheus.CollectorRegistry) -> None:
        self._registry = registry
        self._taken: collections.deque[tuple[float, _Snapshot]] = collections.deque(maxlen=round(WINDOW_S / INTERVAL_S))
        self.take()

    def take(self) -> None:
        """Takes a snapshot."""
        self._taken.append((time.monotonic(), self._read()))

    def window(self) -> Window:
        """The change since the oldest snapshot."""
        then_s, then = self._taken[0]
        return Window(max(time.monotonic() - then_s, 1e-3), self._read(), then)

    def _read(self) -> _Snapshot:
        snapshot: _Snapshot = collections.defaultdict(dict)
        for family in self._registry.collect():
            for sample in family.samples:
                snapshot[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
        return snapshot


class Window:
    """Two snapshots of all metrics, `seconds` apart. Methods take labels: they select the series that have them."""

    def __init__(self, seconds: float, now: _Snapshot, then: _Snapshot) -> None:
        self.seconds = seconds
        self._now = now
        self._then = then

    def labels(self, name: str, label: str) -> list[str]:
        """The values of a label, sorted."""
        return sorted({dict(labels)[label] for labels in self._now.get(name, {})})

    def total(self, name: str, **labels: str) -> float:
        """The sum of the selected series now."""
        return sum(value for _, value in _chosen(self._now, name, labels))

    def growth(self, name: str, **labels: str) -> float:
        """The increase of the selected counters between the snapshots."""
        before = dict(_chosen(self._then, name, labels))
        return sum(_grown(value, before.get(key, 0.0)) for key, value in _chosen(self._now, name, labels))

    def rate(self, name: str, **labels: str) -> float:
        """The increase per second."""
        return self.growth(name, **labels) / self.seconds

    def mean(self, histogram: str, **labels: str) -> float | None:
        """The mean of the observations; None without observations."""
        count = self.growth(f"{histogram}_count", **labels)
        return self.growth(f"{histogram}_sum", **labels) / count if count else None

    def quantile(self, share: float, histograms: Iterable[tuple[str, Mapping[str, str]]]) -> float | None:
        """A quantile of the observations, interpolated linearly within a bucket; None without observations.

        share: 0.99 for the 99th percentile. histograms: names with labels; all must have the same buckets.
        """
        grown: dict[float, float] = collections.defaultdict(float)
        for histogram, labels in histograms:
            before = dict(_chosen(self._then, f"{histogram}_bucket", labels))
            for key, value in _chosen(self._now, f"{histogram}_bucket", labels):
                grown[float(dict(key)["le"])] += _grown(value, before.get(key, 0.0))
        bounds = sorted(grown)
        if not bounds or not grown[bounds[-1]]:
            return None
        wanted = share * grown[bounds[-1]]
        for below, bound in itertools.pairwise([0.0, *bounds]):
            if grown[bound] >= wanted:
                inside = grown[bound] - grown.get(below, 0.0)
                # The last bucket has no upper bound: return its lower one.
                return (
                    below
                    if bound == float("inf")
                    else below + (bound - below) * ((wanted - grown.get(below, 0.0)) / inside if inside else 1.0)
                )
        return None


def _grown(now: float, before: float) -> float:
    """The increase of a counter. A smaller value means that its series was removed and created again."""
    return now - before if now >= before else now


def _chosen(
    snapshot: _Snapshot, name: str, labels: Mapping[str, str]
) -> Iterator[tuple[tuple[tuple[str, str], ...], float]]:
    wanted = set(labels.items())
    return ((key, value) for key, value in snapshot.get(name, {}).items() if wanted.issubset(key))
