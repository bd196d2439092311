"""The interface of a session store, and the limits that it enforces."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol


class SessionKey(NamedTuple):
    """principal: the owner of the session; "" for callers without credentials. session_id: 16 bytes."""

    principal: str
    session_id: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class StoredSession:
    """A stored record. version: 1 for a new session, and one more after each replacement."""

    version: int
    record: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """max_sessions, max_bytes: the open sessions of one principal, and the bytes of their records.

    idle_expiry_s: a session expires after so long without use. remember_s: for so long after that, calls fail with
    SessionExpired instead of SessionNotFound.
    """

    max_sessions: int
    max_bytes: int
    idle_expiry_s: float
    remember_s: float


class SessionObserver(Protocol):
    """Counts and measures what a store does."""

    def sessions_expired(self, count: int) -> None:
        """So many sessions have expired. In a shared store, one server counts each: the first that notices it."""

    def session_commit(self, seconds: float) -> None:
        """A record was created or replaced, in so many seconds."""


class SessionStore(Protocol):
    """Keeps records under keys. A store says which of its changes survive the process, or a power cut.

    Used on one event loop. Every method may raise SessionStoreUnavailable: then the change may be made or not.
    """

    @property
    def is_shared(self) -> bool:
        """Whether other servers may replace the same records."""

    @property
    def place(self) -> str:
        """Where records are kept, for logs and messages."""

    @property
    def problem(self) -> str:
        """Why the last operation failed, as a sentence for callers; "" if it succeeded. May be read on any thread."""

    async def check(self) -> None:
        """Tests whether the store works. After a failure it tests a write, since a full store still answers reads.

        Raises SessionStoreUnavailable, and SessionStoreError for a store that refuses this server's credentials.
        """

    async def create(self, key: SessionKey, record: bytes, model: str = "") -> StoredSession:
        """Stores a new record, at version 1. If there is a record already, returns that one, and marks it as used.

        model: `count_of` counts the session under this string of more than 16 bytes; "" for none.
        Raises SessionLimitExceeded; SessionNotFound or SessionExpired if a session with this key has ended.
        """

    async def load(self, key: SessionKey) -> StoredSession:
        """Returns the record, and marks it as used. Raises SessionNotFound or SessionExpired."""

    async def replace(self, key: SessionKey, version: int, record: bytes) -> bool:
        """Replaces the record if it has this version, increments the version, and marks the record as used.

        Returns False, and changes nothing, if the record has another version. A shared store also returns False if it
        made this replacement, lost the answer, and got the request again: the record tells.
        Raises SessionNotFound, SessionExpired or SessionLimitExceeded.
        """

    def touch(self, key: SessionKey) -> None:
        """Marks a record as used. Does nothing in a shared store, where only `load` and `replace` do this.

        Raises SessionNotFound or SessionExpired.
        """

    async def delete(self, key: SessionKey) -> None:
        """Deletes a record, and remembers that the session has ended. A missing record is no error."""

    async def sweep(self) -> None:
        """Deletes expired records, if nothing else does. To be called every second or so."""

    async def count_of(self, model: str) -> int:
        """How many sessions of a model are open, on all servers. Expensive in a shared store."""

    def count(self) -> int:
        """How many sessions are open. In a shared store, only those that this server has used recently."""

    async def close(self) -> None:
        """Waits for pending writes, and closes the store."""
