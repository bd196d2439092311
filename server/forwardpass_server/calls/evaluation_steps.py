"""Runs batches of an evaluation: forward pass and update of the metrics for several of them in one computation."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

from forwardpass.wire import conform
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import SAMPLE_WEIGHT, Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.execution import CallObserver
from forwardpass_server.calls.model import Evaluator, Leaf
from forwardpass_server.calls.plans import Plan, Servable
from forwardpass_server.calls.scheduling import INLINE_S, CallTimes, Estimates, Scheduler

MAX_BATCHES = 8
"""The most batches of one computation. More gain little, and the client waits longer for their acknowledgement."""

# On a thread, a hand-over of 60 to 100 us is 2 % of this, and other computations do not wait longer for the thread.
_MAX_THREAD_S = 5e-3

# As for `scheduling.Estimates`: the fastest run counts, and a slower one raises the estimate a little.
_RISE = 1.05


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """A metrics state. leaves: on the device, or as arrays. structure: the same as arrays."""

    leaves: Sequence[Leaf]
    structure: Structure


class StepPlan:
    """How batches of one kind are run for one model. Used on one event loop only.

    weighted: whether they have sample weights.
    """

    def __init__(self, servable: Servable, evaluator: Evaluator, weighted: bool) -> None:
        update = Function.UPDATE_METRICS_STATE
        self.evaluator = evaluator
        self.functions = Function.FORWARD_PASS, update.with_sample_weight if weighted else update
        self.name = servable.identity.name
        self.inputs = _inputs(servable, *self.functions)
        self.estimates = Estimates(any(servable.model.has_loops(function, False) for function in self.functions))
        self._state = servable.spec.metrics_state
        self._has_loops = any(servable.model.has_loops(function, False) for function in self.functions)
        # Seconds of one batch, by the size of its message in powers of two.
        self._seconds: dict[int, float] = {}

    def begun(self, state: Structure) -> State:
        """The state of a session. Raises StructureMismatch, DTypeMismatch and ShapeMismatch."""
        return State(conform.check(state, self._state, "state"), state)

    def ended(self, leaves: Sequence[Leaf], arrays: Sequence[Array]) -> State:
        """The state after some batches."""
        return State(leaves, Structure(self._state.tree, arrays, self._state.data_types))

    def count(self, sizes: Sequence[int]) -> int:
        """How many of these batches, from the first on, one computation takes: at least one.

        sizes: of their messages, in bytes. Several fit into the time that may block the event loop, or into 5 ms.
        """
        total_s, inline, on_thread = 0.0, 0, 0
        for size_bytes in sizes[:MAX_BATCHES]:
            seconds = self._seconds.get(size_bytes.bit_length())
            if seconds is None:
                break
            total_s += seconds
            inline += total_s < INLINE_S and not self._has_loops
            on_thread += total_s < _MAX_THREAD_S
        if inline < 2:
            return max(on_thread, 1)
        joined = self.evaluator.joined
        return inline // joined * joined or inline

    def add(self, size_bytes: int, batches: int, seconds: float) -> None:
        """Adds a measured computation. size_bytes: of all its messages together."""
        bucket, each = (size_bytes // batches).bit_length(), seconds / batches
        self._seconds[bucket] = min(each, self._seconds.get(bucket, each) * _RISE)


class EvaluationSteps:
    """Runs batches of evaluations in groups. Used on one event loop only."""

    def __init__(self, scheduler: Scheduler, observer: CallObserver) -> None:
        self._scheduler = scheduler
        self._observer = observer
        self._plans: weakref.WeakKeyDictionary[Servable, dict[bool, StepPlan | None]] = weakref.WeakKeyDictionary()

    def plan(self, servable: Servable, weighted: bool) -> StepPlan | None:
        """The plan for batches of a model; None where the model has no evaluator for them."""
        plans = self._plans.setdefault(servable, {})
        if weighted not in plans:
            evaluator = servable.model.evaluator(weighted)
            plans[weighted] = None if evaluator is None else StepPlan(servable, evaluator, weighted)
        return plans[weighted]

    async def run(
        self,
        plan: StepPlan,
        weights: Sequence[Leaf],
        state: State,
        batches: Sequence[Sequence[Leaf]],
        size_bytes: int,
    ) -> State:
        """The state after these batches.

        weights: leaves of the model's weights. batches: for each the leaves that `plan.inputs` has checked.
        size_bytes: of all their messages together.
        Raises what the model raises, where any of the batches fails.
        """
        evaluator, times = plan.evaluator, CallTimes()

        def compute(batches: Sequence[Sequence[Leaf]]) -> tuple[Sequence[Leaf], list[Array]]:
            leaves = evaluator.step(weights, state.leaves, batches)
            return leaves, evaluator.arrays(leaves)

        found = await self._scheduler.run(compute, batches, plan.estimates, size_bytes, [times])
        plan.add(size_bytes, len(batches), times.ended - times.began)
        self._observe(plan, batches, times)
        return plan.ended(*found)

    def _observe(self, plan: StepPlan, batches: Sequence[Sequence[Leaf]], times: CallTimes) -> None:
        """Tells of two calls for each batch: that its forward pass and its update are one changes no metric."""
        observer, name = self._observer, plan.name
        for batch in batches:
            if batch and batch[0].ndim:
                observer.batch(name, Function.FORWARD_PASS, batch[0].shape[0])
            for function in plan.functions:
                observer.call_ran(name, function, times.arrived, times.began, times.ended)


def _inputs(servable: Servable, forward_pass: Function, update: Function) -> Plan:
    """The plan that checks x, y and sample weights at once."""
    whole, counted = servable.plan(forward_pass), servable.plan(update)
    sample_weight = [argument for argument in counted.arguments if argument.place == SAMPLE_WEIGHT]
    return dataclasses.replace(
        whole,
        arguments=(*whole.arguments, *sample_weight),
        shares_batch=whole.shares_batch or counted.shares_batch,
        is_small=whole.is_small and counted.is_small,
    )
