"""Builds what serves metric sessions and evaluations over a session store."""

from __future__ import annotations

import contextlib
import dataclasses

from forwardpass.wire import errors
from forwardpass_server.calls.room import CallsRoom
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.sessions.cache import CacheLimits, SessionCache
from forwardpass_server.sessions.evaluation import Evaluations
from forwardpass_server.sessions.retained_models import SessionModels
from forwardpass_server.sessions.service import Sessions
from forwardpass_server.sessions.session import SessionStorage, UpdateObserver
from forwardpass_server.sessions.store import SessionStore
from forwardpass_server.sessions.store_watch import SessionStoreWatch
from forwardpass_server.weights.store import WeightStore


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionsRoom:
    """The sessions of a server, and the parts that a server looks after while it runs."""

    store: SessionStore
    store_watch: SessionStoreWatch
    models: SessionModels
    cache: SessionCache
    sessions: Sessions
    evaluations: Evaluations

    async def sweep(self) -> None:
        """Removes idle sessions from the cache, and expired ones from the store. To be called every second or so."""
        self.cache.sweep()
        # Calls that need the store get its error; the store itself logs it.
        with contextlib.suppress(errors.SessionStoreUnavailable):
            await self.store.sweep()


def build(
    store: SessionStore,
    registry: Registry,
    weights: WeightStore,
    calls: CallsRoom,
    observer: UpdateObserver,
    *,
    max_state_bytes: int,
    cache_limits: CacheLimits | None = None,
) -> SessionsRoom:
    """The sessions in a store. max_state_bytes: of the metrics state of one session."""
    storage = SessionStorage(store, observer, max_state_bytes)
    models = SessionModels(registry, store)
    cache = SessionCache(storage, models, cache_limits)
    sessions = Sessions(storage, models, cache, calls.executor, calls.admission)
    return SessionsRoom(
        store=store,
        store_watch=SessionStoreWatch(store),
        models=models,
        cache=cache,
        sessions=sessions,
        evaluations=Evaluations(sessions, weights, calls.executor, calls.evaluation_steps, calls.admission),
    )
