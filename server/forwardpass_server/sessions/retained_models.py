"""The models of metric sessions: those that are served, and those that live on in their sessions alone."""

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
    """Finds the very model that a session was opened with, and tells who unloads one of its sessions.

    Used on one event loop alone.
    """

    def __init__(self, registry: Registry, store: SessionStore) -> None:
        self._registry = registry
        self._store = store
        # Models that the registry has no more, or is about to lose: for their sessions, at hand or not.
        self._left: dict[ModelIdentity, Servable] = {}
        # Of each model that there ever was: how many sessions somebody has begun to open, and those that are not yet.
        self._begun: collections.Counter[ModelIdentity] = collections.Counter()
        self._opening: collections.defaultdict[ModelIdentity, set[asyncio.Task[Any]]]
        self._opening = collections.defaultdict(set)

    def named(self, name: str, version: int, label: str) -> Servable:
        """The model of a new session. version: 0 for the highest that is available, or for that of a label.

        Raises what `Registry.get` and `Registry.labelled` raise.
        """
        return self._registry.get(name, self._registry.asked_for(name, version, label))

    def of(self, identity: ModelIdentity) -> Servable:
        """The very model that a session was opened with. Raises what `Registry.get` raises, and ModelChanged."""
        left = self._left.get(identity)
        try:
            servable = self._registry.get(identity.name, identity.version)
        except errors.ForwardPassError:
            if left is None:
                raise
            return left
        if servable.identity == identity:
            return servable
        if left is not None:
            return left
        raise errors.ModelChanged(
            place="session",
            expected=f"model {identity} of content {identity.content_hash.hex()[:12]}",
            found=f"content {servable.identity.content_hash.hex()[:12]}",
        )

    def opening(self, model: ModelIdentity, making: Coroutine[Any, Any, ResultT]) -> asyncio.Task[ResultT]:
        """A session that is being opened from here on; whoever counts waits for it."""
        self._begun[model] += 1
        opening = self._opening[model]
        task = asyncio.ensure_future(making)
        opening.add(task)
        task.add_done_callback(opening.discard)
        # Who has left does not ask what came of it.
        task.add_done_callback(lambda made: made.cancelled() or made.exception())
        return task

    async def count(self, model: ModelIdentity) -> int:
        """How many sessions a model has, at hand or not; waits for those that are just being opened here.

        After 0, none is opened here before the caller awaits something else. Raises SessionStoreUnavailable.
        """
        while True:
            begun, opening = self._begun[model], list(self._opening[model])
            if opening:
                await asyncio.wait(opening)
            found = await self._store.count_of(word(model))
            # One that was begun meanwhile may have been missed.
            if found or self._begun[model] == begun:
                return found

    def leave(self, servable: Servable) -> None:
        """A model is about to be unloaded or replaced: its sessions are served on, at hand or only in the store."""
        self._left[servable.identity] = servable

    async def release(self) -> bool:
        """Forgets models that were left and have no sessions any more. Whether there were any. For now and then."""
        released = []
        for model, left in list(self._left.items()):
            served = self._served(model)
            # One that is still served may get sessions until it goes.
            if served is left:
                continue
            with contextlib.suppress(errors.SessionStoreUnavailable):
                if served is not None or not await self.count(model):
                    released.append(self._left.pop(model, None))
        return bool(released)

    def _served(self, model: ModelIdentity) -> Servable | None:
        """A model as the registry has it; None where it has none, or another under the same name and version."""
        with contextlib.suppress(errors.ForwardPassError):
            served = self._registry.get(model.name, model.version)
            return served if served.identity == model else None
        return None


def word(model: ModelIdentity) -> str:
    """What a store counts the sessions of a model by."""
    return f"{model} {model.content_hash.hex()}"
