"""One metric session in this server: its cached record, its waiting updates, and their commits to the store."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from forwardpass.wire import errors
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.plans import Servable
from forwardpass_server.sessions import records as session_records
from forwardpass_server.sessions.records import Record, UpdateIdentity, UpdateStatus
from forwardpass_server.sessions.store import SessionKey, SessionStore, StoredSession

# Bounds how long one commit keeps its callers waiting.
_MAX_UPDATES_PER_COMMIT = 64

# A commit fails after it has lost the race against other servers this often.
_MAX_ATTEMPTS = 50

_RETRY_AFTER_S = 0.1

# Python objects of a cached session besides its record.
_OVERHEAD_BYTES = 4096


class UpdateObserver(Protocol):
    """Counts updates."""

    def session_updates(self, applied: int, duplicates: int) -> None:
        """applied: updates that were stored. duplicates: updates that were stored earlier and were sent again."""


@dataclasses.dataclass(frozen=True, slots=True)
class SessionStorage:
    """What the sessions of one server share to store their updates.

    max_state_bytes: of the state of one session. commits: the running commits; asyncio keeps no reference to a task.
    """

    store: SessionStore
    observer: UpdateObserver
    max_state_bytes: int
    commits: set[asyncio.Task[None]] = dataclasses.field(default_factory=set)

    def check_state_size(self, state: Structure) -> None:
        """Raises SessionLimitExceeded for a state that is larger than `max_state_bytes`."""
        size_bytes = sum(leaf.nbytes for leaf in state.leaves)
        if size_bytes > self.max_state_bytes:
            raise errors.SessionLimitExceeded(
                place="state", expected=f"at most {self.max_state_bytes} bytes", found=f"{size_bytes}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """One update of a session, or several consecutive ones of one writer, which are applied together.

    apply: computes the state after the updates. It takes the state before, and how many of the first updates that state
    has counted already; fewer than all.
    outcome: encoded results, which are stored with the last update; b"" for none.
    """

    identities: Sequence[UpdateIdentity]
    apply: Callable[[Servable, Structure, int], Awaitable[Structure]]
    outcome: bytes = b""


class Session:
    """One session: the only owner of its cached record, its queue of updates, and its commits.

    Used on one event loop only. resized: is called with the session and the difference in bytes when `size_bytes`
    changes.
    """

    def __init__(
        self,
        key: SessionKey,
        servable: Servable,
        stored: StoredSession,
        record: Record,
        storage: SessionStorage,
        resized: Callable[[Session, int], None],
    ) -> None:
        self.key = key
        self.servable = servable
        self._storage = storage
        self._store = storage.store
        self._resized = resized
        self._version = stored.version
        self._record = record
        self._size_bytes = len(stored.record) + _OVERHEAD_BYTES
        # True after a failed commit: the store may hold the old record or the new one.
        self._is_in_doubt = False
        self._waiting: collections.deque[tuple[Update, asyncio.Future[None]]] = collections.deque()
        self._is_committing = False

    @property
    def record(self) -> Record:
        """The record that was last read from the store or written to it."""
        return self._record

    @property
    def size_bytes(self) -> int:
        """The memory that the session takes: its encoded record now, and its Python objects."""
        return self._size_bytes

    @property
    def is_committing(self) -> bool:
        """Whether updates are being applied or stored."""
        return self._is_committing

    @property
    def may_be_stale(self) -> bool:
        """Whether the store may hold another record than this session."""
        return self._is_in_doubt or self._store.is_shared

    def refresh(self, stored: StoredSession) -> None:
        """Takes over what was read from the store, unless a newer record is cached here already."""
        self._is_in_doubt = False
        if stored.version > self._version:
            self._replace(stored)

    async def recorded_outcome(self, identity: UpdateIdentity) -> bytes:
        """The stored outcome of an update that was applied already; b"" for any other update.

        Raises SequenceMismatch, SessionNotFound, SessionExpired, SessionLimitExceeded and SessionStoreUnavailable.
        """
        if await self._status_of(identity) is not UpdateStatus.DUPLICATE:
            return b""
        outcome = self._record.writers[identity.writer_id].outcome
        if outcome:
            self._storage.observer.session_updates(0, 1)
        return outcome

    def submit(self, update: Update) -> asyncio.Future[None]:
        """Queues an update: updates are applied and stored in the order in which they were submitted.

        Returns a future that is done when the update is stored. Updates are stored even if nobody awaits the future.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((update, future))
        if not self._is_committing:
            self._is_committing = True
            task = asyncio.ensure_future(self._commit_all())
            self._storage.commits.add(task)
            task.add_done_callback(self._storage.commits.discard)
        return future

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                count = min(len(self._waiting), _MAX_UPDATES_PER_COMMIT)
                await self._commit([self._waiting.popleft() for _ in range(count)])
        finally:
            self._is_committing = False

    async def _commit(self, waiting: Sequence[tuple[Update, asyncio.Future[None]]]) -> None:
        """Applies and stores updates, and completes their futures. Raises nothing."""
        try:
            answers = await self._apply([update for update, _ in waiting])
        except Exception as error:
            self._is_in_doubt = True
            answers = [error] * len(waiting)
        else:
            duplicates = [answer for answer in answers if not isinstance(answer, Exception)]
            in_all = sum(
                len(update.identities)
                for (update, _), answer in zip(waiting, answers, strict=True)
                if not isinstance(answer, Exception)
            )
            self._storage.observer.session_updates(in_all - sum(duplicates), sum(duplicates))
        for (_, future), answer in zip(waiting, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(None)

    async def _apply(self, updates: Sequence[Update]) -> list[int | Exception]:
        """Applies updates and stores the result in one commit.

        Returns for each how many of its updates were applied earlier, or the error that concerns it only.
        """
        is_current = not self._store.is_shared
        if self._is_in_doubt:
            await self._reload()
            is_current = True
        for _ in range(_MAX_ATTEMPTS):
            record = self._record
            answers: list[int | Exception] = []
            for update in updates:
                try:
                    applied = record.applied(update.identities)
                    if applied < len(update.identities):
                        state = await update.apply(self.servable, record.state, applied)
                        self._storage.check_state_size(state)
                        record = record.after(update.identities[applied:], state, update.outcome)
                    answers.append(applied)
                except Exception as error:
                    answers.append(error)
            if not is_current and any(answers):
                # The cached record may be older than one that another server has stored: decide again with that one.
                await self._reload()
                is_current = True
                continue
            if record is self._record or await self._replace_stored(record):
                return answers
            await self._reload()
            is_current = True
        raise errors.SessionStoreUnavailable(
            f"the update was not written, because other servers updated the session {_MAX_ATTEMPTS} times during it: "
            "retry",
            retry_after_s=_RETRY_AFTER_S,
        )

    async def _replace_stored(self, record: Record) -> bool:
        """Stores a record in place of the cached one. Returns False where the store holds another one by now."""
        version, encoded = self._version, session_records.encode(record)
        if not await self._store.replace(self.key, version, encoded):
            return False
        self._is_in_doubt = False
        # A read that was under way may have brought a newer record meanwhile.
        if version + 1 > self._version:
            self._set(version + 1, record, len(encoded))
        return True

    async def _reload(self) -> None:
        """Takes over the store's record, even an older one: a store may have lost updates in a failover."""
        stored = await self._store.load(self.key)
        self._is_in_doubt = False
        self._replace(stored)

    async def _status_of(self, identity: UpdateIdentity) -> UpdateStatus:
        """The status of an update. Reads the store where another server may have stored a newer record.

        Raises SequenceMismatch and SessionLimitExceeded.
        """
        if not self._is_in_doubt:
            try:
                status = self._record.status_of(identity)
            except errors.SequenceMismatch:
                if not self._store.is_shared:
                    raise
            else:
                if status is UpdateStatus.NEW or not self._store.is_shared:
                    return status
        self.refresh(await self._store.load(self.key))
        return self._record.status_of(identity)

    def _replace(self, stored: StoredSession) -> None:
        self._set(stored.version, session_records.decode(stored.record), len(stored.record))

    def _set(self, version: int, record: Record, encoded_bytes: int) -> None:
        self._version, self._record = version, record
        difference = encoded_bytes + _OVERHEAD_BYTES - self._size_bytes
        if difference:
            self._size_bytes += difference
            self._resized(self, difference)
