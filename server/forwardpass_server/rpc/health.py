"""grpc.health.v1, with watches that end when the server does."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health

from forwardpass.wire import errors


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]
    """The library's servicer. Its watches last until the caller leaves: a server that drains would wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()

    async def Watch(self, request: Any, context: Any) -> None:
        tasks = [asyncio.ensure_future(super().Watch(request, context)), asyncio.ensure_future(self._ended.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not tasks[0].cancelled():
            tasks[0].result()

    async def List(self, request: Any, context: Any) -> Any:
        # The library has the method and no answer, and fails.
        raise errors.MethodNotSupported("health is not listed: ask for a service")

    def end_watches(self) -> None:
        """Ends every watch, those to come included. Their callers have been told NOT_SERVING before."""
        self._ended.set()
