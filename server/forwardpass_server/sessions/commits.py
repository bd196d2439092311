"""Updates of metric sessions, each stored once: in their order, several to a commit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from forwardpass.wire import errors
from forwardpass.wire.structures import Structure
from forwardpass_server.sessions import records as session_records
from forwardpass_server.sessions.records import Standing, UpdateIdentity
from forwardpass_server.sessions.session import Session, Update
from forwardpass_server.sessions.store import SessionStore

# Of one session in one commit: what waits while the one before is written.
_MAX_UPDATES_PER_COMMIT = 64

# Of a commit that finds another server's before it, each time.
_MAX_ATTEMPTS = 50

_RETRY_AFTER_S = 0.1


class UpdateObserver(Protocol):
    """Is told what becomes of updates."""

    def session_updates(self, applied: int, duplicates: int) -> None:
        """applied: were stored. duplicates: were stored before, and answered again."""


class SessionCommits:
    """Applies updates and stores what comes of them. Used on one event loop alone. max_state_bytes: of one session."""

    def __init__(self, store: SessionStore, observer: UpdateObserver, max_state_bytes: int) -> None:
        self._store = store
        self._observer = observer
        self._max_state_bytes = max_state_bytes
        self._tasks: set[asyncio.Task[None]] = set()

    async def recorded(self, session: Session, identity: UpdateIdentity) -> bytes:
        """The outcome of an update that has counted; b"" for one that has not, or was stored without.

        Raises SequenceMismatch.
        """
        if await self._standing(session, identity) is not Standing.APPLIED:
            return b""
        outcome = session.record.writers[identity.writer_id].outcome
        if outcome:
            self._observer.session_updates(0, 1)
        return outcome

    def submit(self, session: Session, update: Update) -> asyncio.Future[None]:
        """Applies an update after those of the same session that were submitted before.

        Returns a future that is done once the update is stored, or was before. It goes on where nobody waits for it.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        session.waiting.append((update, future))
        if not session.is_committing:
            session.is_committing = True
            task = asyncio.ensure_future(self._commit_all(session))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return future

    async def _commit_all(self, session: Session) -> None:
        try:
            while session.waiting:
                count = min(len(session.waiting), _MAX_UPDATES_PER_COMMIT)
                await self._commit([session.waiting.popleft() for _ in range(count)], session)
        finally:
            session.is_committing = False

    async def _commit(self, waiting: Sequence[tuple[Update, asyncio.Future[None]]], session: Session) -> None:
        """Applies updates and answers whoever waits for them. Raises nothing."""
        try:
            answers = await self._apply(session, [update for update, _ in waiting])
        except Exception as error:
            # Nobody knows what the store holds now.
            session.is_doubtful = True
            answers = [error] * len(waiting)
        else:
            self._observer.session_updates(answers.count(Standing.NEXT), answers.count(Standing.APPLIED))
        for (_, future), answer in zip(waiting, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(None)

    async def _apply(self, session: Session, updates: Sequence[Update]) -> list[Standing | Exception]:
        """Applies updates in one commit. Returns how each stood to the session, or what was wrong with it alone."""
        is_current = not self._store.is_shared
        if session.is_doubtful:
            await self._look_again(session)
            is_current = True
        for _ in range(_MAX_ATTEMPTS):
            version, record = session.version, session.record
            answers: list[Standing | Exception] = []
            for update in updates:
                try:
                    standing = record.standing(update.identity)
                    if standing is Standing.NEXT:
                        state = await update.apply(session.servable, record.state)
                        self.check_size(state)
                        record = record.after(update.identity, state, update.outcome)
                    answers.append(standing)
                except Exception as error:
                    answers.append(error)
            if not is_current and any(answer is not Standing.NEXT for answer in answers):
                # By what another server has stored it may be otherwise.
                await self._look_again(session)
                is_current = True
                continue
            if record is session.record:
                return answers
            encoded = session_records.encode(record)
            if await self._store.replace(session.key, version, encoded):
                session.know(version + 1, record)
                return answers
            await self._look_again(session)
            is_current = True
        raise errors.SessionStoreUnavailable(
            f"other servers updated the session {_MAX_ATTEMPTS} times meanwhile", retry_after_s=_RETRY_AFTER_S
        )

    async def _look_again(self, session: Session) -> None:
        """For whoever commits: nothing newer can be known here meanwhile."""
        stored = await self._store.load(session.key)
        session.believe(stored.version, session_records.decode(stored.record))

    async def _standing(self, session: Session, identity: UpdateIdentity) -> Standing:
        """How an update stands to a session, asking the store where another server may know better."""
        if not session.is_doubtful:
            try:
                standing = session.record.standing(identity)
            except errors.SequenceMismatch:
                if not self._store.is_shared:
                    raise
            else:
                if standing is Standing.NEXT or not self._store.is_shared:
                    return standing
        stored = await self._store.load(session.key)
        session.know(stored.version, session_records.decode(stored.record))
        return session.record.standing(identity)

    def check_size(self, state: Structure) -> None:
        """Raises SessionLimitExceeded for a state of more than one session may have."""
        size_bytes = sum(leaf.nbytes for leaf in state.leaves)
        if size_bytes > self._max_state_bytes:
            raise errors.SessionLimitExceeded(
                place="state", expected=f"at most {self._max_state_bytes} bytes", found=f"{size_bytes}"
            )
