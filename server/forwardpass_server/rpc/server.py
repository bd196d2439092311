"""The gRPC server: its port, its options, its health and reflection services, its end."""

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
from forwardpass_server.rpc.departure import Departure
from forwardpass_server.rpc.health import HealthServicer
from forwardpass_server.rpc.interceptor import Interceptor
from forwardpass_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from forwardpass_server.telemetry.tracing import Tracing

_LOGGER = logging.getLogger(__name__)

OPENABLE = {"health": (health.SERVICE_NAME,), "reflection": (reflection.SERVICE_NAME,)}
"""Services that an operator may open to callers without credentials, by what the operator calls them."""

# On one connection; its further ones wait on the client's side. As many as calls are taken at once by default.
_MAX_STREAMS = 1024

# A bit for each of gRPC's algorithms: the lowest is for messages as they are.
_NO_COMPRESSION = 1

MODEL_HEALTH_PREFIX = "model/"
"""grpc.health.v1 answers for `model/NAME` and `model/NAME/VERSION` too."""

STARTUP, READY, LIVE = "startup", "ready", "live"
"""And for these, after which probes ask: see app.health."""

# What a server that drains says as before: it has started, and nobody should kill it.
_LASTING = (STARTUP, LIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """host, port: where to listen; port 0 takes a free one. The rest is explained in app.settings."""

    host: str
    port: int
    max_message_bytes: int
    max_unary_bytes: int
    connection_idle_s: float
    accept_compressed: bool
    drain_delay_s: float
    drain_timeout_s: float


def join_address(host: str, port: int) -> str:
    """HOST:PORT, as gRPC and people write it."""
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
        departure: Departure,
        arrivals: Arrivals,
        tracing: Tracing | None = None,
        admission: Admission | None = None,
    ) -> None:
        """servicers: by the full names of their services. certificates: None for a port without TLS.

        departure: is announced when no more calls are taken. arrivals: are told of calls that come. tracing: None for
        no spans. admission: is told of long responses until they are read; None for a port that has none.
        """
        self._options = options
        self._certificates = certificates
        self._departure = departure
        self._health = HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[
                Interceptor(
                    metrics.rpcs,
                    access,
                    departure,
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
                # Two servers on one port would share its callers at random.
                ("grpc.so_reuseport", 0),
                # The default cuts off a client that pings more than once in five minutes.
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Finds clients that are gone without a word.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                # Closes sockets that never speak, and connections that have nothing to say: a client opens another.
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.max_connection_idle_ms", min(round(options.connection_idle_s * 1000), 2**31 - 1)),
                # Nothing is advertised otherwise.
                ("grpc.max_concurrent_streams", _MAX_STREAMS),
            ],
        )
        self._servicers = servicers
        # What health answers, by the names that it answers for.
        self._said: dict[str, bool] = {}
        self._is_draining = False
        self._server.add_generic_rpc_handlers([handlers.of(*item) for item in servicers.items()])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*servicers, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> int:
        """Listens and answers; health says NOT_SERVING. Returns the port. Raises OSError where it is taken."""
        await self.set_all_serving(False)
        address = join_address(self._options.host, self._options.port)
        try:
            port: int = (
                self._server.add_insecure_port(address)
                if self._certificates is None
                else self._server.add_secure_port(address, self._certificates.credentials())
            )
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        await self._server.start()
        return port

    async def set_serving(self, service: str, serving: bool) -> None:
        """What grpc.health.v1 answers for a service; "" is the server as a whole."""
        status = health_pb2.HealthCheckResponse
        is_serving = serving and (not self._is_draining or service in _LASTING)
        await self._health.set(service, status.SERVING if is_serving else status.NOT_SERVING)
        self._said[service] = is_serving

    def says_serving(self, service: str) -> bool:
        """Whether grpc.health.v1 answers SERVING for a service. On any thread."""
        return self._said.get(service, False)

    @property
    def is_draining(self) -> bool:
        """Whether `drain` has begun. On any thread."""
        return self._is_draining

    async def set_all_serving(self, serving: bool) -> None:
        """What is answered for the server as a whole, and for each of its services."""
        for service in ("", *self._servicers):
            await self.set_serving(service, serving)

    async def drain(self) -> None:
        """Says NOT_SERVING, waits for clients to see it, takes no more calls, and waits for those that run."""
        self._is_draining = True
        for service in self._said.keys() - set(_LASTING):
            await self.set_serving(service, False)
        _LOGGER.info("draining: waiting %.1f s for clients to leave", self._options.drain_delay_s)
        await asyncio.sleep(self._options.drain_delay_s)
        self._departure.announce()
        await self._server.stop(self._options.drain_timeout_s)
        _LOGGER.info("drained")
