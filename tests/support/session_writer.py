"""A process that writes sessions to a file as fast as it can, and prints what was acknowledged.

python -m support.session_writer FILE CALLERS: lines of caller and version, each once it is stored, until it is killed.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import sys

from forwardpass_server.sessions.store import SessionKey, SessionLimits
from forwardpass_server.sessions.stores.sqlite import SqliteSessionStore

LIMITS = SessionLimits(max_sessions=1000, max_bytes=2**30, idle_expiry_s=3600.0, remember_s=3600.0)


class NoObserver:
    def sessions_expired(self, count: int) -> None: ...

    def session_commit(self, seconds: float) -> None: ...


def key(caller: int) -> SessionKey:
    return SessionKey("", caller.to_bytes(16, "big"))


def record(caller: int, version: int) -> bytes:
    """2 KB that no other version has."""
    return f"{caller} {version} ".encode().ljust(2048, b".")


async def write(path: pathlib.Path, callers: int) -> None:
    store = SqliteSessionStore(path, LIMITS, NoObserver())

    async def call(caller: int) -> None:
        version = (await store.create(key(caller), record(caller, 1))).version
        while True:
            os.write(1, f"{caller} {version}\n".encode())
            assert await store.replace(key(caller), version, record(caller, version + 1))
            version += 1

    await asyncio.gather(*map(call, range(callers)))


if __name__ == "__main__":
    asyncio.run(write(pathlib.Path(sys.argv[1]), int(sys.argv[2])))
