"""The session store in a SQLite file of one server process. Acknowledged updates survive kill -9 and a power cut."""

from __future__ import annotations

import asyncio
import pathlib
import time
from collections.abc import Callable
from typing import TypeVar

from forwardpass_server.sessions.store import SessionKey, SessionLimits, SessionObserver, StoredSession
from forwardpass_server.sessions.stores.lifetimes import Lifetimes
from forwardpass_server.sessions.stores.sqlite_file import Replacement, SqliteFile
from forwardpass_server.sessions.stores.sqlite_writer import SqliteWriter

T = TypeVar("T")


class SqliteSessionStore:
    """A SessionStore over a file, which no other process can use at the same time.

    The times of the last use are in memory only, because monotonic clocks of two processes cannot be compared. So at
    the start all open sessions count as used now, and all ended sessions as ended now.
    clock: in seconds; never goes back.
    Creates a missing file. Raises SessionStoreError for a file that cannot be used.
    """

    is_shared = False

    def __init__(
        self,
        path: pathlib.Path,
        limits: SessionLimits,
        observer: SessionObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.place = str(path)
        self._observer = observer
        self._lifetimes = Lifetimes(limits, observer, clock)
        # Sessions that have expired, or were forgotten, and for which the file does not say so yet.
        self._expired: set[SessionKey] = set()
        self._forgotten: set[SessionKey] = set()
        self._file = SqliteFile(path, limits)
        for key, model in self._file.open_sessions():
            self._lifetimes.open(key, model)
        for key, is_expired in self._file.ended_sessions():
            self._lifetimes.end(key, is_expired=is_expired)
        self._writer = SqliteWriter(self._file)

    @property
    def problem(self) -> str:
        return self._writer.problem

    async def check(self) -> None:
        if self.problem:
            await self._writer.submit(self._file.try_write)

    async def create(self, key: SessionKey, record: bytes, model: str = "") -> StoredSession:
        started = time.perf_counter()
        self._expire()
        self._lifetimes.refuse_ended(key)

        def done(created: tuple[StoredSession, bool]) -> None:
            _, is_new = created
            self._lifetimes.open(key, model)
            if is_new:
                self._observer.session_commit(time.perf_counter() - started)

        stored, _ = await self._write_after_ends(lambda: self._file.create(key, record, model), done)
        return stored

    async def load(self, key: SessionKey) -> StoredSession:
        self.touch(key)
        return await self._writer.submit(lambda: self._file.load(key))

    async def replace(self, key: SessionKey, version: int, record: bytes) -> bool:
        started = time.perf_counter()
        # It must not expire while the write waits.
        self.touch(key)

        def done(is_replaced: bool) -> None:
            self._lifetimes.open(key)
            if is_replaced:
                self._observer.session_commit(time.perf_counter() - started)

        return await self._writer.replace(Replacement(key, version, record), done)

    def touch(self, key: SessionKey) -> None:
        self._expire()
        self._lifetimes.use(key)

    async def delete(self, key: SessionKey) -> None:
        self._expire()

        def done(was_there: bool) -> None:
            if was_there:
                self._lifetimes.end(key, is_expired=False)

        await self._write_after_ends(lambda: self._file.end(key, is_expired=False), done)

    async def sweep(self) -> None:
        self._expire()
        self._forgotten.update(self._lifetimes.forget())
        ends = self._write_ends()
        if ends is not None:
            await ends

    async def count_of(self, model: str) -> int:
        self._expire()
        return self._lifetimes.count_of(model)

    def count(self) -> int:
        return len(self._lifetimes)

    async def close(self) -> None:
        await self._writer.close()

    def _expire(self) -> None:
        self._expired.update(self._lifetimes.expire())

    async def _write_after_ends(self, work: Callable[[], T], done: Callable[[T], None]) -> T:
        """Writes pending ends first: else expired sessions in the file would still count against the limits."""
        ends = self._write_ends()
        written = self._writer.submit(work, done)
        if ends is not None:
            await ends
        return await written

    def _write_ends(self) -> asyncio.Future[None] | None:
        """Submits the pending ends. If the write fails, the next call submits them again. None if there are none."""
        expired, forgotten = list(self._expired), list(self._forgotten)
        if not expired and not forgotten:
            return None

        def work() -> None:
            for key in expired:
                self._file.end(key, is_expired=True)
            self._file.forget(forgotten)

        def done(_: None) -> None:
            self._expired.difference_update(expired)
            self._forgotten.difference_update(forgotten)

        return self._writer.submit(work, done)
