"""The operations on metric sessions: open, update, forward pass, merge, result, close."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from forwardpass.wire import conform, errors
from forwardpass.wire.functions import Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls import ids
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.execution import Executor, Invocation
from forwardpass_server.calls.ordered_batches import Reader
from forwardpass_server.calls.plans import Servable
from forwardpass_server.sessions import records as session_records
from forwardpass_server.sessions import retained_models as session_models
from forwardpass_server.sessions import updates
from forwardpass_server.sessions.cache import SessionCache
from forwardpass_server.sessions.records import Record, UpdateIdentity
from forwardpass_server.sessions.retained_models import SessionModels
from forwardpass_server.sessions.session import Session, SessionStorage
from forwardpass_server.sessions.store import SessionKey


async def _read_nothing() -> Mapping[str, Structure]:
    return {}


class Sessions:
    """The metric sessions of all principals. Used on one event loop only."""

    def __init__(
        self,
        storage: SessionStorage,
        models: SessionModels,
        cache: SessionCache,
        executor: Executor,
        admission: Admission,
    ) -> None:
        self._storage = storage
        self._store = storage.store
        self._models = models
        self._cache = cache
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
        """Opens a session of a model, or returns the open session of this id.

        version: 0 for the highest available version, or for the version that `label` names. Neither matters for a
        session that is open already: it keeps its version.
        resume: the session must exist already.
        read: decodes `initial_state`; if it is absent, the session starts with the model's initial metrics state.
        Raises ServerOverloaded, what `Registry.get` and `Registry.labelled` raise, FunctionNotAvailable,
        StructureMismatch, DTypeMismatch, ShapeMismatch, SessionLimitExceeded, SessionNotFound, SessionExpired,
        InvalidRequest for a session of another model.
        """
        ids.check(session_id, "session_id")
        key = SessionKey(principal, session_id)
        with self._admission.admitted(principal, size_bytes):
            if resume:
                session = await self._cache.load(key)
            else:
                servable = self._models.named(name, version, label)
                initial_state = (await read()).get("initial_state")
                opening = self._models.opening(servable.identity, self._create(key, servable, initial_state))
                # Not cancelled with the call: the store may have created the session by then.
                session = await asyncio.shield(opening)
        found = session.record.identity
        if found.name != name or version not in (0, found.version):
            raise errors.InvalidRequest(
                place="model", expected=f"{found}, that of the session", found=f"{name[:128]}/{version}"
            )
        return session

    async def _create(self, key: SessionKey, servable: Servable, initial_state: Structure | None) -> Session:
        record = Record(servable.identity, await self._initial_state(servable, initial_state))
        self._storage.check_state_size(record.state)
        tag = session_models.store_tag(servable.identity)
        return self._cache.put(key, await self._store.create(key, session_records.encode(record), tag))

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
        what a call of update_metrics_state raises. After SessionStoreUnavailable the batch may be counted or not.
        """
        with self._admission.admitted(principal, size_bytes):
            session = await self._find(principal, identity.session_id)
            await session.submit(updates.counting(self._executor, identity, await read(), size_bytes))
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

        read: decodes the invocation. without_predictions: leaves predictions and their mask out of the results.
        Returns the session and the results. Raises what `update` and a forward pass raise.
        """
        with self._admission.admitted(principal, size_bytes):
            session = await self._find(principal, identity.session_id)
            recorded = await session.recorded_outcome(identity)
            if recorded:
                return session, session_records.decode_outcome(recorded)
            invocation = await read()
            results = await self._executor.run(session.servable, invocation)
            answer = dict(results)
            if without_predictions:
                del answer["batch_output.predictions"]
                answer.pop("batch_output.prediction_mask", None)
            parts = updates.update_parts(invocation.parts, results)
            outcome = session_records.encode_outcome(answer)
            await session.submit(updates.counting(self._executor, identity, parts, size_bytes, outcome))
        return session, answer

    async def merge(
        self,
        principal: str,
        identity: UpdateIdentity,
        other_session_id: bytes,
        read: Reader,
        size_bytes: int,
    ) -> Session:
        """Adds a metrics state to that of a session.

        read: decodes `state`; if it is absent, the state of the other session is added.
        Raises FunctionNotAvailable for a model whose states cannot be added, and what `update` raises.
        """
        with self._admission.admitted(principal, size_bytes):
            session = await self._find(principal, identity.session_id)
            added = (await read()).get("state") or await self._state_of(principal, other_session_id, session)
            await session.submit(updates.adding(session, identity, added))
        return session

    async def _state_of(self, principal: str, session_id: bytes, into: Session) -> Structure:
        """The state of the session that is to be merged into another one."""
        ids.check(session_id, "other_session_id")
        other = await self.get(principal, session_id)
        if other.key == into.key or other.record.identity != into.record.identity:
            raise errors.InvalidRequest(
                place="other_session_id",
                expected=f"another session of {into.record.identity}",
                found="the same session" if other.key == into.key else f"one of {other.record.identity}",
            )
        return other.record.state

    async def get(self, principal: str, session_id: bytes) -> Session:
        """A session with all updates that were acknowledged. Raises SessionNotFound, SessionExpired."""
        ids.check(session_id, "session_id")
        return await self._cache.load(SessionKey(principal, session_id))

    async def result(self, principal: str, session_id: bytes) -> tuple[Session, Structure]:
        """The metrics of a session so far. Raises SessionNotFound, SessionExpired, ServerOverloaded."""
        session = await self.get(principal, session_id)
        invocation = Invocation(Function.FINALIZE_METRICS, {"state": session.record.state}, 0)
        with self._admission.admitted(principal, 0):
            return session, (await self._executor.run(session.servable, invocation))["metrics"]

    async def close(self, principal: str, session_id: bytes) -> None:
        """Deletes a session. That it does not exist is no error."""
        ids.check(session_id, "session_id")
        key = SessionKey(principal, session_id)
        await self._store.delete(key)
        self._cache.remove(key)

    async def _find(self, principal: str, session_id: bytes) -> Session:
        """The session that an update is for. It need not be current: each commit checks the stored version.

        Raises SessionNotFound, SessionExpired.
        """
        key = SessionKey(principal, session_id)
        # Where the store is not shared, `load` only marks a cached session as used in the store, and reads nothing.
        session = self._cache.find(key) if self._store.is_shared else None
        return session or await self._cache.load(key)
