"""Calls that gRPC has announced, and whose requests have not been read yet."""

from __future__ import annotations

import asyncio
from typing import Any


class Arrivals:
    """The announced calls, each by its task. The batcher waits for them. Used on one event loop only."""

    def __init__(self) -> None:
        self._coming: set[asyncio.Task[Any]] = set()

    @property
    def count(self) -> int:
        """How many calls are announced and not read."""
        return len(self._coming)

    def announce(self, task: asyncio.Task[Any]) -> None:
        """Adds a call. It is removed when its request was read, or when its task ends."""
        self._coming.add(task)
        task.add_done_callback(self._coming.discard)

    def arrive(self) -> None:
        """Removes the call of the current task, if it was announced: its request was read."""
        self._coming.discard(asyncio.current_task())
