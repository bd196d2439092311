"""Runs batches of an evaluation: forward pass and update of the metrics for several of them in one computation."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import weakref
from collections.abc import Sequence

from forwardpass.wire import conform
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import SAMPLE_WEIGHT, Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.execution import CallObserver
from forwardpass_server.calls.model import CannotVectorize, Evaluator, Leaf, StackedEvaluator
from forwardpass_server.calls.plans import Plan, Servable
from forwardpass_server.calls.scheduling import INLINE_S, CallTimes, Estimates, Scheduler, smoothed
from forwardpass_server.process import background

_LOGGER = logging.getLogger(__name__)

MAX_BATCHES = 8
"""The most batches of one computation. More gain little, and the client waits longer for their acknowledgement."""

# On a thread, a hand-over of 60 to 100 us is 2 % of this, and other computations do not wait longer for the thread.
MAX_THREAD_S = 5e-3
"""The longest computation of several batches on a thread."""

# One computation for all sets of weights takes the place of several where it needs at most this share of their time. It
# is tried three times first: the first computation makes the kernels.
_WORTH = 0.9
_TRIALS = 3

# After the metrics of so many sets other tasks of the event loop get a turn. Those of a batch take some microseconds.
_SETS_PER_TURN = 16

# Of one plan: combinations of leaves, and numbers of sets and bytes.
_MAX_CHOICES = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """A metrics state. leaves: on the device, or as arrays. structure: the same as arrays."""

    leaves: Sequence[Leaf]
    structure: Structure


@dataclasses.dataclass(slots=True)
class Choice:
    """Whether batches run for each set of weights by itself, or for all at once: what was measured of one kind.

    Times are seconds of one batch for all sets; None if not known.
    """

    by_itself: float | None = None
    stacked: float | None = None
    trials: int = 0

    @property
    def is_stacked(self) -> bool:
        """Whether the next batches run for all sets at once: to try it, or because it is faster."""
        if self.by_itself is None:
            return False
        if self.trials < _TRIALS or self.stacked is None:
            return True
        return self.stacked <= _WORTH * self.by_itself

    def add(self, seconds: float, *, stacked: bool) -> None:
        """Adds a measured time."""
        if stacked:
            self.trials += 1
            self.stacked = smoothed(self.stacked, seconds)
        else:
            self.by_itself = smoothed(self.by_itself, seconds)


class StepPlan:
    """How batches of one kind are run for one model. Used on one event loop only.

    weighted: whether they have sample weights.
    """

    def __init__(self, servable: Servable, evaluator: Evaluator, weighted: bool) -> None:
        update = Function.UPDATE_METRICS_STATE
        self.evaluator = evaluator
        self.weighted = weighted
        self.functions = Function.FORWARD_PASS, update.with_sample_weight if weighted else update
        self.name = servable.identity.name
        self.inputs = _inputs(servable, *self.functions)
        self.estimates = Estimates(any(servable.model.has_loops(function, False) for function in self.functions))
        self._state = servable.spec.metrics_state
        self._has_loops = any(servable.model.has_loops(function, False) for function in self.functions)
        self.stacked: dict[tuple[bool, ...], StackedEvaluator | None] = {}
        self._choices: dict[tuple[tuple[bool, ...], int, int], Choice] = {}
        # Seconds of one batch, by the size of its message in powers of two.
        self._seconds: dict[int, float] = {}

    def choice(self, differing: tuple[bool, ...], sets: int, size_bytes: int) -> Choice:
        """What is known of batches of this size for so many sets. differing: see `LoadedModel.stack`."""
        if len(self._choices) > _MAX_CHOICES:
            self._choices.clear()
        return self._choices.setdefault((differing, sets.bit_length(), size_bytes.bit_length()), Choice())

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
            on_thread += total_s < MAX_THREAD_S
        if inline < 2:
            return max(on_thread, 1)
        joined = self.evaluator.joined
        return inline // joined * joined or inline

    def add(self, size_bytes: int, batches: int, seconds: float) -> None:
        """Adds a measured computation. size_bytes: of all its messages together."""
        bucket = (size_bytes // batches).bit_length()
        self._seconds[bucket] = smoothed(self._seconds.get(bucket), seconds / batches)


class EvaluationSteps:
    """Runs batches of evaluations in groups. Used on one event loop only."""

    def __init__(self, scheduler: Scheduler, observer: CallObserver) -> None:
        self._scheduler = scheduler
        self._observer = observer
        self._preparing: set[asyncio.Task[None]] = set()
        self._plans: weakref.WeakKeyDictionary[Servable, dict[bool, StepPlan | None]] = weakref.WeakKeyDictionary()

    def plan(self, servable: Servable, weighted: bool) -> StepPlan | None:
        """The plan for batches of a model; None where the model has no evaluator for them."""
        plans = self._plans.setdefault(servable, {})
        if weighted not in plans:
            evaluator = servable.model.evaluator(weighted)
            plans[weighted] = None if evaluator is None else StepPlan(servable, evaluator, weighted)
        return plans[weighted]

    def stacked(self, servable: Servable, plan: StepPlan, differing: tuple[bool, ...]) -> StackedEvaluator | None:
        """The evaluator for sets that differ in these leaves; None while it is prepared, and where it cannot be."""
        if differing not in plan.stacked:
            plan.stacked[differing] = None
            task = asyncio.ensure_future(self._prepare(servable, plan, differing))
            self._preparing.add(task)
            task.add_done_callback(self._preparing.discard)
        return plan.stacked[differing]

    async def _prepare(self, servable: Servable, plan: StepPlan, differing: tuple[bool, ...]) -> None:
        model = servable.model
        try:
            plan.stacked[differing] = await background.run(
                lambda: model.evaluator_of_stacks(plan.weighted, differing), "evaluator"
            )
        except CannotVectorize as error:
            _LOGGER.info("model %s: sets of weights are not evaluated together: %s", servable.identity, error)
        except Exception:  # The model's code, or TensorFlow.
            _LOGGER.warning("model %s: sets of weights are not evaluated together", servable.identity, exc_info=True)

    async def run_stacked(
        self,
        plan: StepPlan,
        evaluator: StackedEvaluator,
        weights: Sequence[Leaf],
        states: Sequence[Leaf],
        batches: Sequence[Sequence[Leaf]],
        size_bytes: int,
        estimates: Estimates,
    ) -> tuple[Sequence[Leaf], list[State], float]:
        """The states of all sets after these batches: their stack, and each.

        weights, states: stacks, of `StackedEvaluator.stack` and `StackedEvaluator.join`. estimates: of this kind.
        Returns the seconds of the computation too. Raises what the model raises, where any of the batches fails.
        """
        times = CallTimes()

        def compute(batches: Sequence[Sequence[Leaf]]) -> tuple[Sequence[Leaf], list[list[Array]]]:
            joined = evaluator.step(weights, states, batches)
            return joined, evaluator.split(joined)

        joined, arrays = await self._scheduler.run(compute, batches, estimates, size_bytes, [times])
        for index in range(1, len(arrays) + 1):
            self._observe(plan, batches, times)
            if not index % _SETS_PER_TURN:
                await asyncio.sleep(0)
        return joined, [plan.ended(leaves, leaves) for leaves in arrays], times.ended - times.began

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
