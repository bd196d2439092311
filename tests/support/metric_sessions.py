"""Metric sessions of real models over a store, without a server around them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from forwardpass.wire.description import Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls import room as calls_room
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.capacity import Capacity, CapacityOptions
from forwardpass_server.calls.execution import Executor, Invocation
from forwardpass_server.calls.memory_budget import MemoryBudget
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.calls.room import CallsOptions
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.models.placement import TensorFlowDevice
from forwardpass_server.sessions import room as sessions_room
from forwardpass_server.sessions.cache import CacheLimits, SessionCache
from forwardpass_server.sessions.evaluation import Evaluations
from forwardpass_server.sessions.records import UpdateIdentity
from forwardpass_server.sessions.retained_models import SessionModels
from forwardpass_server.sessions.service import Sessions
from forwardpass_server.sessions.store import SessionLimits, SessionStore
from forwardpass_server.sessions.stores.memory import MemorySessionStore
from forwardpass_server.weights.store import StoreOptions, WeightStore
from support import zoo
from support.arrays import nested

LIMITS = SessionLimits(max_sessions=100, max_bytes=2**20, idle_expiry_s=3600.0, remember_s=3600.0)
MAX_STATE_BYTES = 2**16
ValueT = TypeVar("ValueT")

SESSION, OTHER = b"s" * 16, b"o" * 16


class Observer:
    """Takes note of what it is told."""

    def __init__(self) -> None:
        self.applied = self.duplicates = 0

    def session_updates(self, applied: int, duplicates: int) -> None:
        self.applied += applied
        self.duplicates += duplicates

    def sessions_expired(self, count: int) -> None: ...

    def session_commit(self, seconds: float) -> None: ...

    def batch(self, model: str, function: Function, examples: int) -> None: ...

    def call_ran(self, model: str, function: Function, arrived: float, began: float, ended: float) -> None: ...

    def batched_calls(self, calls: int) -> None: ...

    def batch_wait(self, seconds: float) -> None: ...

    def weights_hit(self) -> None: ...

    def weights_missed(self) -> None: ...

    def weights_evicted(self) -> None: ...

    def weights_disk_failed(self, operation: str, reason: str) -> None: ...


@functools.cache
def registry_of(*names: str) -> Registry:
    """Models of the zoo, loaded once for all tests."""
    sources = [ModelSource(name, 1, factory=f"support.zoo:{name}") for name in names]
    registry = Registry(sources)
    for source in sources:
        registry.load(source, TensorFlowLoader("cpu"))
    return registry


@dataclasses.dataclass
class Rig:
    """What a server joins for its sessions."""

    sessions: Sessions
    models: SessionModels
    cache: SessionCache
    evaluations: Evaluations
    executor: Executor
    admission: Admission
    weights: WeightStore
    observer: Observer
    registry: Registry
    store: SessionStore

    async def result(self, session_id: bytes = SESSION, principal: str = "") -> dict[str, float]:
        """The metrics of a session of `counting`."""
        _, metrics = await self.sessions.result(principal, session_id)
        return {name: value[()] for name, value in nested(metrics).items()}

    async def update(self, writer: Writer, number: int, **changes: Any) -> None:
        await self.sessions.update("", writer.identity(**changes), given(counted(number)), 100)


class Writer:
    """Numbers updates as a client does."""

    def __init__(self, name: str = "w", session_id: bytes = SESSION) -> None:
        self._id = name.encode().ljust(16, b".")
        self._session_id = session_id
        self._sequence = 0

    def identity(self, sequence: int | None = None, update_id: bytes | None = None) -> UpdateIdentity:
        """The next; or that of a given number, whose id depends on nothing else unless it is given."""
        if sequence is None:
            sequence = self._sequence = self._sequence + 1
        return UpdateIdentity(self._session_id, self._id, sequence, update_id or sequence.to_bytes(16, "big"))


def given(value: ValueT) -> Callable[[], Awaitable[ValueT]]:
    """What decodes a request that is decoded already."""

    async def read() -> ValueT:
        return value

    return read


def counted(number: int, examples: int = 3) -> dict[str, Structure]:
    """What an update of a session of `counting` holds."""
    return {"labels": Structure.of(zoo.counting_batch(number, examples)[1])}


def forward(number: int, examples: int = 3) -> Invocation:
    """A forward pass of `counting`, weights by value."""
    weights = {
        "model_weights.trainable": Structure.of((np.arange(10, dtype=np.float32),)),
        "model_weights.non_trainable": Structure.of(()),
    }
    parts = {**weights, **batch(number, examples)}
    return Invocation(Function.FORWARD_PASS, parts, 100)


def batch(number: int, examples: int = 3) -> dict[str, Structure]:
    """A batch of `counting` as a request holds it."""
    x, y = zoo.counting_batch(number, examples)
    return {"batch_input.x": Structure.of(x), "batch_input.y": Structure.of(y)}


@contextlib.asynccontextmanager
async def rig(
    store: SessionStore,
    registry: Registry,
    *,
    max_calls: int = 100,
    max_state_bytes: int = MAX_STATE_BYTES,
    cache_limits: CacheLimits | None = None,
) -> AsyncIterator[Rig]:
    observer = Observer()
    weights = WeightStore(StoreOptions(budget_bytes=2**20), TensorFlowDevice("/device:CPU:0"), observer)
    options = CapacityOptions(
        max_message_bytes=2**20,
        max_calls=max_calls,
        max_bytes=2**30,
        principal_calls=lambda in_all: in_all,
        principal_bytes=lambda in_all: in_all,
    )
    budget = MemoryBudget(memory_bytes=2**32, base_bytes=0, weights_bytes=0)
    capacity = Capacity(options, budget, lambda: 0)
    calls = calls_room.build(CallsOptions(threads=2, max_batch_rows=100), capacity, weights, observer, observer)
    room = sessions_room.build(
        store, registry, weights, calls, observer, max_state_bytes=max_state_bytes, cache_limits=cache_limits
    )
    try:
        yield Rig(
            room.sessions,
            room.models,
            room.cache,
            room.evaluations,
            calls.executor,
            calls.admission,
            weights,
            observer,
            registry,
            store,
        )
    finally:
        await calls.scheduler.close(10)


def run(scenario: Any, store: SessionStore | None = None, names: Iterable[str] = ("counting",), **options: Any) -> None:
    """Runs a scenario over a store, a new one in memory unless it is given."""

    async def main() -> None:
        async with rig(store or MemorySessionStore(LIMITS, Observer()), registry_of(*names), **options) as found:
            await scenario(found)

    asyncio.run(asyncio.wait_for(main(), 60))
