"""One call of a model's function: found, checked, run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from forwardpass.wire import errors
from forwardpass.wire.description import Function
from forwardpass.wire.structures import Structure
from forwardpass_server.serving.plans import Servable
from forwardpass_server.serving.registry import Registry
from forwardpass_server.serving.scheduling import Scheduler


class CallObserver(Protocol):
    """Is told of each call that runs."""

    def batch(self, model: str, function: Function, examples: int) -> None: ...


class Caller:
    """Calls models. max_concurrent_calls: beyond it calls are refused at once."""

    def __init__(
        self, registry: Registry, scheduler: Scheduler, observer: CallObserver, max_concurrent_calls: int
    ) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._observer = observer
        self._max_concurrent_calls = max_concurrent_calls
        self._running = 0

    async def call(
        self,
        name: str,
        version: int,
        function: Function,
        parts: Mapping[str, Structure],
        size_bytes: int,
        training: bool = False,
    ) -> tuple[Servable, dict[str, Structure]]:
        """Runs a function of a model on the structures of a request, named as in `spec.arguments`.

        size_bytes: the length of the request, by which calls are told to take longer or shorter.
        Returns the model that answered and its results, named as in `spec.results`.
        Raises what `Registry.get` raises, FunctionNotAvailable, StructureMismatch, DTypeMismatch, ShapeMismatch,
        ServerOverloaded, and what the model raises.
        """
        servable = self._registry.get(name, version)
        plan = servable.plan(function, training)
        leaves = plan.flatten(parts)
        if self._running >= self._max_concurrent_calls:
            raise errors.ServerOverloaded(f"the server runs {self._running} calls, as many as it takes")
        x = parts.get("x") or parts.get("batch_input.x")
        if x is not None and x.leaves and x.leaves[0].ndim:
            self._observer.batch(name, function, x.leaves[0].shape[0])
        self._running += 1
        try:
            results = await self._scheduler.run(plan.run, leaves, plan.estimates, size_bytes)
        finally:
            self._running -= 1
        return servable, plan.unflatten(results)
