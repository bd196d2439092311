"""The drain of a server: streams learn that it is about to stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from forwardpass.wire import errors

AnswerT = TypeVar("AnswerT")


class Drain:
    """The state of one server, for one event loop. A stream that is notified answers what it has received, and ends."""

    def __init__(self) -> None:
        self.has_begun = False
        self._callbacks: set[Callable[[], object]] = set()

    def begin(self) -> None:
        """Begins the drain, and notifies every stream."""
        self.has_begun = True
        for callback in list(self._callbacks):
            callback()

    def error(self) -> errors.ServerUnavailable:
        """The error that ends a stream. It is retryable: the client continues on another server."""
        return errors.ServerUnavailable("the server is stopping: retry on another server")

    @contextlib.contextmanager
    def notifying(self, callback: Callable[[], object]) -> Iterator[None]:
        """Calls `callback` when the drain begins during the block, and at once if it has begun already."""
        self._callbacks.add(callback)
        try:
            if self.has_begun:
                callback()
            yield
        finally:
            self._callbacks.discard(callback)

    async def until(self, answering: Awaitable[AnswerT]) -> AnswerT:
        """Awaits `answering`, and cancels it when the drain begins. Raises ServerUnavailable then.

        For streams that need not finish what they have received.
        """
        task = asyncio.ensure_future(answering)
        with self.notifying(task.cancel):
            try:
                return await task
            except asyncio.CancelledError:
                if self.has_begun:
                    raise self.error() from None
                raise
