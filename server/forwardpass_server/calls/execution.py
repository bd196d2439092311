"""One call of a model's function: found, checked, run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from forwardpass.wire.description import Function
from forwardpass.wire.dtypes import Array
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.batching import Batcher
from forwardpass_server.calls.model import Leaf
from forwardpass_server.calls.plans import Plan, Servable
from forwardpass_server.calls.scheduling import Passage, Scheduler
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.weights.store import WeightStore


class CallObserver(Protocol):
    """Is told of each call that runs."""

    def batch(self, model: str, function: Function, examples: int) -> None: ...

    def call_ran(self, model: str, function: Function, arrived: float, began: float, ended: float) -> None:
        """A call has run, or failed, or was given up: see `Passage`. Said where the call's own context is current."""


class Request(NamedTuple):
    """What a caller asks of a function of a model.

    version: 0 for the highest that is available. parts: its structures, named as in `spec.arguments`.
    size_bytes: its length, by which calls are told to take longer or shorter.
    weights_id: of weights that the store holds; b"" where they are among the parts, or not needed.
    principal: who asks; "" where nobody has to say so.
    is_alone: no other call would come to share a batch with it.
    """

    name: str
    version: int
    function: Function
    parts: Mapping[str, Structure]
    size_bytes: int
    training: bool = False
    weights_id: bytes = b""
    principal: str = ""
    is_alone: bool = False


class Caller:
    """Calls models, as many at once as are admitted."""

    def __init__(
        self,
        registry: Registry,
        weights: WeightStore,
        scheduler: Scheduler,
        batcher: Batcher,
        observer: CallObserver,
        admission: Admission,
    ) -> None:
        self._registry = registry
        self._weights = weights
        self._scheduler = scheduler
        self._batcher = batcher
        self._observer = observer
        self._admission = admission

    async def call(
        self, name: str, version: int, principal: str, size_bytes: int, read: Callable[[], Awaitable[Request]]
    ) -> tuple[Servable, dict[str, Structure]]:
        """Returns the model that answered and its results, named as in `spec.results`.

        name, version, principal, size_bytes: as of the request. read: decodes the rest of it once it is admitted.
        Raises what `Registry.get` raises, ServerOverloaded, and what `read` and `run` raise.
        """
        servable = self._registry.get(name, version)
        self._admission.enter(principal, size_bytes)
        try:
            return servable, await self.run(servable, await read())
        finally:
            self._admission.leave(principal, size_bytes)

    async def run(self, servable: Servable, request: Request) -> dict[str, Structure]:
        """The results of a call that was admitted, named as in `spec.results`, from a model that was found.

        Raises FunctionNotAvailable, StructureMismatch, DTypeMismatch, ShapeMismatch, WeightsNotFound, and what the
        model raises.
        """
        plan = servable.plan(request.function, request.training)
        if not request.weights_id:
            leaves = await _flattened(plan, request.parts, None)
            return plan.unflatten(await self._run(request, servable, plan, leaves))
        async with self._weights.use(request.principal, request.weights_id) as weights:
            placed = weights.leaves(servable.identity.content_hash, servable.spec.weights)
            leaves = await _flattened(plan, request.parts, placed)
            if servable.is_batchable and plan.is_prediction and not request.training and not request.is_alone:
                results = await self._run_batched(request, servable, placed, leaves[len(placed) :])
            else:
                results = await self._run(request, servable, plan, leaves)
        return plan.unflatten(results)

    async def _run_batched(
        self, request: Request, servable: Servable, weights: Sequence[Leaf], leaves: Sequence[Array]
    ) -> list[Array]:
        """The predictions with those of other calls; the loss, where it is wanted, for each call by itself."""
        self._observe(request, servable)
        inputs = len(servable.spec.x.leaves)
        x, y = leaves[:inputs], leaves[inputs:]
        predict, size_bytes = servable.plan(Function.PREDICT_ON_BATCH), request.size_bytes
        passage = Passage()
        try:
            predicted = await self._batcher.predict(predict, weights, x, size_bytes, passage)
            if request.function is Function.PREDICT_ON_BATCH:
                return predicted
            count = len(servable.spec.predictions.leaves)
            predictions, masks = predicted[:count], predicted[count:]
            loss, arguments = servable.plan(Function.LOSS), [*predictions, *y, *masks]
            results = await self._scheduler.run(loss.run, arguments, loss.estimates, size_bytes, [passage])
        finally:
            self._observe_end(request, servable, passage)
        (num_examples,) = servable.spec.batch_output.named_child("num_examples").leaves
        return [*results, *predictions, np.array(predictions[0].shape[0], num_examples.dtype), *masks]

    def _observe(self, request: Request, servable: Servable) -> None:
        x = request.parts.get("x") or request.parts.get("batch_input.x")
        if x is not None and x.leaves and x.leaves[0].ndim:
            self._observer.batch(servable.identity.name, request.function, x.leaves[0].shape[0])

    def _observe_end(self, request: Request, servable: Servable, passage: Passage) -> None:
        name = servable.identity.name
        self._observer.call_ran(name, request.function, passage.arrived, passage.began, passage.ended)

    async def _run(self, request: Request, servable: Servable, plan: Plan, leaves: Sequence[Leaf]) -> list[Array]:
        self._observe(request, servable)
        passage = Passage()
        try:
            return await self._scheduler.run(plan.run, leaves, plan.estimates, request.size_bytes, [passage])
        finally:
            self._observe_end(request, servable, passage)


async def _flattened(plan: Plan, parts: Mapping[str, Structure], weights: Sequence[Leaf] | None) -> list[Leaf]:
    """See `Plan.flatten`. The arguments of a model with many leaves are checked beside the event loop."""
    if plan.is_small:
        return plan.flatten(parts, weights)
    return await asyncio.to_thread(plan.flatten, parts, weights)
