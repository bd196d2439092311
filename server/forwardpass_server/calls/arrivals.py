"""Calls that are known to come, and are not there yet."""

from __future__ import annotations

import asyncio
from typing import Any


class Arrivals:
    """Each call is known by its task from when the server hears of it until its request is at hand.

    Used on one event loop alone.
    """

    def __init__(self) -> None:
        self._coming: set[asyncio.Task[Any]] = set()

    @property
    def count(self) -> int:
        return len(self._coming)

    def announce(self, task: asyncio.Task[Any]) -> None:
        """A call will come, unless its caller leaves before."""
        self._coming.add(task)
        task.add_done_callback(self._coming.discard)

    def arrive(self) -> None:
        """The call of the current task is there. It need not have been announced."""
        self._coming.discard(asyncio.current_task())
