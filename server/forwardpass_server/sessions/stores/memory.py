"""The session store in memory: its sessions end with the process."""

from __future__ import annotations

import time
from collections.abc import Callable

from forwardpass_server.sessions.store import SessionKey, SessionLimits, SessionObserver, StoredSession
from forwardpass_server.sessions.stores import refusals
from forwardpass_server.sessions.stores.lifetimes import Lifetimes


class MemorySessionStore:
    """A SessionStore. clock: in seconds; never goes back."""

    is_shared = False
    place = "memory"
    problem = ""

    def __init__(
        self, limits: SessionLimits, observer: SessionObserver, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._observer = observer
        self._lifetimes = Lifetimes(limits, observer, clock)
        self._sessions: dict[str, dict[bytes, StoredSession]] = {}
        self._size_bytes: dict[str, int] = {}

    async def check(self) -> None:
        """Never fails."""

    async def create(self, key: SessionKey, record: bytes, model: str = "") -> StoredSession:
        started = time.perf_counter()
        self._expire()
        self._lifetimes.refuse_ended(key)
        sessions = self._sessions.get(key.principal, {})
        if key.session_id not in sessions:
            size_bytes = self._size_bytes.get(key.principal, 0) + len(record)
            refusals.check_room(self._limits, len(sessions) + 1, size_bytes)
            self._sessions.setdefault(key.principal, {})[key.session_id] = StoredSession(1, record)
            self._size_bytes[key.principal] = size_bytes
            self._observer.session_commit(time.perf_counter() - started)
        self._lifetimes.open(key, model)
        return self._sessions[key.principal][key.session_id]

    async def load(self, key: SessionKey) -> StoredSession:
        self.touch(key)
        return self._sessions[key.principal][key.session_id]

    async def replace(self, key: SessionKey, version: int, record: bytes) -> bool:
        started = time.perf_counter()
        stored = await self.load(key)
        if stored.version != version:
            return False
        size_bytes = self._size_bytes[key.principal] - len(stored.record) + len(record)
        if len(record) > len(stored.record):
            refusals.check_room(self._limits, 0, size_bytes)
        self._sessions[key.principal][key.session_id] = StoredSession(version + 1, record)
        self._size_bytes[key.principal] = size_bytes
        self._observer.session_commit(time.perf_counter() - started)
        return True

    def touch(self, key: SessionKey) -> None:
        self._expire()
        self._lifetimes.use(key)

    async def delete(self, key: SessionKey) -> None:
        self._expire()
        if key.session_id in self._sessions.get(key.principal, {}):
            self._lifetimes.end(key, is_expired=False)
            self._drop(key)

    async def sweep(self) -> None:
        self._expire()
        self._lifetimes.forget()

    async def count_of(self, model: str) -> int:
        self._expire()
        return self._lifetimes.count_of(model)

    def count(self) -> int:
        return len(self._lifetimes)

    async def close(self) -> None:
        pass

    def _expire(self) -> None:
        for key in self._lifetimes.expire():
            self._drop(key)

    def _drop(self, key: SessionKey) -> None:
        stored = self._sessions[key.principal].pop(key.session_id)
        self._size_bytes[key.principal] -= len(stored.record)
        if not self._sessions[key.principal]:
            del self._sessions[key.principal], self._size_bytes[key.principal]
