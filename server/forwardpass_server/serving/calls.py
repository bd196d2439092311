"""One call of a model's function: found, checked, run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

from forwardpass.wire import conform, errors, specs
from forwardpass.wire.description import Function, ModelSpec
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import StructureSpec
from forwardpass.wire.structures import Structure
from forwardpass.wire.trees import Kind
from forwardpass_server.serving.models import LoadedModel
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
        self, name: str, version: int, function: Function, parts: Mapping[str, Structure], training: bool = False
    ) -> tuple[LoadedModel, dict[str, Structure]]:
        """Runs a function of a model on the structures of a request, named as in `spec.arguments`.

        Returns the model that answered and its results, named as in `spec.results`.
        Raises what `Registry.get` raises, FunctionNotAvailable, StructureMismatch, DTypeMismatch, ShapeMismatch,
        ServerOverloaded, and what the model raises.
        """
        model = self._registry.get(name, version)
        leaves = arguments(model.description.spec, function, parts)
        if self._running >= self._max_concurrent_calls:
            raise errors.ServerOverloaded(f"the server runs {self._running} calls, as many as it takes")
        self._observe(model, function, parts)
        self._running += 1
        try:
            run = functools.partial(model.run, function, training)
            results = await self._scheduler.run(model, (function, training), leaves, run)
        finally:
            self._running -= 1
        return model, _split(model.description.spec.results[function], results)

    def _observe(self, model: LoadedModel, function: Function, parts: Mapping[str, Structure]) -> None:
        x = parts.get("x") or parts.get("batch_input.x")
        if x is not None and x.leaves and x.leaves[0].ndim:
            self._observer.batch(model.description.identity.name, function, x.leaves[0].shape[0])


def arguments(spec: ModelSpec, function: Function, parts: Mapping[str, Structure]) -> list[Array]:
    """The flat arguments of a function from the structures of a request. Raises as `Caller.call` does."""
    reason = spec.unavailable.get(function)
    if reason is not None:
        raise errors.FunctionNotAvailable(f"{function.title} is not available: {reason}")
    wanted = spec.arguments[function]
    leaves: list[Array] = []
    checked = []
    for place, part_spec in wanted.items():
        part = parts.get(place)
        if part is None or part.tree.kind is Kind.NONE:
            part_leaves: Sequence[Array] = _missing(spec, place, part_spec)
        else:
            part_leaves = conform.check(part, part_spec, place)
        checked.append((place, part_leaves, part_spec))
        leaves += part_leaves
    conform.check_batch(checked)
    return leaves


def _missing(spec: ModelSpec, place: str, part_spec: StructureSpec) -> list[Array]:
    """Stands in for a part that may be None: one without leaves, or one that the function does not read."""
    group, _, field = place.partition(".")
    if part_spec.leaves and not (group == "batch_output" and field in spec.unused_batch_output_fields):
        raise errors.StructureMismatch(place=place, expected=str(part_spec), found="None")
    return [specs.zeros(leaf) for leaf in part_spec.leaves]


def _split(results: Mapping[str, StructureSpec], leaves: list[Array]) -> dict[str, Structure]:
    parts = {}
    position = 0
    for place, spec in results.items():
        count = len(spec.leaves)
        parts[place] = Structure(spec.tree, leaves[position : position + count])
        position += count
    return parts
