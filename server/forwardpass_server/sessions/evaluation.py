"""Evaluations: a stream of batches, run under one or several sets of weights, each with a session for its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator, Sequence

from forwardpass.wire import errors
from forwardpass.wire.description import ModelIdentity
from forwardpass.wire.functions import SAMPLE_WEIGHT, Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls import ids
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.evaluation_steps import MAX_BATCHES, EvaluationSteps, State, StepPlan
from forwardpass_server.calls.execution import Executor, Invocation, flattened
from forwardpass_server.calls.ordered_batches import Batch, OrderedBatches
from forwardpass_server.calls.plans import Servable
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

    def __init__(
        self,
        sessions: Sessions,
        weights: WeightStore,
        executor: Executor,
        steps: EvaluationSteps,
        admission: Admission,
    ) -> None:
        self._sessions = sessions
        self._weights = weights
        self._executor = executor
        self._steps = steps
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
                _Target(self._executor, self._steps, self._weights, session, principal, writer_id, training, weights_id)
                for session, (_, weights_id) in zip(found, targets, strict=True)
            ]
            batches = OrderedBatches(lanes, self._admission, principal)
            try:
                yield Evaluation(found[0].servable.identity, batches)
            finally:
                await batches.end()


class _Target:
    """A lane of the batches: one set of weights, and the session that counts the batches which it is tried on.

    weights: the leaves of the set. Used on one event loop only.
    """

    def __init__(
        self,
        executor: Executor,
        steps: EvaluationSteps,
        store: WeightStore,
        session: Session,
        principal: str,
        writer_id: bytes,
        training: bool,
        weights_id: bytes,
    ) -> None:
        self._executor = executor
        self._steps = steps
        self._store = store
        self._session = session
        self._principal = principal
        self._writer_id = writer_id
        self._training = training
        self._weights_id = weights_id
        # The last batch of those that failed together: each of them is run by itself.
        self._alone_to = 0
        self._joins = 1
        # The state after the last batches, which may not be stored yet, and the group that it is of.
        self._state: State | None = None
        self._last_group: object = None

    @property
    def position(self) -> int:
        """The last batch that the session has counted."""
        return self._session.record.sequence(self._writer_id)

    @property
    def joins(self) -> int:
        """As many as it could have taken the last time."""
        return self._joins

    async def run(self, batches: Sequence[Batch]) -> tuple[int, Update]:
        """Runs the first batches. Returns how many, and the update that counts them."""
        weighted = SAMPLE_WEIGHT in batches[0].parts
        plan = None if self._training else self._steps.plan(self._session.servable, weighted)
        self._joins = 1
        if plan is None or batches[0].sequence <= self._alone_to:
            return 1, await self._run_alone(batches[0])
        kind = list(itertools.takewhile(lambda batch: (SAMPLE_WEIGHT in batch.parts) == weighted, batches))
        taken = kind[: plan.count([batch.size_bytes for batch in kind])]
        self._joins = plan.count([batches[0].size_bytes] * MAX_BATCHES)
        try:
            return len(taken), await self._run_together(plan, taken)
        except Exception:
            # Whatever it was, the batch that caused it fails again by itself, with its own error.
            self._alone_to = taken[-1].sequence
            return 1, await self._run_alone(batches[0])

    async def _run_together(self, plan: StepPlan, batches: Sequence[Batch]) -> Update:
        leaves = [await flattened(plan.inputs, batch.parts, ()) for batch in batches]
        if any(not all(leaf.shape[:1] != (0,) for leaf in batch) for batch in leaves):
            raise ValueError("a batch without rows has results whose shapes have to be corrected")
        size_bytes = sum(batch.size_bytes for batch in batches)
        session, group = self._session, object()
        before = self._state or plan.begun(session.record.state)

        async def run(state: State, first: int) -> State:
            async with self._store.use(self._principal, self._weights_id) as weights:
                placed = weights.leaves(session.servable.identity.content_hash, session.servable.spec.weights)
                return await self._steps.run(plan, placed, state, leaves[first:], size_bytes)

        async def apply(servable: Servable, state: Structure, applied: int) -> Structure:
            if state is before.structure and not applied:
                return after.structure
            # Another update of the session came between, or some of these batches were counted already.
            found = await run(plan.begun(state), applied)
            if self._last_group is group:
                self._state = found
            return found.structure

        after = await run(before, 0)
        self._state, self._last_group = after, group
        return Update([self._identity(batch) for batch in batches], apply)

    async def _run_alone(self, batch: Batch) -> Update:
        """Runs the forward pass of a batch, and then its update."""
        invocation = Invocation(
            Function.FORWARD_PASS,
            batch.parts,
            batch.size_bytes,
            self._training,
            self._weights_id,
            self._principal,
            is_alone=True,
        )
        results = await self._executor.run(self._session.servable, invocation)
        self._state = None
        parts = updates.update_parts(batch.parts, results)
        return updates.counting(self._executor, self._identity(batch), parts, batch.size_bytes)

    def _identity(self, batch: Batch) -> UpdateIdentity:
        assert batch.update_id is not None
        return UpdateIdentity(self._session.key.session_id, self._writer_id, batch.sequence, batch.update_id)

    def commit(self, result: Update) -> asyncio.Future[None]:
        """Submits the update: the session stores all updates that are submitted together in one commit."""
        return self._session.submit(result)
