"""That a server is about to stop, for streams that would go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from forwardpass.wire import errors

AnswerT = TypeVar("AnswerT")


class Drain:
    """Is announced once, on the event loop. A stream that is told answers what it has received, and ends."""

    def __init__(self) -> None:
        self.has_begun = False
        self._told: set[Callable[[], object]] = set()

    def begin(self) -> None:
        """Tells every stream; those to come are told at once."""
        self.has_begun = True
        for tell in list(self._told):
            tell()

    def error(self) -> errors.ServerUnavailable:
        """What such a stream ends with: its caller goes on elsewhere."""
        return errors.ServerUnavailable("the server is stopping")

    @contextlib.contextmanager
    def notifying(self, tell: Callable[[], object]) -> Iterator[None]:
        """Calls `tell` if the drain is announced meanwhile, or was before."""
        self._told.add(tell)
        try:
            if self.has_begun:
                tell()
            yield
        finally:
            self._told.discard(tell)

    async def until(self, answering: Awaitable[AnswerT]) -> AnswerT:
        """What comes of `answering`, which is cancelled by the drain. Raises ServerUnavailable then.

        For streams of which nothing is worth finishing.
        """
        task = asyncio.ensure_future(answering)
        with self.notifying(task.cancel):
            try:
                return await task
            except asyncio.CancelledError:
                if self.has_begun:
                    raise self.error() from None
                raise
