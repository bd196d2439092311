"""grpc.health.v1, as the library has it but for a method that it lacks."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health

from forwardpass.wire import errors


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]
    """The library's servicer."""

    async def List(self, request: Any, context: Any) -> Any:
        # The library has the method and no answer, and fails.
        raise errors.MethodNotSupported("health is not listed: ask for a service")
