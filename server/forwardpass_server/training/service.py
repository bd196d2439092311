"""Opens client updates: finds the model, its trainer and the weights, and makes room for the state."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Protocol

from forwardpass.wire import errors, limits
from forwardpass.wire.functions import Function
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.model import Leaf, TrainingOptions
from forwardpass_server.calls.ordered_batches import OrderedBatches
from forwardpass_server.calls.plans import Servable
from forwardpass_server.calls.scheduling import Estimates
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.training import starts
from forwardpass_server.training.preparation import Preparations
from forwardpass_server.training.starts import Start
from forwardpass_server.training.turns import Turns
from forwardpass_server.training.update import Job, Result, StepObserver, Update
from forwardpass_server.weights.store import WeightStore

# States may take this share of the bytes that admission limits. The rest is for batches and for calls: if states took
# all of it, no batch of any update could be admitted.
_STATES_SHARE = 2

FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
"""How an update ends: with a result, with an error of its own, or because its stream or the server ended."""


class TrainingObserver(StepObserver, Protocol):
    """Receives measurements of updates."""

    def training_ended(self, outcome: str) -> None:
        """An update has ended. outcome: FINISHED, FAILED or INTERRUPTED."""


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """One client update. batches: their parts are batch_input.x, batch_input.y, and maybe sample_weight."""

    update: Update
    batches: OrderedBatches[None]

    async def result(self) -> Result:
        """The result, after the last batch. Raises WeightStoreFull and OutOfMemory."""
        return await self.update.result()


class Trainings:
    """Opens client updates. Used on one event loop only."""

    def __init__(
        self,
        registry: Registry,
        weights: WeightStore,
        preparations: Preparations,
        turns: Turns,
        admission: Admission,
        observer: TrainingObserver,
    ) -> None:
        self._registry = registry
        self._weights = weights
        self._preparations = preparations
        self._turns = turns
        self._admission = admission
        self._observer = observer
        self._estimates: dict[tuple[bytes, TrainingOptions], Estimates] = {}
        self._states: collections.Counter[str] = collections.Counter()
        self._states_bytes = 0

    @property
    def states_bytes(self) -> int:
        """The size of the states of all updates that run. May be read on any thread."""
        return self._states_bytes

    @contextlib.asynccontextmanager
    async def begin(self, principal: str, start: Start) -> AsyncIterator[Training]:
        """A client update. Its weights stay on the device until it ends.

        Raises InvalidRequest, OptimizerNotSupported, FunctionNotAvailable, ModelNotFound, ModelLoading, ModelFailed,
        WeightsNotFound, WeightStoreFull, ServerOverloaded, OutOfMemory; StructureMismatch, DTypeMismatch and
        ShapeMismatch for weights and optimizer states that do not fit.
        """
        outcome = INTERRUPTED
        try:
            async with contextlib.AsyncExitStack() as stack:
                update = await self._open(stack, principal, start)
                batches = OrderedBatches([update], self._admission, principal)
                try:
                    yield Training(update, batches)
                finally:
                    await batches.end()
                    await update.end()
            outcome = FINISHED
        except errors.ServerUnavailable:
            raise
        except Exception:
            outcome = FAILED
            raise
        finally:
            self._observer.training_ended(outcome)

    async def _open(self, stack: contextlib.AsyncExitStack, principal: str, start: Start) -> Update:
        start.check()
        optimizer = starts.optimizer(start.optimizer, start.learning_rate)
        version = self._registry.asked_for(start.name, start.version, start.label)
        servable = self._registry.get(start.name, version)
        trainable = servable.spec.weights.child(0)
        options = TrainingOptions(
            optimizer=optimizer.text,
            weighted=start.weighted,
            proximal=start.proximal > 0,
            trainable=starts.mask(start.trainable, len(trainable.leaves)),
        )
        plan = servable.plan(Function.WEIGHTED_FORWARD_BACKWARD if start.weighted else Function.FORWARD_BACKWARD)
        if plan.unavailable:
            raise errors.FunctionNotAvailable(f"training is not available: {plan.unavailable}")
        leaves = await self._weights_leaves(stack, principal, start.weights_id, servable)
        first = leaves
        if start.start_weights_id and options.proximal:
            first = await self._weights_leaves(stack, principal, start.start_weights_id, servable)
        trainer = await self._preparations.trainer(servable, options)
        stack.enter_context(self._admitted(principal, trainer.state_bytes))
        weights_bytes = sum(map(_size_of, servable.model.initial_weights))
        saved_bytes = max(trainer.state_bytes - weights_bytes, 0)
        room = stack.enter_context(self._weights.room(principal, weights_bytes))
        state_room = None
        if start.keep_optimizer_state:
            state_room = stack.enter_context(self._weights.room(principal, saved_bytes))
        if start.checkpoint_steps:
            # A store that has no room for a checkpoint refuses the update before its first step.
            with self._weights.room(principal, weights_bytes + saved_bytes):
                pass
        if start.optimizer_state_id:
            saved = await stack.enter_async_context(self._weights.use(principal, start.optimizer_state_id))
            # Some 20 calls for each leaf: on a thread.
            state_leaves = await asyncio.to_thread(saved.fit, trainer.state_spec, "optimizer_state")
            with_totals = start.checkpoint_sequence > 0
            state = await asyncio.to_thread(trainer.restored, leaves, state_leaves, with_totals=with_totals)
        else:
            state = await asyncio.to_thread(trainer.begin, leaves)
        job = Job(
            servable=servable,
            principal=principal,
            trainer=trainer,
            plan=plan,
            estimates=self._estimates_of(servable, options),
            learning_rate=optimizer.learning_rate,
            proximal=start.proximal,
            start=first[: len(trainable.leaves)],
            checkpoint_steps=start.checkpoint_steps,
            room=room,
            state_room=state_room,
        )
        return Update(job, state, start.checkpoint_sequence, self._turns, self._weights, self._observer)

    async def _weights_leaves(
        self, stack: contextlib.AsyncExitStack, principal: str, weights_id: bytes, servable: Servable
    ) -> Sequence[Leaf]:
        weights = await stack.enter_async_context(self._weights.use(principal, weights_id))
        fit = functools.partial(weights.leaves, servable.identity.content_hash, servable.spec.weights)
        if len(servable.spec.weights.leaves) > limits.SMALL_LEAVES:
            return await asyncio.to_thread(fit)
        return fit()

    @contextlib.contextmanager
    def _admitted(self, principal: str, size_bytes: int) -> Iterator[None]:
        """Admits a state for the duration of the context. Raises ServerOverloaded and OutOfMemory."""
        most = self._admission.limit_bytes // _STATES_SHARE
        own_most = self._admission.principal_limit_bytes // _STATES_SHARE
        if size_bytes > own_most:
            raise errors.OutOfMemory(
                place="the state of this training",
                expected=f"at most {own_most} bytes (half of the server's --max-concurrent-mib)",
                found=f"{size_bytes}",
            )
        if self._states_bytes + size_bytes > most or self._states[principal] + size_bytes > own_most:
            raise errors.ServerOverloaded(
                place="states of trainings",
                expected=f"at most {own_most} bytes at once",
                found="more",
                retry_after_s=0.5,
            )
        with self._admission.admitted_state(principal, size_bytes):
            self._states[principal] += size_bytes
            self._states_bytes += size_bytes
            try:
                yield
            finally:
                self._states_bytes -= size_bytes
                self._states[principal] -= size_bytes
                if not self._states[principal]:
                    del self._states[principal]

    def _estimates_of(self, servable: Servable, options: TrainingOptions) -> Estimates:
        """The estimates of the steps of a trainer. Drops those of unloaded models."""
        key = servable.identity.content_hash, options
        estimates = self._estimates.get(key)
        if estimates is None:
            served = {one.servable.identity.content_hash for one in self._registry.entries() if one.servable}
            self._estimates = {known: value for known, value in self._estimates.items() if known[0] in served}
            has_loops = servable.model.has_loops(Function.FORWARD_PASS, training=True)
            estimates = self._estimates[key] = Estimates(has_loops)
        return estimates


def _size_of(array: object) -> int:
    size: int = array.nbytes  # type: ignore[attr-defined]
    return size
