"""Metric sessions: states that the server holds, each update applied once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import numpy as np

from forwardpass.wire import conform, errors
from forwardpass.wire.description import Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.execution import Executor, Invocation
from forwardpass_server.calls.plans import Servable
from forwardpass_server.sessions import records as session_records
from forwardpass_server.sessions import retained_models as session_models
from forwardpass_server.sessions.cache import KnownSessions
from forwardpass_server.sessions.commits import SessionCommits
from forwardpass_server.sessions.records import Record, UpdateIdentity, check_id
from forwardpass_server.sessions.retained_models import SessionModels
from forwardpass_server.sessions.session import Session, Update
from forwardpass_server.sessions.store import SessionKey, SessionStore

Reader = Callable[[], Awaitable[Mapping[str, Structure]]]
"""Decodes the structures of a request, named as in its message. Called once the request is admitted."""


async def _read_nothing() -> Mapping[str, Structure]:
    return {}


class Sessions:
    """The sessions of all principals, and what is asked of them. Used on one event loop alone."""

    def __init__(
        self,
        store: SessionStore,
        models: SessionModels,
        known: KnownSessions,
        commits: SessionCommits,
        executor: Executor,
        admission: Admission,
    ) -> None:
        self._store = store
        self._models = models
        self._known = known
        self._commits = commits
        self._executor = executor
        self._admission = admission

    async def open(
        self,
        principal: str,
        session_id: bytes,
        name: str,
        version: int,
        label: str = "",
        *,
        resume: bool = False,
        read: Reader = _read_nothing,
        size_bytes: int = 0,
    ) -> Session:
        """Opens a session of a model, or finds one that is open.

        version: 0 for the highest that is available, or for the one that `label` stands for. A session that is open is
        found whatever those are by now.
        resume: the session must be there already. read: decodes `initial_state`, which is absent for the state before
        the first batch.
        Raises ServerOverloaded, what `Registry.get` and `Registry.labelled` raise, FunctionNotAvailable,
        StructureMismatch, DTypeMismatch, ShapeMismatch, SessionLimitExceeded, SessionNotFound, SessionExpired,
        InvalidRequest for a session of another model.
        """
        check_id(session_id, "session_id")
        key = SessionKey(principal, session_id)
        with self._admission.admitted(principal, size_bytes):
            if resume:
                session = await self._known.load(key)
            else:
                servable = self._models.named(name, version, label)
                initial_state = (await read()).get("initial_state")
                making = self._models.opening(servable.identity, self._make(key, servable, initial_state))
                # Goes on where nobody waits for it: the store may have it by then.
                session = await asyncio.shield(making)
        found = session.record.identity
        if found.name != name or version not in (0, found.version):
            raise errors.InvalidRequest(
                place="model", expected=f"{found}, that of the session", found=f"{name[:128]}/{version}"
            )
        return session

    async def _make(self, key: SessionKey, servable: Servable, initial_state: Structure | None) -> Session:
        record = Record(servable.identity, await self._initial_state(servable, initial_state))
        self._commits.check_size(record.state)
        word = session_models.word(servable.identity)
        return self._known.keep(key, await self._store.create(key, session_records.encode(record), word))

    async def _initial_state(self, servable: Servable, state: Structure | None) -> Structure:
        function = Function.INITIALIZE_METRICS_STATE
        if state is None or servable.plan(function).unavailable:
            results = await self._executor.run(servable, Invocation(function, {}, 0))
            return results["state"]
        spec = servable.spec.metrics_state
        return Structure(spec.tree, conform.check(state, spec, "initial_state"))

    async def update(self, principal: str, identity: UpdateIdentity, read: Reader, size_bytes: int) -> Session:
        """Counts one batch. read: decodes labels, the fields of a batch output, and maybe sample_weight.

        Raises SequenceMismatch, SessionNotFound, SessionExpired, SessionLimitExceeded, SessionStoreUnavailable, and
        what a call of update_metrics_state raises. After SessionStoreUnavailable the update may have counted.
        """
        with self._admission.admitted(principal, size_bytes):
            session = await self.find(principal, identity.session_id)
            await self.submit(session, self.counting(identity, await read(), size_bytes))
        return session

    async def forward_pass(
        self,
        principal: str,
        identity: UpdateIdentity,
        read: Callable[[], Awaitable[Invocation]],
        size_bytes: int,
        without_predictions: bool,
    ) -> tuple[Session, dict[str, Structure]]:
        """Runs a forward pass and counts its batch.

        read: decodes the invocation.

        Returns the results, without the predictions on request. Raises what `update` and a forward pass raise.
        """
        with self._admission.admitted(principal, size_bytes):
            session = await self.find(principal, identity.session_id)
            recorded = await self._commits.recorded(session, identity)
            if recorded:
                return session, session_records.decode_outcome(recorded)
            invocation = await read()
            results = await self._executor.run(session.servable, invocation)
            answer = dict(results)
            if without_predictions:
                del answer["batch_output.predictions"]
                answer.pop("batch_output.prediction_mask", None)
            parts = update_parts(invocation.parts, results)
            update = self.counting(identity, parts, size_bytes, session_records.encode_outcome(answer))
            await self.submit(session, update)
        return session, answer

    async def merge(
        self,
        principal: str,
        identity: UpdateIdentity,
        other_session_id: bytes,
        read: Reader,
        size_bytes: int,
    ) -> Session:
        """Adds a state to that of a session: the `state` that `read` decodes, or else that of another session.

        Raises FunctionNotAvailable for a model whose states cannot be added, and what `update` raises.
        """
        with self._admission.admitted(principal, size_bytes):
            session = await self.find(principal, identity.session_id)
            added = (await read()).get("state") or await self._state_of(principal, other_session_id, session)
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
        return await self._known.load(SessionKey(principal, session_id))

    async def result(self, principal: str, session_id: bytes) -> tuple[Session, Structure]:
        """The metrics of a session so far. Raises SessionNotFound, SessionExpired, ServerOverloaded."""
        session = await self.get(principal, session_id)
        invocation = Invocation(Function.FINALIZE_METRICS, {"state": session.record.state}, 0)
        with self._admission.admitted(principal, 0):
            return session, (await self._executor.run(session.servable, invocation))["metrics"]

    async def close(self, principal: str, session_id: bytes) -> None:
        """Ends a session. That it is not there is no error."""
        check_id(session_id, "session_id")
        key = SessionKey(principal, session_id)
        await self._store.delete(key)
        self._known.forget(key)

    async def find(self, principal: str, session_id: bytes) -> Session:
        """A session to be updated: another server may have updated it since. Raises SessionNotFound, SessionExpired."""
        key = SessionKey(principal, session_id)
        # Of a store that nobody shares it takes little to look.
        session = self._known.find(key) if self._store.is_shared else None
        return session or await self._known.load(key)

    def counting(
        self, identity: UpdateIdentity, parts: Mapping[str, Structure], size_bytes: int, outcome: bytes = b""
    ) -> Update:
        """The update that counts one batch. parts: as of `update`."""
        weighted = "sample_weight" in parts
        function = Function.WEIGHTED_UPDATE_METRICS_STATE if weighted else Function.UPDATE_METRICS_STATE

        async def count(servable: Servable, state: Structure) -> Structure:
            invocation = Invocation(function, {**parts, "state": state}, size_bytes)
            return (await self._executor.run(servable, invocation))["state"]

        return Update(identity, count, outcome)

    def submit(self, session: Session, update: Update) -> asyncio.Future[None]:
        """See `SessionCommits.submit`."""
        return self._commits.submit(session, update)


def update_parts(batch: Mapping[str, Structure], results: Mapping[str, Structure]) -> dict[str, Structure]:
    """What update_metrics_state takes of a forward pass. batch: its request's parts. results: its own."""
    parts = {"labels": batch["batch_input.y"], **results}
    if "sample_weight" in batch:
        parts["sample_weight"] = batch["sample_weight"]
    return parts
