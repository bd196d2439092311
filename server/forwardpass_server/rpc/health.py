"""The service grpc.health.v1."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health

from forwardpass.wire import errors


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]
    """The servicer of grpcio-health-checking, with an answer for List."""

    async def List(self, request: Any, context: Any) -> Any:
        # The library declares the method without an implementation, which would answer UNKNOWN.
        raise errors.MethodNotSupported(
            "the method List is not supported: use Check or Watch with the name of a service"
        )
