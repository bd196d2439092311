"""Session stores of every kind, for tests: each over a clock that a test can put forward."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import AsyncIterator

from forwardpass.wire import errors
from forwardpass_server.sessions.store import SessionKey, SessionLimits
from forwardpass_server.sessions.stores.memory import MemorySessionStore
from forwardpass_server.sessions.stores.redis import RedisSessionStore
from forwardpass_server.sessions.stores.sqlite import SqliteSessionStore
from support.redis_servers import RedisProcess

LIMITS = SessionLimits(max_sessions=100, max_bytes=2**24, idle_expiry_s=60.0, remember_s=60.0)


def key(number: int, principal: str = "") -> SessionKey:
    return SessionKey(principal, number.to_bytes(16, "big"))


@dataclasses.dataclass
class Counts:
    expired: int = 0
    commits: int = 0

    def sessions_expired(self, count: int) -> None:
        self.expired += count

    def session_commit(self, seconds: float) -> None:
        assert seconds >= 0
        self.commits += 1


class Kit:
    """Opens stores of one kind; each after the first finds what the one before has left."""

    kind: str

    def __init__(self) -> None:
        self.counts = Counts()
        self.now = 1000.0

    @contextlib.asynccontextmanager
    async def open(self, **limits: float) -> AsyncIterator:
        store = self.make(dataclasses.replace(LIMITS, **limits))
        try:
            yield store
        finally:
            await store.close()

    def make(self, limits: SessionLimits):
        raise NotImplementedError

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


class MemoryKit(Kit):
    kind = "memory"

    def make(self, limits):
        return MemorySessionStore(limits, self.counts, lambda: self.now)


class SqliteKit(Kit):
    kind = "sqlite"

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.path = path

    def make(self, limits):
        return SqliteSessionStore(self.path, limits, self.counts, lambda: self.now)


class RedisKit(Kit):
    kind = "redis"

    def __init__(self, server: RedisProcess) -> None:
        super().__init__()
        self.server = server

    def make(self, limits):
        return RedisSessionStore(self.server.url, limits, self.counts, clock=lambda: self.now)

    def pass_time(self, seconds):
        """Nobody sets the clock of a Redis: every moment that is written down there comes so much sooner."""
        super().pass_time(seconds)
        ms = round(seconds * 1000)
        with self.server.client() as client:
            for name in client.scan_iter():
                if client.type(name) == b"zset":
                    for member in client.zrange(name, 0, -1):
                        client.zincrby(name, -ms, member)
                # One that is negative by now drops the key at once, as Redis would have done.
                client.pexpire(name, client.pttl(name) - ms)


async def error_of(call) -> errors.ForwardPassError | None:
    """The error that a call ends in."""
    try:
        await call
    except errors.ForwardPassError as error:
        return error
    return None


async def how(call) -> type[errors.ForwardPassError] | None:
    """The class of the error that a call ends in."""
    error = await error_of(call)
    return type(error) if error else None
