"""The metrics port: metrics for Prometheus, and a page for a person."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable
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
        metrics: Any = prometheus.make_wsgi_app(registry)

        def answer(environ: dict[str, Any], start_response: Any) -> Any:
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
