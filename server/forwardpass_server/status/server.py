"""The HTTP server of the metrics port: /metrics for Prometheus, / for the status page."""

from __future__ import annotations

import copy
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref import simple_server

import prometheus_client as prometheus

_HEADERS = (
    ("Content-Type", "text/html; charset=utf-8"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    # The browser runs no script and loads no resource, even if the page held injected HTML.
    (
        "Content-Security-Policy",
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


_METHODS = ("GET", "HEAD")


class _NamedMetrics:
    """The metrics of a registry, restricted by `?name[]=` to names of families or samples.

    Replaces the restriction of prometheus_client, which returns nothing for the names of histograms and for metrics
    that a collector reads at the scrape.
    """

    def __init__(self, registry: prometheus.CollectorRegistry, names: frozenset[str] | None = None) -> None:
        self._registry = registry
        self._names = names

    def restricted_registry(self, names: Iterable[str]) -> _NamedMetrics:
        """The same registry, restricted to some names: prometheus_client calls it for `?name[]=`."""
        return _NamedMetrics(self._registry, frozenset(names))

    def collect(self) -> Iterator[prometheus.Metric]:
        """The families, each with the selected samples only."""
        for family in self._registry.collect():
            if self._names is None or family.name in self._names:
                yield family
                continue
            chosen = copy.copy(family)
            chosen.samples = [sample for sample in family.samples if sample.name in self._names]
            if chosen.samples:
                yield chosen


class _Handler(simple_server.WSGIRequestHandler):
    # Seconds: closes a connection that sends nothing.
    timeout = 10

    def log_message(self, *arguments: object) -> None:
        """Suppresses the log line of each request."""


class _Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Suppresses the traceback when a client closes its connection."""


class MonitoringServer:
    """An HTTP server on threads of its own.

    registry: the metrics at /metrics. page: renders the page at /.
    """

    def __init__(self, host: str, port: int, registry: prometheus.CollectorRegistry, page: Callable[[], str]) -> None:
        """Starts to listen. Raises OSError if it cannot."""
        metrics: Any = prometheus.make_wsgi_app(_NamedMetrics(registry))

        def answer(environ: dict[str, Any], start_response: Any) -> Any:
            method = environ["REQUEST_METHOD"]
            if method not in _METHODS:
                start_response("405 Method Not Allowed", [("Allow", ", ".join(_METHODS))])
                return [b"Method not allowed: use GET or HEAD."]
            if method == "HEAD":
                return head(environ, start_response)
            return get(environ, start_response)

        def head(environ: dict[str, Any], start_response: Any) -> Any:
            """Answers HEAD with the headers of the same GET, including Content-Length."""
            answered: list[Any] = []
            body = get({**environ, "REQUEST_METHOD": "GET"}, lambda *arguments: answered.extend(arguments))
            status, headers = answered
            start_response(status, [*headers, ("Content-Length", str(sum(map(len, body))))])
            return []

        def get(environ: dict[str, Any], start_response: Any) -> Any:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                return metrics(environ, start_response)
            # A copy, because wsgiref adds Content-Length to the list.
            start_response("200 OK" if path == "/" else "404 Not Found", list(_HEADERS))
            return [page().encode() if path == "/" else b"Not found: use / or /metrics."]

        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        server = type("_Server", (_Server,), {"address_family": family})
        self._server: simple_server.WSGIServer = simple_server.make_server(
            str(address[0]), port, answer, server, _Handler
        )
        self.port: int = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="monitoring", daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
