"""What the server says of its health, kept true while models come and go and the device works or does not."""

from __future__ import annotations

import asyncio
import logging

from forwardpass_server.rpc.server import LIVE, MODEL_HEALTH_PREFIX, READY, STARTUP, Server
from forwardpass_server.serving.liveness import Liveness
from forwardpass_server.serving.models import ModelSource
from forwardpass_server.serving.registry import Registry, State
from forwardpass_server.telemetry.health import HealthReading

_LOGGER = logging.getLogger(__name__)

# Between looks at the device's liveness, which a thread of its own finds out.
_LOOK_S = 1.0


class Health:
    """Tells a server of its health.

    startup: every model of the start was tried. live: the process and the device work. ready, and the server as a whole
    and each of its services: both, and a model can be called, or none is configured; not while it drains.
    """

    def __init__(self, server: Server, registry: Registry, liveness: Liveness) -> None:
        self._server = server
        self._registry = registry
        self._liveness = liveness
        self._has_started = False
        self._is_alive = True

    async def open(self) -> None:
        """To be told before the server listens."""
        await self._server.set_serving(STARTUP, False)
        await self._server.set_serving(LIVE, True)
        await self._tell()

    async def models_tried(self) -> None:
        """Every model of the start was loaded, or failed to."""
        self._has_started = True
        await self._server.set_serving(STARTUP, True)
        await self._tell()

    async def model_changed(self, source: ModelSource) -> None:
        """A version was loaded, failed, or was unloaded."""
        name = MODEL_HEALTH_PREFIX + source.name
        await self._server.set_serving(
            f"{name}/{source.version}", self._registry.is_available(source.name, source.version)
        )
        await self._server.set_serving(name, self._registry.is_available(source.name))
        await self._tell()

    def reading(self) -> HealthReading:
        """What grpc.health.v1 answers at this moment, for those who do not ask it. On any thread."""
        server = self._server
        return HealthReading(
            has_started=server.says_serving(STARTUP),
            is_live=server.says_serving(LIVE),
            is_ready=server.says_serving(READY),
            is_draining=server.is_draining,
        )

    async def watch(self) -> None:
        """Follows the device's liveness until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._liveness.is_alive != self._is_alive:
                self._is_alive = not self._is_alive
                if self._is_alive:
                    _LOGGER.warning("the device works again")
                else:
                    _LOGGER.error("the device fails or hangs: not live, not ready")
                await self._server.set_serving(LIVE, self._is_alive)
                await self._tell()

    async def _tell(self) -> None:
        entries = self._registry.entries()
        # A server of which no model can be called is of use to nobody.
        is_useful = any(entry.state is State.AVAILABLE for entry in entries) or not entries
        is_ready = self._has_started and self._is_alive and is_useful
        await self._server.set_serving(READY, is_ready)
        await self._server.set_all_serving(is_ready)
