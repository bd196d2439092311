"""Keeps the health of a server up to date while models are loaded and unloaded, and while the device is tried."""

from __future__ import annotations

import asyncio
import logging

from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.process.liveness import Liveness
from forwardpass_server.rpc.server import LIVE, MODEL_HEALTH_PREFIX, READY, STARTUP, Server
from forwardpass_server.sessions.store_watch import SessionStoreWatch
from forwardpass_server.status.readiness import Readiness
from forwardpass_server.telemetry.health import HealthReading

_LOGGER = logging.getLogger(__name__)

# How often the result of the liveness thread is read.
_POLL_S = 1.0


class Health:
    """Sets what a server answers to health checks.

    startup: see `Readiness.has_started`. live: the process and the device work. ready, the server as a whole, and each
    of its services: see `Readiness`; never while the server drains.
    """

    def __init__(self, server: Server, registry: Registry, liveness: Liveness, readiness: Readiness) -> None:
        self._server = server
        self._registry = registry
        self._liveness = liveness
        self._readiness = readiness
        self._is_alive = True
        self._logged_reasons: list[str] = []
        self.started = asyncio.Event()

    async def open(self) -> None:
        """Sets the first answers. To be called before the server listens."""
        await self._server.set_serving(STARTUP, False)
        await self._server.set_serving(LIVE, True)
        await self._update()

    async def models_tried(self) -> None:
        """To be called when every model of the start was loaded, or failed."""
        self._readiness.has_tried_models = True
        await self._update()

    async def model_changed(self, source: ModelSource) -> None:
        """To be called when a version was loaded, failed, or was unloaded."""
        name = MODEL_HEALTH_PREFIX + source.name
        await self._server.set_serving(
            f"{name}/{source.version}", self._registry.is_available(source.name, source.version)
        )
        await self._server.set_serving(name, self._registry.is_available(source.name))
        await self._update()

    def reading(self) -> HealthReading:
        """What grpc.health.v1 answers now, for metrics and the status page. May be called on any thread."""
        server = self._server
        return HealthReading(
            has_started=server.says_serving(STARTUP),
            is_live=server.says_serving(LIVE),
            is_ready=server.says_serving(READY),
            is_draining=server.is_draining,
        )

    async def watch(self) -> None:
        """Follows the liveness of the device until it is cancelled."""
        while True:
            await asyncio.sleep(_POLL_S)
            if self._liveness.is_alive != self._is_alive:
                self._is_alive = not self._is_alive
                await self._server.set_serving(LIVE, self._is_alive)
                await self._update()

    async def follow_store(self, store: SessionStoreWatch) -> None:
        """Waits for the session store to be reached for the first time."""
        await store.reached.wait()
        await self._update()

    async def _update(self) -> None:
        reasons = self._readiness.reasons()
        if self._readiness.has_started and not self.started.is_set():
            await self._server.set_serving(STARTUP, True)
            self.started.set()
        await self._server.set_serving(READY, not reasons)
        await self._server.set_all_serving(not reasons)
        # Before that, the log has a line for each model that is loaded.
        if self._readiness.has_tried_models and reasons != self._logged_reasons:
            if reasons:
                _LOGGER.error("not ready: %s", "; ".join(reasons))
            else:
                _LOGGER.warning("ready again")
            self._logged_reasons = reasons
