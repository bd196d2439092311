"""The HTTP server of the metrics port."""

from __future__ import annotations

import urllib.error
import urllib.request

import prometheus_client
import pytest

from forwardpass.wire.description import Function
from forwardpass_server.status.server import MonitoringServer
from forwardpass_server.telemetry.metrics import Metrics


def test_the_content_length_of_every_page_is_right():
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


def ask(url: str, method: str = "GET") -> tuple[int, str, dict[str, str]]:
    """The status, the body and the headers of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method)) as response:
            return response.status, response.read().decode(), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


@pytest.fixture
def metrics():
    """Every metric that a server has, each with a sample, and the URL of its port."""
    metrics = Metrics()
    metrics.machine.build("1", "2", "CPU:0")
    metrics.models.loaded("m", True, 1.0)
    metrics.models.call_ran("m", Function.LOSS, 1.0, 2.0, 3.0)
    server = MonitoringServer("127.0.0.1", 0, metrics.registry, lambda: "page")
    yield metrics, f"http://127.0.0.1:{server.port}"
    server.close()


def samples(text: str) -> dict[str, str]:
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return dict(lines)


def test_each_metric_can_be_requested_by_name(metrics):
    metrics, url = metrics
    _, whole, _ = ask(f"{url}/metrics")
    names = {name.partition("{")[0] for name in samples(whole)}
    families = {family.name for family in metrics.registry.collect() if family.samples}
    assert len(names) > 50
    for name in names | families:
        _, text, _ = ask(f"{url}/metrics?name[]={name}")
        found = {sample.partition("{")[0] for sample in samples(text)}
        assert found, name
        # A family is returned completely: a histogram with its buckets, sum and count.
        assert all(one == name or one.startswith(f"{name}_") for one in found)
        assert name in found or name in families


def test_several_names_can_be_requested_and_an_unknown_one_is_empty(metrics):
    _, url = metrics
    _, text, _ = ask(f"{url}/metrics?name[]=forwardpass_live&name[]=forwardpass_ready&name[]=unknown")
    assert set(samples(text)) == {"forwardpass_live", "forwardpass_ready"}
    assert ask(f"{url}/metrics?name[]=unknown")[:2] == (200, "")


@pytest.mark.parametrize("path", ["/", "/metrics", "/metrics?name[]=forwardpass_live", "/nothing"])
def test_head_has_the_headers_of_get_and_no_body(metrics, path):
    _, url = metrics
    status, body, headers = ask(url + path)
    head_status, head_body, head_headers = ask(url + path, "HEAD")
    assert head_body == ""
    assert head_status == status
    assert head_headers["Content-Type"] == headers["Content-Type"]
    assert headers["Content-Length"] == str(len(body.encode()))
    # Some metrics are times, whose number of digits changes from scrape to scrape.
    assert path == "/metrics" or head_headers["Content-Length"] == headers["Content-Length"]
    assert int(head_headers["Content-Length"]) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS", "BREW"])
@pytest.mark.parametrize("path", ["/", "/metrics", "/nothing"])
def test_other_methods_are_not_allowed(metrics, method, path):
    _, url = metrics
    status, _, headers = ask(url + path, method)
    assert status == 405
    assert headers["Allow"] == "GET, HEAD"
