"""The last minute of metrics: rates, means and quantiles of what has become."""

from __future__ import annotations

import prometheus_client as prometheus
import pytest

from forwardpass_server.status.recent import Recent


@pytest.fixture
def registry():
    return prometheus.CollectorRegistry()


def test_only_what_has_become_since_counts(registry):
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


def test_a_series_that_went_and_came_back_has_not_shrunk(registry):
    counter = prometheus.Counter("calls", "Calls.", ("model",), registry=registry)
    counter.labels("a").inc(100)
    recent = Recent(registry)
    counter.remove("a")
    counter.labels("a").inc(3)
    assert recent.window().growth("calls_total") == 3


def test_quantiles_lie_within_their_buckets_and_nothing_has_none(registry):
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
    # No more is known of it than that it was beyond the last bound.
    assert recent.window().quantile(0.99, both) == 4


def test_no_more_than_a_minute_is_remembered(registry):
    counter = prometheus.Counter("calls", "Calls.", registry=registry)
    recent = Recent(registry)
    for _ in range(30):
        counter.inc()
        recent.take()
    assert recent.window().growth("calls_total") == 11
