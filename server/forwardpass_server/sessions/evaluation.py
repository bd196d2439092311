"""Evaluations: a stream of batches, run under one or several sets of weights, each with a session for its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import operator
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from forwardpass.wire import errors
from forwardpass.wire.description import ModelIdentity
from forwardpass.wire.functions import SAMPLE_WEIGHT, Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls import ids
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.evaluation_steps import (
    MAX_BATCHES,
    MAX_THREAD_S,
    Choice,
    EvaluationSteps,
    State,
    StepPlan,
)
from forwardpass_server.calls.execution import Executor, Invocation, flattened
from forwardpass_server.calls.model import Leaf, StackedEvaluator
from forwardpass_server.calls.ordered_batches import Batch, Lane, OrderedBatches
from forwardpass_server.calls.plans import Servable
from forwardpass_server.calls.scheduling import Estimates
from forwardpass_server.sessions import updates
from forwardpass_server.sessions.records import UpdateIdentity
from forwardpass_server.sessions.service import Sessions
from forwardpass_server.sessions.session import Session, Update
from forwardpass_server.weights import stacks
from forwardpass_server.weights.stacks import FittedWeights
from forwardpass_server.weights.stacks import Key as StackKey
from forwardpass_server.weights.store import WeightSet, WeightStore

# Short computations run on the event loop, one for each target: after so many, other tasks of the loop get a turn.
_TARGETS_PER_TURN = 8

# An update takes some microseconds to make.
_UPDATES_PER_TURN = 64

MAX_TARGETS = 1024
"""The limit of one evaluation. Each target takes a task, and weights that stay on the device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation. identity: of the model. batches: their parts are batch_input.x, batch_input.y, and maybe
    sample_weight.
    """

    identity: ModelIdentity
    batches: OrderedBatches[Any]


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
        self.sessions = sessions
        self._weights = weights
        self._executor = executor
        self._steps = steps
        self._admission = admission

    @contextlib.asynccontextmanager
    async def begin(
        self,
        principal: str,
        writer_id: bytes,
        training: bool,
        targets: Sequence[tuple[bytes, bytes]],
        allow_rounding: bool = False,
    ) -> AsyncIterator[Evaluation]:
        """An evaluation. Its weights stay on the device until it ends.

        targets: pairs of a session's id and a weights id. writer_id: of the updates of each session.
        allow_rounding: several sets of weights may run as one computation where this changes the last bits.
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
                session = await self.sessions.get(principal, session_id)
                if session.servable.identity != (found or [session])[0].servable.identity:
                    raise errors.InvalidRequest(
                        place="start.targets",
                        expected=f"sessions of one model, {found[0].servable.identity}",
                        found=f"one of {session.servable.identity}",
                    )
                found.append(session)
                weights = await stack.enter_async_context(self._weights.use(principal, weights_id))
                weights.leaves(session.servable.identity.content_hash, session.servable.spec.weights)
            targets_of_evaluation = [
                _Target(self._executor, self._steps, self._weights, session, principal, writer_id, training, weights_id)
                for session, (_, weights_id) in zip(found, targets, strict=True)
            ]
            lanes: Sequence[Lane[Any]] = targets_of_evaluation
            if len(lanes) > 1 and not training and len({lane.position for lane in lanes}) == 1:
                lanes = [_Group(targets_of_evaluation, self._steps, self._weights, allow_rounding)]
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
        self.session = session
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
        return self.session.record.sequence(self._writer_id)

    @property
    def joins(self) -> int:
        """As many as it could have taken the last time."""
        return self._joins

    async def run(self, batches: Sequence[Batch]) -> tuple[int, Update]:
        """Runs the first batches. Returns how many, and the update that counts them."""
        weighted = SAMPLE_WEIGHT in batches[0].parts
        plan = None if self._training else self._steps.plan(self.session.servable, weighted)
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

    async def run_all(self, batches: Sequence[Batch]) -> Update:
        """Runs all these batches, of which all or none have sample weights. Returns the update that counts them.

        Raises what the first of them raises that fails, or another error where there are several.
        """
        plan = self._steps.plan(self.session.servable, SAMPLE_WEIGHT in batches[0].parts)
        if len(batches) > 1 and plan is not None:
            return await self._run_together(plan, batches)
        _, update = await self.run(batches)
        return update

    async def _run_together(self, plan: StepPlan, batches: Sequence[Batch]) -> Update:
        leaves, before = await checked(plan, batches), self.state(plan)
        return self.counted(plan, batches, leaves, before, await self._step(plan, batches, leaves, before))

    async def _step(
        self, plan: StepPlan, batches: Sequence[Batch], leaves: Sequence[Sequence[Leaf]], state: State
    ) -> State:
        size_bytes = sum(batch.size_bytes for batch in batches)
        async with self._store.use(self._principal, self._weights_id) as weights:
            return await self._steps.run(plan, self._fitted(weights), state, leaves, size_bytes)

    def _fitted(self, weights: WeightSet) -> FittedWeights:
        servable = self.session.servable
        return weights.leaves(servable.identity.content_hash, servable.spec.weights)

    def state(self, plan: StepPlan) -> State:
        """The state that the next batches start from. It may not be stored yet."""
        return self._state or plan.begun(self.session.record.state)

    def counted(
        self,
        plan: StepPlan,
        batches: Sequence[Batch],
        leaves: Sequence[Sequence[Leaf]],
        before: State,
        after: State,
    ) -> Update:
        """The update that counts batches. leaves: of `checked`. after: the state that they led to from `before`."""
        group = object()

        async def apply(servable: Servable, state: Structure, applied: int) -> Structure:
            if state is before.structure and not applied:
                return after.structure
            # Another update of the session came between, or some of these batches were counted already.
            found = await self._step(plan, batches[applied:], leaves[applied:], plan.begun(state))
            if self._last_group is group:
                self._state = found
            return found.structure

        self._state, self._last_group = after, group
        return Update([self._identity(batch) for batch in batches], apply)

    def holds_weights(self) -> FittedWeights | None:
        """The weights; None if they are not on the device, or were deleted."""
        weights = self._store.acquire(self._principal, self._weights_id)
        if weights is None:
            return None
        try:
            return self._fitted(weights)
        finally:
            # The evaluation itself keeps them on the device.
            self._store.release(self._principal, self._weights_id, weights)

    def forget(self) -> None:
        """Forgets a state that no update will store: the next batches start from that of the session."""
        self._state = self._last_group = None

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
        results = await self._executor.run(self.session.servable, invocation)
        self._state = None
        parts = updates.update_parts(batch.parts, results)
        return updates.counting(self._executor, self._identity(batch), parts, batch.size_bytes)

    def _identity(self, batch: Batch) -> UpdateIdentity:
        assert batch.update_id is not None
        return UpdateIdentity(self.session.key.session_id, self._writer_id, batch.sequence, batch.update_id)

    def commit(self, result: Update) -> asyncio.Future[None]:
        """Submits the update: the session stores all updates that are submitted together in one commit."""
        return self.session.submit(result)


class _Group:
    """A lane of the batches: several targets at the same position, which run them together where that is faster.

    allow_rounding: it may change the last bits. Used on one event loop only.
    """

    def __init__(
        self, targets: Sequence[_Target], steps: EvaluationSteps, store: WeightStore, allow_rounding: bool
    ) -> None:
        self._targets = targets
        self._steps = steps
        self._store = store
        self._servable = targets[0].session.servable
        self._allow_rounding = allow_rounding or self._servable.model.description.vectorization.allows_rounding
        # The last batch of those that failed together: each of them is run by itself.
        self._alone_to = 0
        self._joins = 1
        # One computation for all sets has failed, and the targets run by themselves from then on.
        self._has_failed = False
        self._differing: tuple[StackKey, tuple[bool, ...]] | None = None
        self._weights: tuple[StackKey, Sequence[Leaf]] | None = None
        # The states that a stack was made of, or that it was split into, and the stack.
        self._states: tuple[Sequence[State], Sequence[Leaf]] | None = None
        self._estimates: dict[bool, Estimates] = {False: Estimates(), True: Estimates()}

    @property
    def position(self) -> int:
        """The last batch that every session has counted."""
        return min(target.position for target in self._targets)

    @property
    def joins(self) -> int:
        """As many as it could have taken the last time."""
        return self._joins

    async def run(self, batches: Sequence[Batch]) -> tuple[int, list[Update]]:
        """Runs the first batches. Returns how many, and for each target the update that counts them."""
        weighted = SAMPLE_WEIGHT in batches[0].parts
        plan = self._steps.plan(self._servable, weighted)
        self._joins = 1
        if plan is None or batches[0].sequence <= self._alone_to:
            return 1, await self._by_itself(batches[:1])
        kind = list(itertools.takewhile(lambda batch: (SAMPLE_WEIGHT in batch.parts) == weighted, batches))
        sizes, sets = [batch.size_bytes for batch in kind], [target.holds_weights() for target in self._targets]
        together = self._together(plan, sets, sizes[0])
        if together is None:
            taken, choice = kind[: plan.count(sizes)], None
        else:
            evaluator, choice = together
            taken = kind[: _count(choice.stacked) if choice.is_stacked else plan.count(sizes)]
        self._joins = len(taken)
        try:
            if choice is not None and choice.is_stacked:
                return len(taken), await self._stacked(plan, evaluator, choice, [one for one in sets if one], taken)
            began = time.perf_counter()
            updates = await self._by_itself(taken)
            if choice is not None:
                choice.add((time.perf_counter() - began) / len(taken), stacked=False)
            return len(taken), updates
        except Exception:
            # Whatever it was, the batch that caused it fails again by itself, with its own error.
            for target in self._targets:
                target.forget()
            if choice is not None and choice.is_stacked:
                self._has_failed = True
            elif len(taken) == 1:
                raise
            self._alone_to = taken[-1].sequence
            return 1, await self._by_itself(batches[:1])

    def _together(
        self, plan: StepPlan, sets: Sequence[FittedWeights | None], size_bytes: int
    ) -> tuple[StackedEvaluator, Choice] | None:
        """What may run all sets at once, and what is known of its speed; None where the sets must run by themselves."""
        known = [one for one in sets if one is not None]
        if len(known) < len(sets):
            return None
        key = stacks.key_of(known)
        if self._differing is None or self._differing[0] != key:
            self._differing = key, stacks.differing(known)
        differing = self._differing[1]
        if self._has_failed or not any(differing) or not self._store.may_stack(stacks.copied_bytes(known, differing)):
            return None
        evaluator = self._steps.stacked(self._servable, plan, differing)
        if evaluator is None or not (self._allow_rounding or self._is_exact(evaluator)):
            return None
        return evaluator, plan.choice(differing, len(known), size_bytes)

    def _is_exact(self, evaluator: StackedEvaluator) -> bool:
        """Whether the bits are those of single calls.

        A metric may hide differences of the predictions: an accuracy changes only where two of them are nearly equal.
        """
        vectorization = self._servable.model.description.vectorization
        return not (evaluator.difference or vectorization.largest_difference or vectorization.unavailable_reason)

    async def _stacked(
        self,
        plan: StepPlan,
        evaluator: StackedEvaluator,
        choice: Choice,
        sets: Sequence[FittedWeights],
        batches: Sequence[Batch],
    ) -> list[Update]:
        leaves = await checked(plan, batches)
        befores = [target.state(plan) for target in self._targets]
        if self._states is not None and all(map(operator.is_, self._states[0], befores)):
            states = self._states[1]
        else:
            states = evaluator.join([before.leaves for before in befores])
        key = stacks.key_of(sets)
        if self._weights is None or self._weights[0] != key:
            stack = self._store.stack_of(key)
            if stack is None:
                stack = await asyncio.to_thread(evaluator.stack, sets)
                assert self._differing is not None
                self._store.keep_stack(key, stack, stacks.copied_bytes(sets, self._differing[1]))
            self._weights = key, stack
        size_bytes = sum(batch.size_bytes for batch in batches)
        joined, afters, seconds = await self._steps.run_stacked(
            plan, evaluator, self._weights[1], states, leaves, size_bytes, self._estimates[plan.weighted]
        )
        choice.add(seconds / len(batches), stacked=True)
        self._states = afters, joined
        counted = []
        for target, before, after in zip(self._targets, befores, afters, strict=True):
            counted.append(target.counted(plan, batches, leaves, before, after))
            if not len(counted) % _UPDATES_PER_TURN:
                await asyncio.sleep(0)
        return counted

    async def _by_itself(self, batches: Sequence[Batch]) -> list[Update]:
        """Runs each target by itself. Raises what the first one raises that fails."""
        counted: list[Update] = []
        for start in range(0, len(self._targets), _TARGETS_PER_TURN):
            targets = self._targets[start : start + _TARGETS_PER_TURN]
            # Waits for all: a target must not run two groups of batches at once.
            found = await asyncio.gather(*(target.run_all(batches) for target in targets), return_exceptions=True)
            for one in found:
                if isinstance(one, BaseException):
                    raise one
                counted.append(one)
        return counted

    def commit(self, result: list[Update]) -> asyncio.Future[Any]:
        """Submits the updates of all targets. The future fails where one of them cannot be stored."""
        return asyncio.gather(*(target.commit(update) for target, update in zip(self._targets, result, strict=True)))


async def checked(plan: StepPlan, batches: Sequence[Batch]) -> list[list[Leaf]]:
    """The leaves of batches that run together. Raises ValueError for one without rows, and what `flattened` raises."""
    leaves = [await flattened(plan.inputs, batch.parts, ()) for batch in batches]
    if any(leaf.shape[:1] == (0,) for batch in leaves for leaf in batch):
        raise ValueError("a batch without rows has results whose shapes have to be corrected")
    return leaves


def _count(each_s: float | None) -> int:
    """How many batches a group takes at once, each of which takes so long."""
    return 1 if not each_s else max(1, min(MAX_BATCHES, int(MAX_THREAD_S / each_s)))
