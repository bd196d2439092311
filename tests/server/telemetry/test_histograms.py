"""Histograms: they show what those of Prometheus's own client do."""

from __future__ import annotations

import threading

import prometheus_client as prometheus

from forwardpass_server.telemetry.histograms import HistogramFamily

BOUNDS = (0.001, 0.25, 1, 2.5, 10)


def test_they_are_scraped_as_those_of_the_library_are():
    ours, theirs = prometheus.CollectorRegistry(), prometheus.CollectorRegistry()
    prometheus.disable_created_metrics()
    made = HistogramFamily("seconds", "Seconds.", ("model", "function"), BOUNDS)
    ours.register(made)
    alone = HistogramFamily("alone", "Without labels.", (), BOUNDS)
    ours.register(alone)
    library = prometheus.Histogram("seconds", "Seconds.", ("model", "function"), buckets=BOUNDS, registry=theirs)
    prometheus.Histogram("alone", "Without labels.", buckets=BOUNDS, registry=theirs)
    for family in (made, library):
        for value in (0, 0.001, 0.0011, 1, 1.5, 10, 11, 1e9):
            family.labels("m", "loss").observe(value)
        family.labels("other", "loss")
        family.labels("gone", "loss").observe(1)
        family.remove("gone", "loss")
    assert prometheus.generate_latest(ours) == prometheus.generate_latest(theirs)


def test_nothing_is_lost_between_threads():
    family = HistogramFamily("seconds", "Seconds.", (), BOUNDS)

    def observe() -> None:
        for _ in range(20_000):
            family.labels().observe(0.5)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert family.labels().read() == ([0, 0, 80_000, 80_000, 80_000, 80_000], 40_000.0)
