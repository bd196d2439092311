"""The metrics port: metrics for Prometheus, and a page for a person."""

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
    # A browser that is told so fetches and runs nothing, whatever a page were made to say.
    (
        "Content-Security-Policy",
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


_METHODS = ("GET", "HEAD")


class _NamedMetrics:
    """The metrics of a registry, or those that `?name[]=` asks for: by name of a family or of a sample.

    In place of prometheus_client's own choice, which knows neither names of histograms nor metrics that are read when
    they are scraped: a scrape of these was empty.
    """

    def __init__(self, registry: prometheus.CollectorRegistry, names: frozenset[str] | None = None) -> None:
        self._registry = registry
        self._names = names

    def restricted_registry(self, names: Iterable[str]) -> _NamedMetrics:
        return _NamedMetrics(self._registry, frozenset(names))

    def collect(self) -> Iterator[prometheus.Metric]:
        for family in self._registry.collect():
            if self._names is None or family.name in self._names:
                yield family
                continue
            chosen = copy.copy(family)
            chosen.samples = [sample for sample in family.samples if sample.name in self._names]
            if chosen.samples:
                yield chosen


class _Handler(simple_server.WSGIRequestHandler):
    # Whoever says nothing for so long is not listened to any longer.
    timeout = 10

    def log_message(self, *arguments: object) -> None:
        """Says nothing: a scrape is no event."""


class _Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of those who hang up."""


class MonitoringServer:
    """Answers on threads of its own. registry: what is shown at /metrics. page: makes what is shown at /."""

    def __init__(self, host: str, port: int, registry: prometheus.CollectorRegistry, page: Callable[[], str]) -> None:
        """Listens from now on. Raises OSError where it cannot."""
        metrics: Any = prometheus.make_wsgi_app(_NamedMetrics(registry))

        def answer(environ: dict[str, Any], start_response: Any) -> Any:
            method = environ["REQUEST_METHOD"]
            if method not in _METHODS:
                start_response("405 Method Not Allowed", [("Allow", ", ".join(_METHODS))])
                return [b"There are GET and HEAD."]
            if method == "HEAD":
                return head(environ, start_response)
            return get(environ, start_response)

        def head(environ: dict[str, Any], start_response: Any) -> Any:
            """The headers of the same GET, its Content-Length included, and no body."""
            answered: list[Any] = []
            body = get({**environ, "REQUEST_METHOD": "GET"}, lambda *arguments: answered.extend(arguments))
            status, headers = answered
            start_response(status, [*headers, ("Content-Length", str(sum(map(len, body))))])
            return []

        def get(environ: dict[str, Any], start_response: Any) -> Any:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                return metrics(environ, start_response)
            # A copy: the length of this answer is added to it.
            start_response("200 OK" if path == "/" else "404 Not Found", list(_HEADERS))
            return [page().encode() if path == "/" else b"There is / and /metrics."]

        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        server = type("_Server", (_Server,), {"address_family": family})
        self._server: simple_server.WSGIServer = simple_server.make_server(
            str(address[0]), port, answer, server, _Handler
        )
        self.port: int = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="monitoring", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
