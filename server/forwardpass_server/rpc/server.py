"""The gRPC server: port, options, health and reflection services, drain."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from forwardpass_server.access.access import Access
from forwardpass_server.access.certificates import Certificates
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.rpc import handlers
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.rpc.health import HealthServicer
from forwardpass_server.rpc.interceptor import Interceptor
from forwardpass_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from forwardpass_server.telemetry.tracing import Tracing

_LOGGER = logging.getLogger(__name__)

OPENABLE = {"health": (health.SERVICE_NAME,), "reflection": (reflection.SERVICE_NAME,)}
"""Services that an operator may open to callers without credentials, by their names for `--open`."""

# Streams on one connection; further ones wait in the client. Equal to the default of --max-concurrent-calls.
_MAX_STREAMS = 1024

# A bit for each compression algorithm of gRPC; the lowest bit stands for no compression.
_NO_COMPRESSION = 1

MODEL_HEALTH_PREFIX = "model/"
"""grpc.health.v1 also answers for `model/NAME` and `model/NAME/VERSION`."""

STARTUP, READY, LIVE = "startup", "ready", "live"
"""grpc.health.v1 also answers for these names of probes: see app.health."""

# Health keeps its answer for these during a drain: it has started, and must not be killed.
_LASTING = (STARTUP, LIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of a server. host, port: the address; port 0 selects a free one. For the rest see app.settings."""

    host: str
    port: int
    max_message_bytes: int
    max_unary_bytes: int
    connection_idle_s: float
    accept_compressed: bool
    drain_delay_s: float
    drain_timeout_s: float


def join_address(host: str, port: int) -> str:
    """HOST:PORT; an IPv6 address is put in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Server:
    """One gRPC server on an event loop."""

    def __init__(
        self,
        options: ServerOptions,
        servicers: Mapping[str, object],
        metrics: Metrics,
        access: Access,
        certificates: Certificates | None,
        drain: Drain,
        arrivals: Arrivals,
        tracing: Tracing | None = None,
        admission: Admission | None = None,
    ) -> None:
        """servicers: by the full names of their services. certificates: None for a port without TLS.

        drain: begins when the server takes no more calls. arrivals: notified of each call. tracing: None for no spans.
        admission: counts large responses until they are read; None for a port without them.
        """
        self._options = options
        self._certificates = certificates
        self._drain = drain
        self._health = HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[
                Interceptor(
                    metrics.rpcs,
                    access,
                    drain,
                    arrivals,
                    tracing,
                    admission,
                    lambda: self._said.get(LIVE, True),
                )
            ],
            options=[
                ("grpc.max_receive_message_length", min(options.max_unary_bytes, options.max_message_bytes)),
                ("grpc.max_send_message_length", options.max_message_bytes),
                *(
                    []
                    if options.accept_compressed
                    else [("grpc.compression_enabled_algorithms_bitset", _NO_COMPRESSION)]
                ),
                # Otherwise a second server could listen on the same port, and calls would reach either at random.
                ("grpc.so_reuseport", 0),
                # By default gRPC disconnects a client that pings more than once in five minutes.
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Detects clients that have disappeared without closing the connection.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                # Closes connections without a handshake, and idle ones: a client reconnects when it needs to.
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.max_connection_idle_ms", min(round(options.connection_idle_s * 1000), 2**31 - 1)),
                # By default gRPC advertises no limit.
                ("grpc.max_concurrent_streams", _MAX_STREAMS),
            ],
        )
        self._servicers = servicers
        # The present answers of health, by name.
        self._said: dict[str, bool] = {}
        self._is_draining = False
        self._server.add_generic_rpc_handlers([handlers.of(*item) for item in servicers.items()])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*servicers, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> int:
        """Starts to listen, with health at NOT_SERVING. Returns the port. Raises OSError if the port is in use."""
        await self.set_all_serving(False)
        address = join_address(self._options.host, self._options.port)
        try:
            port: int = (
                self._server.add_insecure_port(address)
                if self._certificates is None
                else self._server.add_secure_port(address, self._certificates.credentials())
            )
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: choose another address or port ({error})") from None
        await self._server.start()
        return port

    async def set_serving(self, service: str, serving: bool) -> None:
        """Sets the answer of grpc.health.v1 for a service; "" stands for the whole server."""
        status = health_pb2.HealthCheckResponse
        is_serving = serving and (not self._is_draining or service in _LASTING)
        await self._health.set(service, status.SERVING if is_serving else status.NOT_SERVING)
        self._said[service] = is_serving

    def says_serving(self, service: str) -> bool:
        """Whether grpc.health.v1 answers SERVING for a service. Thread-safe."""
        return self._said.get(service, False)

    @property
    def is_draining(self) -> bool:
        """Whether `drain` has begun. Thread-safe."""
        return self._is_draining

    async def set_all_serving(self, serving: bool) -> None:
        """Sets the answer of grpc.health.v1 for the whole server and each of its services."""
        for service in ("", *self._servicers):
            await self.set_serving(service, serving)

    async def drain(self) -> None:
        """Sets health to NOT_SERVING, waits for clients to see it, takes no more calls, and finishes running ones."""
        self._is_draining = True
        for service in self._said.keys() - set(_LASTING):
            await self.set_serving(service, False)
        _LOGGER.info("draining: waiting %.1f s for clients to switch to other servers", self._options.drain_delay_s)
        await asyncio.sleep(self._options.drain_delay_s)
        self._drain.begin()
        await self._server.stop(self._options.drain_timeout_s)
        _LOGGER.info("drained")
