"""The metrics port's answers."""

from __future__ import annotations

import urllib.request

import prometheus_client

from forwardpass_server.app.monitoring import MonitoringServer


def test_every_page_is_as_long_as_it_says():
    pages = ["long" * 100, "short", "somewhat longer"]
    shown = iter(pages)
    server = MonitoringServer("127.0.0.1", 0, prometheus_client.CollectorRegistry(), lambda: next(shown))
    try:
        found = []
        for _ in pages:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/") as response:
                found.append(response.read().decode())
    finally:
        server.close()
    assert found == pages
