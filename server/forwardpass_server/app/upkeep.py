"""What is done again and again while a server runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from forwardpass.wire import errors
from forwardpass_server.app.parts import Parts
from forwardpass_server.app.security import Security
from forwardpass_server.catalog.watch import RepositoryWatch
from forwardpass_server.sessions.cache import KnownSessions
from forwardpass_server.sessions.retained_models import SessionModels
from forwardpass_server.sessions.store import SessionStore
from forwardpass_server.status.recent import INTERVAL_S, Recent
from forwardpass_server.weights.store import WeightStore

_SWEEP_S = 1.0

# Between looks for models that were unloaded and whose last session has ended. A shared store may be asked a lot.
_RELEASE_S = 30.0

# Between looks at the files of certificates and tokens: how long one that was revoked is still good.
_WATCH_S = 1.0


def works(parts: Parts, recent: Recent, loading: asyncio.Task[None]) -> list[Coroutine[Any, Any, None]]:
    """What goes on until it is cancelled. loading: of the models of the start."""
    return [
        _sweep_weights(parts.weights),
        _sweep_sessions(parts.known_sessions, parts.session_store),
        _release_models(parts.session_models),
        _watch(parts.security),
        _remember(recent),
        parts.health.watch(),
        parts.store_watch.watch(),
        parts.health.follow_store(parts.store_watch),
        _follow_repository(parts, loading),
    ]


async def _sweep_weights(store: WeightStore) -> None:
    while True:
        await asyncio.sleep(_SWEEP_S)
        store.sweep()


async def _sweep_sessions(sessions: KnownSessions, store: SessionStore) -> None:
    while True:
        await asyncio.sleep(_SWEEP_S)
        sessions.sweep()
        # Whoever needs the store meanwhile is told what is wrong with it.
        with contextlib.suppress(errors.SessionStoreUnavailable):
            await store.sweep()


async def _release_models(models: SessionModels) -> None:
    while True:
        await asyncio.sleep(_RELEASE_S)
        await models.release()


async def _watch(security: Security) -> None:
    while True:
        await asyncio.sleep(_WATCH_S)
        await asyncio.to_thread(security.refresh)


async def _remember(recent: Recent) -> None:
    while True:
        await asyncio.sleep(INTERVAL_S)
        await asyncio.to_thread(recent.take)


async def _follow_repository(parts: Parts, loading: asyncio.Task[None]) -> None:
    settings = parts.settings
    if settings.model_repository is None or not settings.repository_poll_s:
        return
    known = [entry.source for entry in parts.registry.entries() if entry.source.folder is not None]
    watch = RepositoryWatch(parts.management, settings.model_repository, parts.policies, known)
    parts.metrics.files.watched("models", lambda: watch.is_good)
    # What the start has to load comes first.
    await asyncio.wait([loading])
    await watch.watch(settings.repository_poll_s)
