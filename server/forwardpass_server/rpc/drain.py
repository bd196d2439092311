"""That a server is about to stop, for streams that would go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from forwardpass.wire import errors

AnswerT = TypeVar("AnswerT")


class Departure:
    """Is announced once, on the event loop. A stream that is told answers what it has received, and ends."""

    def __init__(self) -> None:
        self.is_due = False
        self._told: set[Callable[[], object]] = set()

    def announce(self) -> None:
        """Tells every stream; those to come are told at once."""
        self.is_due = True
        for tell in list(self._told):
            tell()

    def error(self) -> errors.ServerUnavailable:
        """What such a stream ends with: its caller goes on elsewhere."""
        return errors.ServerUnavailable("the server is stopping")

    @contextlib.contextmanager
    def telling(self, tell: Callable[[], object]) -> Iterator[None]:
        """Calls `tell` if the departure is announced meanwhile, or was before."""
        self._told.add(tell)
        try:
            if self.is_due:
                tell()
            yield
        finally:
            self._told.discard(tell)

    async def until(self, answering: Awaitable[AnswerT]) -> AnswerT:
        """What comes of `answering`, which is cancelled by the departure. Raises ServerUnavailable then.

        For streams of which nothing is worth finishing.
        """
        task = asyncio.ensure_future(answering)
        with self.telling(task.cancel):
            try:
                return await task
            except asyncio.CancelledError:
                if self.is_due:
                    raise self.error() from None
                raise
