"""Metric sessions: states that the server holds, each update applied once."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from forwardpass.wire import conform, errors
from forwardpass.wire.description import Function, ModelIdentity
from forwardpass.wire.structures import Structure
from forwardpass_server.serving import session_records
from forwardpass_server.serving.admission import Admission
from forwardpass_server.serving.calls import Caller, Request
from forwardpass_server.serving.plans import Servable
from forwardpass_server.serving.registry import Registry
from forwardpass_server.serving.session_records import Record, Standing, UpdateIdentity, check_id
from forwardpass_server.serving.session_store import SessionKey, SessionStore, StoredSession

# Of one session in one commit: what waits while the one before is written.
_MAX_UPDATES_PER_COMMIT = 64

# Of a commit that finds another server's before it, each time.
_MAX_ATTEMPTS = 50

# Of sessions at hand, with what each takes besides its record; others are read from the store again.
_CACHED_BYTES = 2**27
_OVERHEAD_BYTES = 4096

# Without a use, until a session is no longer at hand: most that are left so long are never used again.
_CACHED_S = 60.0

_RETRY_AFTER_S = 0.1


class UpdateObserver(Protocol):
    """Is told what becomes of updates."""

    def session_updates(self, applied: int, duplicates: int) -> None:
        """applied: were stored. duplicates: were stored before, and answered again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """One update. apply: the state after it from the one before. outcome: to be recorded; b"" for nothing."""

    identity: UpdateIdentity
    apply: Callable[[Servable, Structure], Awaitable[Structure]]
    outcome: bytes = b""


class Session:
    """A session as this server knows it: `record` is what the store held at `version`, when it was last looked at."""

    def __init__(self, key: SessionKey, servable: Servable, version: int, record: Record, size_bytes: int) -> None:
        self.key = key
        self.servable = servable
        self.version = version
        self.record = record
        self.size_bytes = size_bytes
        self.used = time.monotonic()
        # A write of which nobody knows what became of it: the store is to be asked.
        self.is_doubtful = False
        self.waiting: collections.deque[tuple[Update, asyncio.Future[None]]] = collections.deque()
        self.is_committing = False

    def know(self, version: int, record: Record) -> None:
        """Takes note of what the store held at some moment, unless something newer is known."""
        self.is_doubtful = False
        if version > self.version:
            self.version, self.record = version, record

    def believe(self, version: int, record: Record) -> None:
        """Takes note of what the store holds now: less than is known here, where it has lost some of it."""
        self.is_doubtful = False
        self.version, self.record = version, record


class Sessions:
    """The sessions of all principals. Used on one event loop alone.

    max_state_bytes: of one session.
    """

    def __init__(
        self,
        store: SessionStore,
        registry: Registry,
        caller: Caller,
        admission: Admission,
        observer: UpdateObserver,
        max_state_bytes: int,
    ) -> None:
        self._store = store
        self._registry = registry
        self._caller = caller
        self._admission = admission
        self._observer = observer
        self._max_state_bytes = max_state_bytes
        self._cached: collections.OrderedDict[SessionKey, Session] = collections.OrderedDict()
        self._cached_bytes = 0
        # Models that the registry has no more, or is about to lose: for their sessions, at hand or not.
        self._left: dict[ModelIdentity, Servable] = {}
        # Of each model that there ever was: how many sessions somebody has begun to open, and those that are not yet.
        self._begun: collections.Counter[ModelIdentity] = collections.Counter()
        self._opening: collections.defaultdict[ModelIdentity, set[asyncio.Task[Session]]]
        self._opening = collections.defaultdict(set)
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(
        self,
        principal: str,
        session_id: bytes,
        name: str,
        version: int,
        label: str = "",
        *,
        resume: bool = False,
        initial_state: Structure | None = None,
        size_bytes: int = 0,
    ) -> Session:
        """Opens a session of a model, or finds one that is open.

        version: 0 for the highest that is available, or for the one that `label` stands for. A session that is open is
        found whatever those are by now.
        resume: the session must be there already. initial_state: None for the state before the first batch.
        Raises ServerOverloaded, what `Registry.get` and `Registry.labelled` raise, FunctionNotAvailable,
        StructureMismatch, DTypeMismatch, ShapeMismatch, SessionLimitExceeded, SessionNotFound, SessionExpired,
        InvalidRequest for a session of another model.
        """
        check_id(session_id, "session_id")
        key = SessionKey(principal, session_id)
        with self._admission.admitted(principal, size_bytes):
            if resume:
                session = await self._known(key)
            else:
                servable = self._registry.get(name, self._registry.labelled(name, label) if label else version)
                # Goes on where nobody waits for it: the store may have it by then.
                session = await asyncio.shield(self._make(key, servable, initial_state))
        found = session.record.identity
        if found.name != name or version not in (0, found.version):
            raise errors.InvalidRequest(
                place="model", expected=f"{found}, that of the session", found=f"{name[:128]}/{version}"
            )
        return session

    def _make(self, key: SessionKey, servable: Servable, initial_state: Structure | None) -> asyncio.Task[Session]:
        """A new session of a model, which is waited for from here on by whoever counts."""

        async def make() -> Session:
            record = Record(servable.identity, await self._initial_state(servable, initial_state))
            self._check_size(record.state)
            stored = await self._store.create(key, session_records.encode(record), _word(servable.identity))
            return self._keep(key, stored)

        self._begun[servable.identity] += 1
        opening = self._opening[servable.identity]
        making = asyncio.ensure_future(make())
        opening.add(making)
        making.add_done_callback(opening.discard)
        # Who has left does not ask what came of it.
        making.add_done_callback(lambda made: made.cancelled() or made.exception())
        return making

    async def count(self, model: ModelIdentity) -> int:
        """How many sessions a model has, at hand or not; waits for those that are just being opened here.

        After 0, none is opened here before the caller awaits something else. Raises SessionStoreUnavailable.
        """
        while True:
            begun, opening = self._begun[model], list(self._opening[model])
            if opening:
                await asyncio.wait(opening)
            found = await self._store.count_of(_word(model))
            # One that was begun meanwhile may have been missed.
            if found or self._begun[model] == begun:
                return found

    def leave(self, servable: Servable) -> None:
        """A model is about to be unloaded or replaced: its sessions are served on, at hand or only in the store."""
        self._left[servable.identity] = servable

    async def release(self) -> bool:
        """Forgets models that were left and have no sessions any more. Whether there were any. For now and then."""
        released = []
        for model, servable in list(self._left.items()):
            with contextlib.suppress(errors.SessionStoreUnavailable):
                if self._is_loaded_anew(servable) or not await self.count(model):
                    released.append(self._left.pop(model, None))
        return bool(released)

    def _is_loaded_anew(self, left: Servable) -> bool:
        """Whether the registry has the very same model again."""
        model = left.identity
        if not self._registry.is_available(model.name, model.version):
            return False
        served = self._registry.get(model.name, model.version)
        # The one that was left itself may be about to be replaced.
        return served is not left and served.identity == model

    async def _initial_state(self, servable: Servable, state: Structure | None) -> Structure:
        function = Function.INITIALIZE_METRICS_STATE
        identity = servable.identity
        if state is None or servable.plan(function).unavailable:
            results = await self._caller.run(servable, Request(identity.name, identity.version, function, {}, 0))
            return results["state"]
        spec = servable.spec.metrics_state
        return Structure(spec.tree, conform.check(state, spec, "initial_state"))

    async def update(
        self, principal: str, identity: UpdateIdentity, parts: Mapping[str, Structure], size_bytes: int
    ) -> Session:
        """Counts one batch. parts: labels, the fields of a batch output, and maybe sample_weight.

        Raises SequenceMismatch, SessionNotFound, SessionExpired, SessionLimitExceeded, SessionStoreUnavailable, and
        what a call of update_metrics_state raises. After SessionStoreUnavailable the update may have counted.
        """
        with self._admission.admitted(principal, size_bytes):
            session = await self.find(principal, identity.session_id)
            await self.submit(session, self.counting(identity, parts, size_bytes))
        return session

    async def forward_pass(
        self, principal: str, identity: UpdateIdentity, request: Request, without_predictions: bool
    ) -> tuple[Session, dict[str, Structure]]:
        """Runs a forward pass and counts its batch. request: its model's name and version are not looked at.

        Returns the results, without the predictions on request. Raises what `update` and a forward pass raise.
        """
        with self._admission.admitted(principal, request.size_bytes):
            session = await self.find(principal, identity.session_id)
            standing = await self._standing(session, identity)
            if standing is Standing.APPLIED:
                outcome = session.record.writers[identity.writer_id].outcome
                if outcome:
                    self._observer.session_updates(0, 1)
                    return session, session_records.decode_outcome(outcome)
            results = await self._caller.run(session.servable, request)
            answer = dict(results)
            if without_predictions:
                del answer["batch_output.predictions"]
            parts = update_parts(request.parts, results)
            update = self.counting(identity, parts, request.size_bytes, session_records.encode_outcome(answer))
            await self.submit(session, update)
        return session, answer

    async def merge(
        self,
        principal: str,
        identity: UpdateIdentity,
        other_session_id: bytes,
        state: Structure | None,
        size_bytes: int,
    ) -> Session:
        """Adds a state to that of a session: `state`, or else that of another session.

        Raises FunctionNotAvailable for a model whose states cannot be added, and what `update` raises.
        """
        with self._admission.admitted(principal, size_bytes):
            session = await self.find(principal, identity.session_id)
            added = state or await self._state_of(principal, other_session_id, session)
            await self.submit(session, self._adding(session, identity, added))
        return session

    async def _state_of(self, principal: str, session_id: bytes, into: Session) -> Structure:
        """The state of a session that is to be merged into another."""
        check_id(session_id, "other_session_id")
        other = await self.get(principal, session_id)
        if other.key == into.key or other.record.identity != into.record.identity:
            raise errors.InvalidRequest(
                place="other_session_id",
                expected=f"another session of {into.record.identity}",
                found="the same session" if other.key == into.key else f"one of {other.record.identity}",
            )
        return other.record.state

    def _adding(self, session: Session, identity: UpdateIdentity, state: Structure) -> Update:
        """The update that adds a state to a session's."""
        reason = session.servable.model.description.unmergeable_reason
        if reason:
            raise errors.FunctionNotAvailable(f"merging metrics states is not available: {reason}")
        added = conform.check(state, session.servable.spec.metrics_state, "state")

        async def add(servable: Servable, state: Structure) -> Structure:
            for path, one, other in zip(state.tree.paths("state"), state.leaves, added, strict=True):
                if one.shape != other.shape:
                    # Which numpy might well add, by repeating one of them.
                    raise errors.ShapeMismatch(place=path, expected=f"shape {one.shape}", found=f"{other.shape}")
            # A sum of two arrays without a dimension is no array.
            leaves = [np.asarray(one + other) for one, other in zip(state.leaves, added, strict=True)]
            return Structure(servable.spec.metrics_state.tree, leaves)

        return Update(identity, add)

    async def get(self, principal: str, session_id: bytes) -> Session:
        """A session with all that has been acknowledged of it. Raises SessionNotFound, SessionExpired."""
        check_id(session_id, "session_id")
        return await self._known(SessionKey(principal, session_id))

    async def result(self, principal: str, session_id: bytes) -> tuple[Session, Structure]:
        """The metrics of a session so far. Raises SessionNotFound, SessionExpired, ServerOverloaded."""
        session = await self.get(principal, session_id)
        identity, parts = session.record.identity, {"state": session.record.state}
        request = Request(identity.name, identity.version, Function.FINALIZE_METRICS, parts, 0)
        with self._admission.admitted(principal, 0):
            return session, (await self._caller.run(session.servable, request))["metrics"]

    async def close(self, principal: str, session_id: bytes) -> None:
        """Ends a session. That it is not there is no error."""
        check_id(session_id, "session_id")
        key = SessionKey(principal, session_id)
        await self._store.delete(key)
        self._forget(key)

    async def find(self, principal: str, session_id: bytes) -> Session:
        """A session to be updated: another server may have updated it since. Raises SessionNotFound, SessionExpired."""
        key = SessionKey(principal, session_id)
        session = self._cached.get(key)
        if session is None or not self._store.is_shared:
            return await self._known(key)
        self._use(session)
        return session

    def counting(
        self, identity: UpdateIdentity, parts: Mapping[str, Structure], size_bytes: int, outcome: bytes = b""
    ) -> Update:
        """The update that counts one batch. parts: as of `update`."""
        weighted = "sample_weight" in parts
        function = Function.WEIGHTED_UPDATE_METRICS_STATE if weighted else Function.UPDATE_METRICS_STATE

        async def count(servable: Servable, state: Structure) -> Structure:
            model = servable.identity
            request = Request(model.name, model.version, function, {**parts, "state": state}, size_bytes)
            return (await self._caller.run(servable, request))["state"]

        return Update(identity, count, outcome)

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
                        self._check_size(state)
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

    async def _known(self, key: SessionKey) -> Session:
        """A session as the store holds it now."""
        session = self._cached.get(key)
        if session is None or session.is_doubtful or self._store.is_shared:
            try:
                return self._keep(key, await self._store.load(key))
            except errors.SessionNotFound:
                self._forget(key)
                raise
        try:
            self._store.touch(key)
        except errors.SessionNotFound:
            self._forget(key)
            raise
        self._use(session)
        return session

    def _keep(self, key: SessionKey, stored: StoredSession) -> Session:
        session = self._cached.get(key)
        if session is None:
            record = session_records.decode(stored.record)
            size_bytes = len(stored.record) + _OVERHEAD_BYTES
            session = Session(key, self._servable(record.identity), stored.version, record, size_bytes)
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
                self._forget(key)

    def sweep(self) -> None:
        """Forgets what nobody has used for a while. To be called now and then."""
        now = time.monotonic()
        idle = itertools.takewhile(lambda session: session.used <= now - _CACHED_S, self._cached.values())
        for session in list(idle):
            # The store has it.
            if not session.is_committing:
                self._forget(session.key)

    def _forget(self, key: SessionKey) -> None:
        session = self._cached.pop(key, None)
        if session is not None:
            self._cached_bytes -= session.size_bytes

    def _servable(self, identity: ModelIdentity) -> Servable:
        """The very model that a session was opened with. Raises what `Registry.get` raises, and ModelChanged."""
        left = self._left.get(identity)
        try:
            servable = self._registry.get(identity.name, identity.version)
        except errors.ForwardPassError:
            if left is None:
                raise
            return left
        if servable.identity == identity:
            return servable
        if left is not None:
            return left
        raise errors.ModelChanged(
            place="session",
            expected=f"model {identity} of content {identity.content_hash.hex()[:12]}",
            found=f"content {servable.identity.content_hash.hex()[:12]}",
        )

    def _check_size(self, state: Structure) -> None:
        size_bytes = sum(leaf.nbytes for leaf in state.leaves)
        if size_bytes > self._max_state_bytes:
            raise errors.SessionLimitExceeded(
                place="state", expected=f"at most {self._max_state_bytes} bytes", found=f"{size_bytes}"
            )


def _word(model: ModelIdentity) -> str:
    """What a store counts the sessions of a model by."""
    return f"{model} {model.content_hash.hex()}"


def update_parts(batch: Mapping[str, Structure], results: Mapping[str, Structure]) -> dict[str, Structure]:
    """What update_metrics_state takes of a forward pass. batch: its request's parts. results: its own."""
    parts = {"labels": batch["batch_input.y"], **results}
    if "sample_weight" in batch:
        parts["sample_weight"] = batch["sample_weight"]
    return parts
