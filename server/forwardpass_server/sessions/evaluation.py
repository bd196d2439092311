"""Evaluations: a stream of batches, run under one or several sets of weights, each with a session for its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

from forwardpass.wire import errors
from forwardpass.wire.description import ModelIdentity
from forwardpass.wire.functions import Function
from forwardpass_server.calls import ids
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.execution import Executor, Invocation
from forwardpass_server.calls.ordered_batches import Batch, OrderedBatches
from forwardpass_server.sessions import updates
from forwardpass_server.sessions.records import UpdateIdentity
from forwardpass_server.sessions.service import Sessions
from forwardpass_server.sessions.session import Session, Update
from forwardpass_server.weights.store import WeightStore

MAX_TARGETS = 1024
"""The limit of one evaluation. Each target takes a task, and weights that stay on the device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation. identity: of the model. batches: their parts are batch_input.x, batch_input.y, and maybe
    sample_weight.
    """

    identity: ModelIdentity
    batches: OrderedBatches[Update]


class Evaluations:
    """Opens evaluations."""

    def __init__(self, sessions: Sessions, weights: WeightStore, executor: Executor, admission: Admission) -> None:
        self._sessions = sessions
        self._weights = weights
        self._executor = executor
        self._admission = admission

    @contextlib.asynccontextmanager
    async def begin(
        self, principal: str, writer_id: bytes, training: bool, targets: Sequence[tuple[bytes, bytes]]
    ) -> AsyncIterator[Evaluation]:
        """An evaluation. Its weights stay on the device until it ends.

        targets: pairs of a session's id and a weights id. writer_id: of the updates of each session.
        Raises InvalidRequest, SessionNotFound, SessionExpired, WeightsNotFound, WeightStoreFull.
        """
        ids.check(writer_id, "start.writer_id")
        if not 1 <= len(targets) <= MAX_TARGETS:
            raise errors.InvalidRequest(place="start.targets", expected=f"1 to {MAX_TARGETS}", found=f"{len(targets)}")
        if len({session_id for session_id, _ in targets}) < len(targets):
            # A session counts each batch once, and so for one set of weights only.
            raise errors.InvalidRequest(
                place="start.targets", expected="a different session for each", found="the same session twice"
            )
        async with contextlib.AsyncExitStack() as stack:
            found: list[Session] = []
            for session_id, weights_id in targets:
                session = await self._sessions.get(principal, session_id)
                if session.servable.identity != (found or [session])[0].servable.identity:
                    raise errors.InvalidRequest(
                        place="start.targets",
                        expected=f"sessions of one model, {found[0].servable.identity}",
                        found=f"one of {session.servable.identity}",
                    )
                found.append(session)
                weights = await stack.enter_async_context(self._weights.use(principal, weights_id))
                weights.leaves(session.servable.identity.content_hash, session.servable.spec.weights)
            lanes = [
                _Target(self._executor, session, principal, writer_id, training, weights_id)
                for session, (_, weights_id) in zip(found, targets, strict=True)
            ]
            batches = OrderedBatches(lanes, self._admission, principal)
            try:
                yield Evaluation(found[0].servable.identity, batches)
            finally:
                await batches.end()


@dataclasses.dataclass(frozen=True, slots=True)
class _Target:
    """A lane of the batches: one set of weights, and the session that counts the batches which it is tried on."""

    executor: Executor
    session: Session
    principal: str
    writer_id: bytes
    training: bool
    weights_id: bytes

    @property
    def position(self) -> int:
        """The last batch that the session has counted."""
        return self.session.record.sequence(self.writer_id)

    async def run(self, batch: Batch) -> Update:
        """Runs the forward pass of a batch. Returns the update that counts it."""
        invocation = Invocation(
            Function.FORWARD_PASS,
            batch.parts,
            batch.size_bytes,
            self.training,
            self.weights_id,
            self.principal,
            is_alone=True,
        )
        results = await self.executor.run(self.session.servable, invocation)
        assert batch.update_id is not None
        identity = UpdateIdentity(self.session.key.session_id, self.writer_id, batch.sequence, batch.update_id)
        return updates.counting(self.executor, identity, updates.update_parts(batch.parts, results), batch.size_bytes)

    def commit(self, result: Update) -> asyncio.Future[None]:
        """Submits the update: the session stores all updates that are submitted together in one commit."""
        return self.session.submit(result)
