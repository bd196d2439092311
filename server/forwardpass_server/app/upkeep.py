"""The periodic tasks of a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from forwardpass_server.access.guard import Guard
from forwardpass_server.app.parts import Parts
from forwardpass_server.catalog.watch import RepositoryWatch
from forwardpass_server.sessions.retained_models import SessionModels
from forwardpass_server.sessions.room import SessionsRoom
from forwardpass_server.status.recent import INTERVAL_S, Recent
from forwardpass_server.weights.store import WeightStore

_SWEEP_S = 1.0

# Until an unloaded model is dropped after its last session has ended. Counting sessions is slow in a shared store.
_RELEASE_S = 30.0

# Until a change of the certificates' and tokens' files takes effect: a revoked token works so long.
_WATCH_S = 1.0


def works(parts: Parts, recent: Recent, loading: asyncio.Task[None]) -> list[Coroutine[Any, Any, None]]:
    """The tasks, each of which runs until it is cancelled. loading: the task that loads the models of the start."""
    return [
        _sweep_weights(parts.weights),
        *([] if parts.deletions is None else [parts.deletions.watch()]),
        _sweep_sessions(parts.sessions),
        _release_models(parts.sessions.models),
        _watch_files(parts.guard),
        _sample_metrics(recent),
        parts.health.watch(),
        parts.sessions.store_watch.watch(),
        parts.health.follow_store(parts.sessions.store_watch),
        _follow_repository(parts, loading),
    ]


async def _sweep_weights(store: WeightStore) -> None:
    while True:
        await asyncio.sleep(_SWEEP_S)
        store.sweep()


async def _sweep_sessions(sessions: SessionsRoom) -> None:
    while True:
        await asyncio.sleep(_SWEEP_S)
        await sessions.sweep()


async def _release_models(models: SessionModels) -> None:
    while True:
        await asyncio.sleep(_RELEASE_S)
        await models.release()


async def _watch_files(guard: Guard) -> None:
    while True:
        await asyncio.sleep(_WATCH_S)
        await asyncio.to_thread(guard.refresh)


async def _sample_metrics(recent: Recent) -> None:
    while True:
        await asyncio.sleep(INTERVAL_S)
        await asyncio.to_thread(recent.take)


async def _follow_repository(parts: Parts, loading: asyncio.Task[None]) -> None:
    settings = parts.settings
    catalog = parts.catalog
    if catalog.folder is None or not settings.repository_poll_s:
        return
    known = [entry.source for entry in catalog.registry.entries() if entry.source.folder is not None]
    watch = RepositoryWatch(parts.management, catalog.folder, catalog.policies, known, catalog.refresh)
    parts.metrics.files.watched("models", lambda: watch.is_good)
    # The models of the start are loaded first.
    await asyncio.wait([loading])
    await watch.watch(settings.repository_poll_s)
