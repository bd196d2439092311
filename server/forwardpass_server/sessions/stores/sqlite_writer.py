"""A thread that runs work on a SQLite database: all waiting work in one transaction, answered after its commit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from forwardpass.wire import errors
from forwardpass_server.sessions.stores.sqlite_file import Replacement, SqliteFile

_LOGGER = logging.getLogger(__name__)

T = TypeVar("T")

# A full disk stays full for a while: faster retries only add load.
_RETRY_AFTER_S = 1.0


class _Job(NamedTuple, Generic[T]):
    work: Callable[[], T]
    done: Callable[[T], None] | None
    future: asyncio.Future[T]
    replacement: Replacement | None


class _Outcome(NamedTuple):
    value: Any
    error: Exception | None = None


class SqliteWriter:
    """Owns a file, whose connection is in autocommit mode (`isolation_level=None`). Used on one event loop.

    `problem`: why the database failed, as a sentence; "" after the next successful write. May be read on any thread.
    """

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._connection = file.connection
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._is_closed = False
        self.problem = ""
        self._thread = threading.Thread(target=self._write, name="session-store", daemon=True)
        self._thread.start()

    def replace(self, replacement: Replacement, done: Callable[[bool], None]) -> asyncio.Future[bool]:
        """Queues a `SqliteFile.replace`: see `submit`. Replacements that wait together take one statement."""
        return self.submit(lambda: self._file.replace(*replacement), done, replacement)

    def submit(
        self,
        work: Callable[[], T],
        done: Callable[[T], None] | None = None,
        replacement: Replacement | None = None,
    ) -> asyncio.Future[T]:
        """Queues work. Cancelling the future does not stop the work.

        work: runs on the writer's thread within a transaction. If it raises a ForwardPassError, it must not have
        changed anything: the other work of the transaction is committed.
        replacement: what work does, if it only replaces a record.
        done: is called on the event loop with the result of work after the commit, in the order of submission.
        The future fails with what work raises, and with SessionStoreUnavailable if the database fails.
        """
        if self._is_closed:
            raise errors.SessionStoreUnavailable("the session store is closed: the server is shutting down")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        # Read the exception: asyncio would log it as unread if the caller has gone.
        future.add_done_callback(lambda over: over.cancelled() or over.exception())
        self._jobs.put(_Job(work, done, future, replacement))
        return future

    async def close(self) -> None:
        """Commits all queued work, and closes the connection."""
        if not self._is_closed:
            self._is_closed = True
            self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _write(self) -> None:
        while self._write_what_waits():
            pass
        self._connection.close()

    def _write_what_waits(self) -> bool:
        """Waits for work, and does all that is queued. Returns False after `close`."""
        waiting = [self._jobs.get()]
        while not self._jobs.empty():
            waiting.append(self._jobs.get())
        jobs = [job for job in waiting if job is not None]
        if jobs:
            outcomes = self._commit(jobs)
            # RuntimeError: the event loop was closed, so that nobody waits.
            with contextlib.suppress(RuntimeError):
                jobs[0].future.get_loop().call_soon_threadsafe(_answer, jobs, outcomes)
        return None not in waiting

    def _commit(self, jobs: list[_Job[Any]]) -> list[_Outcome]:
        changes = self._connection.total_changes
        try:
            outcomes = self._transact(jobs)
        except Exception as error:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            self._file.forget_rows()
            if len(jobs) > 1:
                # Try each alone, so that only the impossible work fails, such as a record too large for the disk.
                return [outcome for job in jobs for outcome in self._commit([job])]
            if not isinstance(error, sqlite3.Error):
                return [_Outcome(None, error)]
            problem = f"the session store failed: {error}"
            if self.problem != problem:
                _LOGGER.error("the session store fails: %s", error)
                self.problem = problem
            return [_Outcome(None, errors.SessionStoreUnavailable(problem, retry_after_s=_RETRY_AFTER_S))]
        if self.problem and self._connection.total_changes > changes:
            _LOGGER.warning("the session store works again")
            self.problem = ""
        return outcomes

    def _transact(self, jobs: list[_Job[Any]]) -> list[_Outcome]:
        replacements = [job.replacement for job in jobs if job.replacement is not None]
        if len(replacements) == len(jobs) and self._file.replace_all(replacements):
            return [_Outcome(True)] * len(jobs)
        outcomes = []
        self._connection.execute("BEGIN IMMEDIATE")
        for job in jobs:
            try:
                outcomes.append(_Outcome(job.work()))
            except errors.ForwardPassError as error:
                outcomes.append(_Outcome(None, error))
        self._connection.execute("COMMIT")
        return outcomes


def _answer(jobs: list[_Job[Any]], outcomes: list[_Outcome]) -> None:
    for job, outcome in zip(jobs, outcomes, strict=True):
        if outcome.error is None and job.done is not None:
            job.done(outcome.value)
        if job.future.done():
            continue
        if outcome.error is None:
            job.future.set_result(outcome.value)
        else:
            job.future.set_exception(outcome.error)
