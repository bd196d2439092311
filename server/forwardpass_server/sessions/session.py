"""A metric session as this server knows it, with the updates that wait for it."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import Awaitable, Callable

from forwardpass.wire.structures import Structure
from forwardpass_server.calls.plans import Servable
from forwardpass_server.sessions.records import Record, UpdateIdentity
from forwardpass_server.sessions.store import SessionKey


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """One update. apply: the state after it from the one before. outcome: to be recorded; b"" for nothing."""

    identity: UpdateIdentity
    apply: Callable[[Servable, Structure], Awaitable[Structure]]
    outcome: bytes = b""


class Session:
    """A session as this server knows it: `record` is what the store held at `version`, when it was last looked at."""

    def __init__(self, key: SessionKey, servable: Servable, version: int, record: Record, size_bytes: int) -> None:
        self.key = key
        self.servable = servable
        self.version = version
        self.record = record
        self.size_bytes = size_bytes
        self.used = time.monotonic()
        # A write of which nobody knows what became of it: the store is to be asked.
        self.is_doubtful = False
        self.waiting: collections.deque[tuple[Update, asyncio.Future[None]]] = collections.deque()
        self.is_committing = False

    def know(self, version: int, record: Record) -> None:
        """Takes note of what the store held at some moment, unless something newer is known."""
        self.is_doubtful = False
        if version > self.version:
            self.version, self.record = version, record

    def believe(self, version: int, record: Record) -> None:
        """Takes note of what the store holds now: less than is known here, where it has lost some of it."""
        self.is_doubtful = False
        self.version, self.record = version, record
