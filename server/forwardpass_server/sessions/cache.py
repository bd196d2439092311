"""Metric sessions at hand, each as the store holds it."""

from __future__ import annotations

import collections
import itertools
import time

from forwardpass.wire import errors
from forwardpass_server.sessions import records as session_records
from forwardpass_server.sessions.retained_models import SessionModels
from forwardpass_server.sessions.session import Session
from forwardpass_server.sessions.store import SessionKey, SessionStore, StoredSession

# Of sessions at hand, with what each takes besides its record; others are read from the store again.
_CACHED_BYTES = 2**27
_OVERHEAD_BYTES = 4096

# Without a use, until a session is no longer at hand: most that are left so long are never used again.
_CACHED_S = 60.0


class KnownSessions:
    """Reads sessions of a store, and keeps those that are used. Used on one event loop alone."""

    def __init__(self, store: SessionStore, models: SessionModels) -> None:
        self._store = store
        self._models = models
        self._cached: collections.OrderedDict[SessionKey, Session] = collections.OrderedDict()
        self._cached_bytes = 0

    def find(self, key: SessionKey) -> Session | None:
        """A session at hand. Another server may have updated it since, where the store is shared."""
        session = self._cached.get(key)
        if session is not None:
            self._use(session)
        return session

    async def load(self, key: SessionKey) -> Session:
        """A session as the store holds it now."""
        session = self._cached.get(key)
        if session is None or session.is_doubtful or self._store.is_shared:
            try:
                return self.keep(key, await self._store.load(key))
            except errors.SessionNotFound:
                self.forget(key)
                raise
        try:
            self._store.touch(key)
        except errors.SessionNotFound:
            self.forget(key)
            raise
        self._use(session)
        return session

    def keep(self, key: SessionKey, stored: StoredSession) -> Session:
        session = self._cached.get(key)
        if session is None:
            record = session_records.decode(stored.record)
            size_bytes = len(stored.record) + _OVERHEAD_BYTES
            session = Session(key, self._models.of(record.identity), stored.version, record, size_bytes)
            self._cached[key] = session
            self._cached_bytes += session.size_bytes
            self._shrink()
        else:
            session.know(stored.version, session_records.decode(stored.record))
            self._use(session)
        return session

    def _use(self, session: Session) -> None:
        session.used = time.monotonic()
        self._cached.move_to_end(session.key)

    def _shrink(self) -> None:
        """Forgets the sessions that were used least recently: the store has them."""
        if self._cached_bytes <= _CACHED_BYTES:
            return
        for key, session in list(self._cached.items()):
            if self._cached_bytes <= _CACHED_BYTES:
                return
            if not session.is_committing:
                self.forget(key)

    def sweep(self) -> None:
        """Forgets what nobody has used for a while. To be called now and then."""
        now = time.monotonic()
        idle = itertools.takewhile(lambda session: session.used <= now - _CACHED_S, self._cached.values())
        for session in list(idle):
            # The store has it.
            if not session.is_committing:
                self.forget(session.key)

    def forget(self, key: SessionKey) -> None:
        session = self._cached.pop(key, None)
        if session is not None:
            self._cached_bytes -= session.size_bytes
