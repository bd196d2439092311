"""The sessions that this server holds in memory, so that it need not read them from the store for each call."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable

from forwardpass.wire import errors
from forwardpass_server.sessions import records as session_records
from forwardpass_server.sessions.retained_models import SessionModels
from forwardpass_server.sessions.session import Session, SessionStorage
from forwardpass_server.sessions.store import SessionKey, StoredSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLimits:
    """size_bytes: of all cached sessions. idle_s: a session that is not used for so long is removed.

    Removing a session loses nothing: the store has it, and the next call reads it again.
    """

    # Some 20,000 sessions with small states.
    size_bytes: int = 2**27
    # Most sessions that are not used for this long are never used again.
    idle_s: float = 60.0


@dataclasses.dataclass(slots=True)
class _Entry:
    """used_s: when the session was last used, by the cache's clock."""

    session: Session
    used_s: float


class SessionCache:
    """Reads sessions from the store and keeps those that were used last. Used on one event loop only.

    clock: in seconds; never goes back.
    """

    def __init__(
        self,
        storage: SessionStorage,
        models: SessionModels,
        limits: CacheLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._store = storage.store
        self._models = models
        self._limits = limits or CacheLimits()
        self._clock = clock
        # In the order of their last use.
        self._entries: collections.OrderedDict[SessionKey, _Entry] = collections.OrderedDict()
        self._size_bytes = 0

    def __len__(self) -> int:
        """How many sessions are cached."""
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        """The memory that the cached sessions take."""
        return self._size_bytes

    def find(self, key: SessionKey) -> Session | None:
        """A cached session. Where the store is shared, another server may have updated it since it was read."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._use(entry)
        return entry.session

    async def load(self, key: SessionKey) -> Session:
        """A session with the record that the store holds now.

        Raises SessionNotFound, SessionExpired and SessionStoreUnavailable, and what `SessionModels.of` raises.
        """
        entry = self._entries.get(key)
        try:
            if entry is None or entry.session.may_be_stale:
                return self.put(key, await self._store.load(key))
            self._store.touch(key)
        except errors.SessionNotFound:
            self.remove(key)
            raise
        self._use(entry)
        return entry.session

    def put(self, key: SessionKey, stored: StoredSession) -> Session:
        """Caches what was read from the store. Raises what `SessionModels.of` raises."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.session.refresh(stored)
            self._use(entry)
            return entry.session
        record = session_records.decode(stored.record)
        session = Session(key, self._models.of(record.identity), stored, record, self._storage, self._resized)
        self._entries[key] = _Entry(session, self._clock())
        self._size_bytes += session.size_bytes
        self._evict()
        return session

    def remove(self, key: SessionKey) -> None:
        """Removes a session from the cache, but not from the store. That it is not cached is no error."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._size_bytes -= entry.session.size_bytes

    def sweep(self) -> None:
        """Removes idle sessions. To be called every second or so."""
        limit_s = self._clock() - self._limits.idle_s
        idle = list(itertools.takewhile(lambda entry: entry.used_s <= limit_s, self._entries.values()))
        for entry in idle:
            if not entry.session.is_committing:
                self.remove(entry.session.key)

    def _use(self, entry: _Entry) -> None:
        entry.used_s = self._clock()
        self._entries.move_to_end(entry.session.key)

    def _resized(self, session: Session, difference_bytes: int) -> None:
        entry = self._entries.get(session.key)
        # A session that was removed may still serve a call.
        if entry is not None and entry.session is session:
            self._size_bytes += difference_bytes
            self._evict()

    def _evict(self) -> None:
        """Removes the sessions that were used least recently, until the others are within the limit."""
        excess_bytes = self._size_bytes - self._limits.size_bytes
        evicted: list[Session] = []
        for entry in self._entries.values():
            if excess_bytes <= 0:
                break
            if not entry.session.is_committing:
                evicted.append(entry.session)
                excess_bytes -= entry.session.size_bytes
        for session in evicted:
            self.remove(session.key)
