"""Runs one call of a model's function: admits it, checks its arguments, and computes its results."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass.wire.structures import Structure
from forwardpass.wire.trees import Kind, TreeDef
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.batching import Batcher
from forwardpass_server.calls.model import Leaf
from forwardpass_server.calls.plans import Plan, Servable
from forwardpass_server.calls.scheduling import CallTimes, Scheduler
from forwardpass_server.calls.vectorizing import Vectorizer
from forwardpass_server.weights.stacks import FittedWeights
from forwardpass_server.weights.store import WeightStore


class CallObserver(Protocol):
    """Receives measurements of each call."""

    def batch(self, model: str, function: Function, examples: int) -> None:
        """A call is about to run. examples: the rows of the first leaf of x.

        Not called for functions without x, or where that leaf has no dimension.
        """

    def call_ran(self, model: str, function: Function, arrived: float, began: float, ended: float) -> None:
        """A call has ended, failed, or was cancelled: see `CallTimes`. Called in the context of the call."""


class Invocation(NamedTuple):
    """One call of a function, without the model that it is for.

    parts: its arguments, named as in `spec.arguments`.
    size_bytes: the length of its message, from which the time that it takes is estimated.
    weights_id: of weights in the store; b"" where the weights are in `parts`, or where the function takes none.
    principal: the owner of these weights; "" for callers without credentials.
    is_alone: True for a call that no other call can share a batch with, so that it does not wait for one.
    allow_rounding: the call may run as one computation with calls of other weights where this changes the last bits.
    """

    function: Function
    parts: Mapping[str, Structure]
    size_bytes: int
    training: bool = False
    weights_id: bytes = b""
    principal: str = ""
    is_alone: bool = False
    allow_rounding: bool = False


class Executor:
    """Runs functions of models."""

    def __init__(
        self,
        weights: WeightStore,
        scheduler: Scheduler,
        batcher: Batcher,
        observer: CallObserver,
        admission: Admission,
    ) -> None:
        self._weights = weights
        self._scheduler = scheduler
        self._batcher = batcher
        self._observer = observer
        self._admission = admission
        self._vectorizers: weakref.WeakKeyDictionary[Servable, Vectorizer] = weakref.WeakKeyDictionary()

    async def admit_and_run(
        self, servable: Servable, principal: str, size_bytes: int, read: Callable[[], Awaitable[Invocation]]
    ) -> dict[str, Structure]:
        """Admits a call, decodes it, and runs it. Returns its results, named as in `spec.results`.

        principal, size_bytes: as in the invocation. read: decodes the invocation; called once the call is admitted.
        Raises ServerOverloaded, and what `read` and `run` raise.
        """
        self._admission.enter(principal, size_bytes)
        try:
            return await self.run(servable, await read())
        finally:
            self._admission.leave(principal, size_bytes)

    async def run(self, servable: Servable, invocation: Invocation) -> dict[str, Structure]:
        """Runs a call that was admitted. Returns its results, named as in `spec.results`.

        Raises FunctionNotAvailable, StructureMismatch, DTypeMismatch, ShapeMismatch, WeightsNotFound, and what the
        model raises.
        """
        plan = servable.plan(invocation.function, invocation.training)
        if not invocation.weights_id:
            leaves = await flattened(plan, invocation.parts, None)
            return plan.unflatten(await self._run(invocation, servable, plan, leaves))
        async with self._weights.use(invocation.principal, invocation.weights_id) as weights:
            placed = weights.leaves(servable.identity.content_hash, servable.spec.weights)
            leaves = await flattened(plan, invocation.parts, placed)
            may_share = plan.is_prediction and not invocation.training and not invocation.is_alone
            vectorizer = self._vectorizer(servable, invocation.allow_rounding) if may_share else None
            is_predict = invocation.function is Function.PREDICT_ON_BATCH
            if may_share and (servable.is_batchable or (vectorizer is not None and is_predict)):
                results = await self._run_batched(invocation, servable, placed, leaves[len(placed) :], vectorizer)
            else:
                results = await self._run(invocation, servable, plan, leaves)
        return plan.unflatten(results)

    async def keep_gradients(self, servable: Servable, principal: str, gradients: Structure) -> bytes:
        """Publishes gradients as a set of weights that leaves the non-trainable weights unchanged. Returns its id.

        Raises WeightStoreFull.
        """
        unchanged = servable.spec.weights.child(1).tree
        none = unchanged.keeping([False] * unchanged.num_leaves)
        tree = TreeDef(Kind.TUPLE, (gradients.tree, none))
        return await self._weights.add_arrays(principal, tree, gradients.leaves)

    def _vectorizer(self, servable: Servable, allow_rounding: bool) -> Vectorizer | None:
        """What decides about computations for several sets of weights; None if the call may not share one."""
        vectorizer = self._vectorizers.get(servable)
        if vectorizer is None:
            vectorizer = self._vectorizers[servable] = Vectorizer(servable.model, self._weights)
        return vectorizer if vectorizer.may(allow_rounding) else None

    async def _run_batched(
        self,
        invocation: Invocation,
        servable: Servable,
        weights: FittedWeights,
        leaves: Sequence[Array],
        vectorizer: Vectorizer | None,
    ) -> list[Array]:
        """Predicts in one computation with other calls. A forward pass then computes the loss of its own rows only."""
        self._observe(invocation, servable)
        inputs = len(servable.spec.x.leaves)
        x, y = leaves[:inputs], leaves[inputs:]
        predict, size_bytes = servable.plan(Function.PREDICT_ON_BATCH), invocation.size_bytes
        times = CallTimes()
        try:
            predicted = await self._batcher.predict(
                predict,
                weights,
                x,
                size_bytes,
                times,
                vectorizer,
                joins=servable.is_batchable,
                allow_rounding=invocation.allow_rounding,
            )
            if invocation.function is Function.PREDICT_ON_BATCH:
                return predicted
            count = len(servable.spec.predictions.leaves)
            predictions, masks = predicted[:count], predicted[count:]
            loss, arguments = servable.plan(Function.LOSS), [*predictions, *y, *masks]
            results = await self._scheduler.run(loss.run, arguments, loss.estimates, size_bytes, [times])
        finally:
            self._observe_end(invocation, servable, times)
        (num_examples,) = servable.spec.batch_output.named_child("num_examples").leaves
        return [*results, *predictions, np.array(predictions[0].shape[0], num_examples.dtype), *masks]

    def _observe(self, invocation: Invocation, servable: Servable) -> None:
        x = invocation.parts.get("x") or invocation.parts.get("batch_input.x")
        if x is not None and x.leaves and x.leaves[0].ndim:
            self._observer.batch(servable.identity.name, invocation.function, x.leaves[0].shape[0])

    def _observe_end(self, invocation: Invocation, servable: Servable, times: CallTimes) -> None:
        name = servable.identity.name
        self._observer.call_ran(name, invocation.function, times.arrived, times.began, times.ended)

    async def _run(self, invocation: Invocation, servable: Servable, plan: Plan, leaves: Sequence[Leaf]) -> list[Array]:
        self._observe(invocation, servable)
        times = CallTimes()
        try:
            return await self._scheduler.run(plan.run, leaves, plan.estimates, invocation.size_bytes, [times])
        finally:
            self._observe_end(invocation, servable, times)


async def flattened(plan: Plan, parts: Mapping[str, Structure], weights: Sequence[Leaf] | None) -> list[Leaf]:
    """See `Plan.flatten`. Arguments with many leaves are checked on another thread than the event loop's."""
    if plan.is_small:
        return plan.flatten(parts, weights)
    return await asyncio.to_thread(plan.flatten, parts, weights)
