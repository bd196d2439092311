"""What sessions ask of whoever keeps them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol


class SessionKey(NamedTuple):
    """principal: to whom the session belongs; "" where nobody has to say so. session_id: 16 bytes."""

    principal: str
    session_id: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class StoredSession:
    """A session's record as it was kept last. version: 1 when it was made, one more with each replacement."""

    version: int
    record: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """Of one principal: sessions at once, and bytes of their records. Seconds without a use until a session expires,
    and for how long afterwards it is remembered that it has.
    """

    max_sessions: int
    max_bytes: int
    idle_expiry_s: float
    remember_s: float


class SessionObserver(Protocol):
    """Is told what becomes of sessions."""

    def sessions_expired(self, count: int) -> None:
        """So many have expired. Of a shared store, one server is told of each: whichever comes upon it first."""

    def session_commit(self, seconds: float) -> None:
        """A record was made or replaced, so long after it was handed over."""


class SessionStore(Protocol):
    """Keeps records under keys. What a method has returned from survives the process, where the store says so.

    Used on one event loop. Every method may raise SessionStoreUnavailable: what it was to do is then done or not.
    """

    @property
    def is_shared(self) -> bool:
        """Whether other servers may replace the same records."""

    @property
    def place(self) -> str:
        """Where records are kept, for people."""

    @property
    def problem(self) -> str:
        """Why the last operation failed, as a sentence for callers; "" where it succeeded. On any thread."""

    async def check(self) -> None:
        """Tries whether the store works. After a failure it tries a write, since a full store still answers reads.

        Raises SessionStoreUnavailable, and SessionStoreError for a store that refuses this server.
        """

    async def create(self, key: SessionKey, record: bytes, model: str = "") -> StoredSession:
        """Keeps a new record, at version 1; where there is one already, returns that, which counts as used now.

        model: among whose sessions `count_of` counts it; a word of more than 16 bytes, or "" for none.
        Raises SessionLimitExceeded; SessionNotFound or SessionExpired where a session of this key has ended.
        """

    async def load(self, key: SessionKey) -> StoredSession:
        """The record; it counts as used now. Raises SessionNotFound or SessionExpired."""

    async def replace(self, key: SessionKey, version: int, record: bytes) -> bool:
        """Puts a record in the place of the one of this version, as one more than that; it counts as used now.

        Returns False, and changes nothing, where it is of another version by now; in a shared store also where this
        very replacement was done and the answer lost, so that it was sent again: the record tells.
        Raises SessionNotFound, SessionExpired or SessionLimitExceeded.
        """

    def touch(self, key: SessionKey) -> None:
        """Counts a record as used now, where the store is not shared; in one that is, only `load` and `replace` do.

        Raises SessionNotFound or SessionExpired.
        """

    async def delete(self, key: SessionKey) -> None:
        """Drops a record, and remembers that it has ended. That it is not there is no error."""

    async def sweep(self) -> None:
        """Drops what has expired, where nothing else does. To be called every second or so."""

    async def count_of(self, model: str) -> int:
        """How many sessions of a model are open, whichever server uses them. Of a shared store it may ask a lot."""

    def count(self) -> int:
        """How many sessions this server knows to be open. Of a shared store, those that it has used of late."""

    async def close(self) -> None:
        """Waits for what is being written, and ends."""
