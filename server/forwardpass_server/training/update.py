"""One client update: a lane of ordered batches that runs an optimizer step for each."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Protocol

from forwardpass.wire import errors
from forwardpass.wire.description import ModelIdentity
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.execution import flattened
from forwardpass_server.calls.model import Leaf, Totals, Trainer
from forwardpass_server.calls.ordered_batches import Batch
from forwardpass_server.calls.plans import Plan, Servable
from forwardpass_server.calls.scheduling import Estimates
from forwardpass_server.training.turns import Turns
from forwardpass_server.weights.store import Room, WeightStore


class StepObserver(Protocol):
    """Receives measurements of steps."""

    def training_step(self, model: str, seconds: float) -> None:
        """A step has run. seconds: with the time that it waited for its turn."""


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state that an update can continue from. sequence: of the last batch that was trained on."""

    sequence: int
    weights_id: bytes
    optimizer_state_id: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """The result of an update. loss: the mean over all examples; 0.0 without examples.

    metrics: None for a model without metrics. optimizer_state_id: b"" where the caller does not want it.
    """

    weights_id: bytes
    loss: float
    num_examples: int
    num_steps: int
    metrics: Structure | None
    optimizer_state_id: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What an update needs. `start`: the leaves of the trainable weights of the proximal term.

    plan: of the function that takes the batches. room: that the store keeps for the trained weights. state_room: that
    it keeps for the state of the optimizer; None where the caller does not want it.
    """

    servable: Servable
    principal: str
    trainer: Trainer
    plan: Plan
    estimates: Estimates
    learning_rate: float
    proximal: float
    start: Sequence[Leaf]
    checkpoint_steps: int
    room: Room
    state_room: Room | None


class Update:
    """A lane of ordered batches: see `calls.ordered_batches.Lane`. Used on one event loop only.

    position: the last batch that `state` was trained on.
    """

    def __init__(
        self,
        job: Job,
        state: Sequence[Leaf],
        position: int,
        turns: Turns,
        weights: WeightStore,
        observer: StepObserver,
    ) -> None:
        self._job = job
        self._state = state
        self._position = position
        self._turns = turns
        self._weights = weights
        self._observer = observer
        self._checkpoints: list[Checkpoint] = []
        self._last_checkpoint: Checkpoint | None = None
        # Of the sets of the last checkpoint.
        self._pins = contextlib.AsyncExitStack()

    @property
    def identity(self) -> ModelIdentity:
        """The identity of the model."""
        return self._job.servable.identity

    @property
    def position(self) -> int:
        """The number of the last batch that was trained on."""
        return self._position

    @property
    def joins(self) -> int:
        """See `calls.ordered_batches.Lane.joins`."""
        return 1

    async def run(self, batches: Sequence[Batch]) -> tuple[int, None]:
        """Trains on the first batch, and publishes a checkpoint where one is due.

        Raises StructureMismatch, DTypeMismatch, ShapeMismatch, ModelRefusedInput, OutOfMemory, WeightStoreFull.
        """
        await self._train(batches[0])
        return 1, None

    async def _train(self, batch: Batch) -> None:
        job, arrived = self._job, time.perf_counter()
        if "sample_weight" in batch.parts and not job.plan.function.takes_sample_weight:
            raise errors.StructureMismatch(
                place="sample_weight", expected="None, as start.weighted says", found="sample weights"
            )
        leaves = await flattened(job.plan, batch.parts, ())
        step = functools.partial(_step, job, self._state)
        self._state = await self._turns.run(job.principal, step, leaves, job.estimates, batch.size_bytes)
        self._position = batch.sequence
        self._observer.training_step(job.servable.identity.name, time.perf_counter() - arrived)
        if job.checkpoint_steps and not batch.sequence % job.checkpoint_steps:
            await self._keep_checkpoint(batch.sequence)

    def commit(self, result: None) -> asyncio.Future[None]:
        """A future that is done: a step needs no commit."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def _keep_checkpoint(self, sequence: int) -> None:
        """Publishes the state. The store keeps it until the next checkpoint, or the end of the update."""
        checkpoint = Checkpoint(sequence, await self._add_weights(), await self._add_state())
        pins = contextlib.AsyncExitStack()
        for weights_id in (checkpoint.weights_id, checkpoint.optimizer_state_id):
            await pins.enter_async_context(self._weights.use(self._job.principal, weights_id))
        await self.end()
        self._supersede()
        self._pins, self._last_checkpoint = pins, checkpoint
        self._checkpoints.append(checkpoint)

    def _supersede(self) -> None:
        """Marks the last checkpoint as the first one to evict, because a newer one replaces it."""
        last = self._last_checkpoint
        if last is not None:
            for weights_id in (last.weights_id, last.optimizer_state_id):
                self._weights.evict_first(self._job.principal, weights_id)

    async def end(self) -> None:
        """Lets the store evict the last checkpoint. Call it at the end of the update, after a failure too."""
        await self._pins.aclose()

    def new_checkpoints(self) -> list[Checkpoint]:
        """The checkpoints since the last time."""
        checkpoints, self._checkpoints = self._checkpoints, []
        return checkpoints

    async def result(self) -> Result:
        """Publishes the trained weights, after the last batch. Raises WeightStoreFull and OutOfMemory."""
        job = self._job
        # On a GPU it waits for the last step.
        totals: Totals = await asyncio.to_thread(job.trainer.totals, self._state)
        self._supersede()
        weights_id = await self._add_weights(job.room)
        optimizer_state_id = b"" if job.state_room is None else await self._add_state(job.state_room)
        metrics = job.servable.spec.metrics
        return Result(
            weights_id,
            totals.loss / totals.num_examples if totals.num_examples else 0.0,
            totals.num_examples,
            totals.num_steps,
            Structure(metrics.tree, totals.metrics, metrics.data_types) if metrics.leaves else None,
            optimizer_state_id,
        )

    async def _add_weights(self, room: Room | None = None) -> bytes:
        tree = self._job.servable.spec.weights.tree
        return await self._weights.add(self._job.principal, tree, self._job.trainer.weights(self._state), room)

    async def _add_state(self, room: Room | None = None) -> bytes:
        trainer = self._job.trainer
        return await self._weights.add(self._job.principal, trainer.state_spec.tree, trainer.saved(self._state), room)


def _step(job: Job, state: Sequence[Leaf], batch: Sequence[Leaf]) -> Sequence[Leaf]:
    return job.trainer.step(state, batch, job.learning_rate, job.proximal, job.start)
