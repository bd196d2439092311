"""The models of metric sessions: those in the registry, and unloaded ones that sessions still use."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from forwardpass.wire import errors
from forwardpass.wire.description import ModelIdentity
from forwardpass_server.calls.plans import Servable
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.sessions.store import SessionStore

ResultT = TypeVar("ResultT")


class SessionModels:
    """Finds the model that a session was opened with, and counts the sessions of a model before it is unloaded.

    Used on one event loop only.
    """

    def __init__(self, registry: Registry, store: SessionStore) -> None:
        self._registry = registry
        self._store = store
        # Models that were unloaded, or are about to be, and that open sessions may need.
        self._retained: dict[ModelIdentity, Servable] = {}
        # For each model: how many sessions were ever opened here, and which of them are still being opened.
        self._opened_count: collections.Counter[ModelIdentity] = collections.Counter()
        self._opening: collections.defaultdict[ModelIdentity, set[asyncio.Task[Any]]]
        self._opening = collections.defaultdict(set)

    def named(self, name: str, version: int, label: str) -> Servable:
        """The model of a new session. version: 0 for the highest that is available, or for that of a label.

        Raises what `Registry.get` and `Registry.labelled` raise.
        """
        return self._registry.get(name, self._registry.asked_for(name, version, label))

    def of(self, identity: ModelIdentity) -> Servable:
        """The model that a session was opened with.

        Raises what `Registry.get` raises, and ModelChanged where another model has this name and version by now.
        """
        retained = self._retained.get(identity)
        try:
            servable = self._registry.get(identity.name, identity.version)
        except errors.ForwardPassError:
            if retained is None:
                raise
            return retained
        if servable.identity == identity:
            return servable
        if retained is not None:
            return retained
        raise errors.ModelChanged(
            place="session",
            expected=f"model {identity} of content {identity.content_hash.hex()[:12]}",
            found=f"content {servable.identity.content_hash.hex()[:12]}",
        )

    def opening(self, model: ModelIdentity, making: Coroutine[Any, Any, ResultT]) -> asyncio.Task[ResultT]:
        """Starts to open a session of a model. `count` waits until it is open.

        making: creates the session in the store.
        """
        self._opened_count[model] += 1
        opening = self._opening[model]
        task = asyncio.ensure_future(making)
        opening.add(task)
        task.add_done_callback(opening.discard)
        # Read the exception: asyncio would log it as unread if the caller has gone.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def count(self, model: ModelIdentity) -> int:
        """How many sessions a model has in the store. Waits for sessions that are being opened here.

        If it returns 0, no session of this model is opened here before the caller's next await.
        Raises SessionStoreUnavailable.
        """
        while True:
            opened_count, opening = self._opened_count[model], list(self._opening[model])
            if opening:
                await asyncio.wait(opening)
            found = await self._store.count_of(store_tag(model))
            # A session that was opened while the store counted may be missing: count again.
            if found or self._opened_count[model] == opened_count:
                return found

    def retain(self, servable: Servable) -> None:
        """Keeps a model that is about to be unloaded or replaced, for its open sessions."""
        self._retained[servable.identity] = servable

    async def release(self) -> bool:
        """Drops retained models that have no sessions any more; returns whether it dropped any."""
        released = []
        for model, retained in list(self._retained.items()):
            served = self._served(model)
            # The registry still serves this model: it may get new sessions until it is unloaded.
            if served is retained:
                continue
            with contextlib.suppress(errors.SessionStoreUnavailable):
                if served is not None or not await self.count(model):
                    released.append(self._retained.pop(model, None))
        return bool(released)

    def _served(self, model: ModelIdentity) -> Servable | None:
        """The model in the registry; None if it was unloaded or replaced by another one."""
        with contextlib.suppress(errors.ForwardPassError):
            served = self._registry.get(model.name, model.version)
            return served if served.identity == model else None
        return None


def store_tag(model: ModelIdentity) -> str:
    """The string under which a store counts the sessions of a model."""
    return f"{model} {model.content_hash.hex()}"
