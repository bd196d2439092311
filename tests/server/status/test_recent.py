"""Rates, means and quantiles of the last minute."""

from __future__ import annotations

import prometheus_client as prometheus
import pytest

from forwardpass_server.status.recent import Recent


@pytest.fixture
def registry():
    return prometheus.CollectorRegistry()


def test_only_the_growth_since_the_first_snapshot_counts(registry):
    counter = prometheus.Counter("calls", "Calls.", ("model",), registry=registry)
    counter.labels("a").inc(100)
    recent = Recent(registry)
    counter.labels("a").inc(2)
    counter.labels("b").inc(3)
    window = recent.window()
    assert window.growth("calls_total") == 5
    assert window.growth("calls_total", model="a") == 2
    assert window.total("calls_total") == 105
    assert window.labels("calls_total", "model") == ["a", "b"]
    assert window.growth("nothing_total") == 0


def test_a_series_that_was_removed_and_created_again_grows_from_zero(registry):
    counter = prometheus.Counter("calls", "Calls.", ("model",), registry=registry)
    counter.labels("a").inc(100)
    recent = Recent(registry)
    counter.remove("a")
    counter.labels("a").inc(3)
    assert recent.window().growth("calls_total") == 3


def test_quantiles_are_interpolated_and_none_without_observations(registry):
    seconds = prometheus.Histogram("seconds", "Seconds.", buckets=(1, 2, 4), registry=registry)
    recent = Recent(registry)
    both = [("seconds", {})]
    assert recent.window().quantile(0.5, both) is None
    assert recent.window().mean("seconds") is None
    for value in (0.5, 1.5, 1.5, 3):
        seconds.observe(value)
    window = recent.window()
    assert window.quantile(0.25, both) == 1
    assert window.quantile(0.5, both) == 1.5
    assert window.quantile(1.0, both) == 4
    assert window.mean("seconds") == 6.5 / 4
    for _ in range(100):
        seconds.observe(1000)
    # The last bucket has no upper bound.
    assert recent.window().quantile(0.99, both) == 4


def test_snapshots_older_than_a_minute_are_dropped(registry):
    counter = prometheus.Counter("calls", "Calls.", registry=registry)
    recent = Recent(registry)
    for _ in range(30):
        counter.inc()
        recent.take()
    assert recent.window().growth("calls_total") == 11
