"""The tables of a SQLite file of sessions, and the operations on them."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from forwardpass_server.errors import SessionStoreError
from forwardpass_server.sessions.store import SessionKey, SessionLimits, StoredSession
from forwardpass_server.sessions.stores import refusals

# "fwdp": distinguishes the file from databases of other programs.
_APPLICATION_ID = 0x66776470
_SCHEMA_VERSION = 2
# model: the string under which a session is counted; "" for none. usage: the number and the bytes of a principal's
# sessions, updated in the same transactions.
_SCHEMA = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE sessions (
        principal TEXT NOT NULL, session_id BLOB NOT NULL, version INTEGER NOT NULL, record BLOB NOT NULL,
        model TEXT NOT NULL,
        PRIMARY KEY (principal, session_id)
    );
    CREATE TABLE ended (
        principal TEXT NOT NULL, session_id BLOB NOT NULL, is_expired INTEGER NOT NULL,
        PRIMARY KEY (principal, session_id)
    ) WITHOUT ROWID;
    CREATE TABLE usage (
        principal TEXT NOT NULL PRIMARY KEY, sessions INTEGER NOT NULL, size_bytes INTEGER NOT NULL
    ) WITHOUT ROWID;
    PRAGMA application_id = {_APPLICATION_ID};
    PRAGMA user_version = {_SCHEMA_VERSION};
    COMMIT;
"""


# Version 1 did not count sessions by model: its sessions get none.
_MIGRATION = f"""
    BEGIN IMMEDIATE;
    ALTER TABLE sessions ADD COLUMN model TEXT NOT NULL DEFAULT '';
    PRAGMA user_version = {_SCHEMA_VERSION};
    COMMIT;
"""


# UPDATE FROM is as old as SQLite 3.33. A statement may have 32,766 values, of which each record takes three.
_MAX_REPLACED = 1000 if sqlite3.sqlite_version_info >= (3, 33) else 1


class Replacement(NamedTuple):
    """A record that replaces the one with this version."""

    key: SessionKey
    version: int
    record: bytes


class _Row(NamedTuple):
    """A row of the table of sessions. size_bytes: of its record."""

    rowid: int
    version: int
    size_bytes: int


class SqliteFile:
    """A file of sessions, locked against other processes.

    The caller begins and commits the transactions, on one thread at a time. A method that raises a ForwardPassError has
    changed nothing. All methods may raise sqlite3.Error.
    Creates a missing file. Raises SessionStoreError for a file that cannot be used.
    """

    def __init__(self, path: pathlib.Path, limits: SessionLimits) -> None:
        self._limits = limits
        # What was written last, of open sessions that were updated. No other process changes the file.
        self._rows: dict[SessionKey, _Row] = {}
        with _refusing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Readable by the owner only: a state may reveal data. SQLite gives its other files the same mode.
            with contextlib.suppress(FileExistsError):
                path.touch(0o600, exist_ok=False)
            self.connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        with contextlib.ExitStack() as stack:
            stack.callback(self.connection.close)
            with _refusing(path):
                self._prepare()
            stack.pop_all()

    def _prepare(self) -> None:
        # Locks out other processes until the connection is closed or the process ends.
        self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        tables = self._number("SELECT count(*) FROM sqlite_master")
        application, version = self._number("PRAGMA application_id"), self._number("PRAGMA user_version")
        if application != (_APPLICATION_ID if tables else 0):
            raise SessionStoreError("it is the database of another program")
        if version not in ((1, _SCHEMA_VERSION) if tables else (0,)):
            raise SessionStoreError(
                f"its format is version {version}, and this server supports version {_SCHEMA_VERSION} only"
            )
        self.connection.execute("PRAGMA journal_mode = WAL")
        # NORMAL does not wait for the disk: a power cut lost 450 acknowledged updates with it, and none with FULL.
        self.connection.execute("PRAGMA synchronous = FULL")
        # Truncates a large log to 16 MiB, enough for the writes between two checkpoints.
        self.connection.execute(f"PRAGMA journal_size_limit = {2**24}")
        # Reads the whole file, one or two seconds per GB: a state that the disk has corrupted must not be served.
        (found,) = self.connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise SessionStoreError(f"it is damaged: {found}")
        if not tables:
            self.connection.executescript(_SCHEMA)
        elif version == 1:
            self.connection.executescript(_MIGRATION)

    def _number(self, query: str) -> int:
        (number,) = self.connection.execute(query).fetchone()
        return int(number)

    def try_write(self) -> None:
        """Tests a write, and reverts it."""
        self.connection.execute("INSERT INTO ended VALUES ('', x'', 0)")
        self.connection.execute("DELETE FROM ended WHERE principal = '' AND session_id = x''")

    def open_sessions(self) -> Iterator[tuple[SessionKey, str]]:
        """The open sessions, each with its model."""
        rows = self.connection.execute("SELECT principal, session_id, model FROM sessions")
        return ((SessionKey(principal, session_id), model) for principal, session_id, model in rows)

    def ended_sessions(self) -> Iterator[tuple[SessionKey, bool]]:
        """The ended sessions that are remembered, each with whether it expired."""
        rows = self.connection.execute("SELECT principal, session_id, is_expired FROM ended")
        return ((SessionKey(principal, session_id), bool(is_expired)) for principal, session_id, is_expired in rows)

    def create(self, key: SessionKey, record: bytes, model: str) -> tuple[StoredSession, bool]:
        """See SessionStore.create. Returns also whether the session is new."""
        found = self._find("version, record", key)
        if found is not None:
            return StoredSession(*found), False
        self._refuse_ended(key)
        sessions, size_bytes = self._usage(key.principal)
        refusals.check_room(self._limits, sessions + 1, size_bytes + len(record))
        self.connection.execute("INSERT INTO sessions VALUES (?, ?, 1, ?, ?)", (*key, record, model))
        self._account(key.principal, 1, len(record))
        return StoredSession(1, record), True

    def load(self, key: SessionKey) -> StoredSession:
        """The record of a session, with its version. Raises SessionNotFound or SessionExpired."""
        found = self._find("version, record", key)
        if found is None:
            self._refuse_ended(key)
            raise refusals.not_found(key)
        return StoredSession(*found)

    def replace_all(self, replacements: Sequence[Replacement]) -> bool:
        """Replaces records in one statement, which is a transaction by itself. Returns False where it cannot.

        It can where the rows of different sessions are known, have these versions, and keep their length. A commit of
        the updates of running sessions is such a case. Each statement less saves a hand-over of Python's lock.
        """
        if len(replacements) > _MAX_REPLACED:
            return False
        rows = [self._rows.get(one.key) for one in replacements]
        values: list[Any] = []
        for one, row in zip(replacements, rows, strict=True):
            if row is None or (row.version, row.size_bytes) != (one.version, len(one.record)):
                return False
            values += [row.rowid, one.version + 1, one.record]
        if len({one.key for one in replacements}) < len(replacements):
            return False
        self.connection.execute(_replacing(len(replacements)), values)
        for one, row in zip(replacements, rows, strict=True):
            assert row is not None
            self._rows[one.key] = row._replace(version=one.version + 1)
        return True

    def forget_rows(self) -> None:
        """Call it after a transaction was reverted: what is known of the rows may be wrong."""
        self._rows.clear()

    def replace(self, key: SessionKey, version: int, record: bytes) -> bool:
        """Replaces the record if it has this version: whether it had. See SessionStore.replace.

        Raises SessionNotFound or SessionExpired, and SessionLimitExceeded for a longer record over the limit of bytes.
        """
        found = self._find("rowid, version, length(record)", key)
        if found is None:
            self._refuse_ended(key)
            raise refusals.not_found(key)
        row, found_version, found_bytes = found
        if found_version != version:
            return False
        more_bytes = len(record) - found_bytes
        if more_bytes > 0:
            _, size_bytes = self._usage(key.principal)
            refusals.check_room(self._limits, 0, size_bytes + more_bytes)
        self.connection.execute(
            "UPDATE sessions SET version = ?, record = ? WHERE rowid = ?", (version + 1, record, row)
        )
        if more_bytes:
            self._account(key.principal, 0, more_bytes)
        self._rows[key] = _Row(row, version + 1, len(record))
        return True

    def end(self, key: SessionKey, *, is_expired: bool) -> bool:
        """Deletes a session and remembers that it has ended. Returns whether it existed."""
        found = self._find("rowid, length(record)", key)
        if found is None:
            return False
        row, size_bytes = found
        self._rows.pop(key, None)
        self.connection.execute("DELETE FROM sessions WHERE rowid = ?", (row,))
        self.connection.execute("INSERT INTO ended VALUES (?, ?, ?)", (*key, is_expired))
        self._account(key.principal, -1, -size_bytes)
        return True

    def forget(self, keys: Iterable[SessionKey]) -> None:
        """Forgets that these sessions have ended."""
        self.connection.executemany("DELETE FROM ended WHERE principal = ? AND session_id = ?", keys)

    def _find(self, columns: str, key: SessionKey) -> tuple[Any, ...] | None:
        query = f"SELECT {columns} FROM sessions WHERE principal = ? AND session_id = ?"
        found: tuple[Any, ...] | None = self.connection.execute(query, key).fetchone()
        return found

    def _refuse_ended(self, key: SessionKey) -> None:
        query = "SELECT is_expired FROM ended WHERE principal = ? AND session_id = ?"
        for (is_expired,) in self.connection.execute(query, key):
            raise refusals.ended(key, bool(is_expired))

    def _usage(self, principal: str) -> tuple[int, int]:
        """The number of a principal's sessions, and the bytes of their records."""
        query = "SELECT sessions, size_bytes FROM usage WHERE principal = ?"
        found: tuple[int, int] | None = self.connection.execute(query, (principal,)).fetchone()
        return found or (0, 0)

    def _account(self, principal: str, sessions: int, size_bytes: int) -> None:
        """Adds to the number and the bytes of a principal's sessions."""
        self.connection.execute(
            "INSERT INTO usage VALUES (?, ?, ?) ON CONFLICT (principal) DO UPDATE"
            " SET sessions = sessions + excluded.sessions, size_bytes = size_bytes + excluded.size_bytes",
            (principal, sessions, size_bytes),
        )
        self.connection.execute("DELETE FROM usage WHERE principal = ? AND sessions = 0", (principal,))


@functools.lru_cache(maxsize=128)
def _replacing(count: int) -> str:
    """The statement that replaces so many records. Its values are (rowid, version, record) for each."""
    if count == 1:
        # The order of the values is that of the other statements.
        return "UPDATE sessions SET version = ?2, record = ?3 WHERE rowid = ?1"
    values = ", ".join(["(?, ?, ?)"] * count)
    return (
        f"WITH given (row, version, record) AS (VALUES {values}) UPDATE sessions"
        " SET version = given.version, record = given.record FROM given WHERE sessions.rowid = given.row"
    )


@contextlib.contextmanager
def _refusing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error, SessionStoreError) as error:
        reason = str(error)
        if reason == "database is locked":
            reason = "another process uses it; servers share sessions over Redis, or have a file each"
        raise SessionStoreError(f"session store {path}: {reason}") from error
