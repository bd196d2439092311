"""Starts a server, loads its models, and ends it when told to."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable

import prometheus_client

from forwardpass_server.app import parts as app_parts
from forwardpass_server.app import upkeep
from forwardpass_server.app.parts import Parts
from forwardpass_server.app.settings import Settings
from forwardpass_server.catalog.registry import State
from forwardpass_server.models.trial_process import TrialProcess
from forwardpass_server.process import allocator, garbage
from forwardpass_server.rpc.server import join_address
from forwardpass_server.status import page as status_page
from forwardpass_server.status.page import Status
from forwardpass_server.status.recent import Recent
from forwardpass_server.status.server import MonitoringServer

_LOGGER = logging.getLogger(__name__)

Announce = Callable[[str], None]


async def serve(settings: Settings, announce: Announce, trial_process: TrialProcess | None = None) -> bool:
    """Serves until SIGTERM or SIGINT.

    trial_process: the child process in which models are tried before they are served; None where they are not.
    announce: is told, once each, where the server listens, what weights may take, and when it has started; or, where it
    has not when the models are loaded, why.
    Returns whether everything has ended: otherwise a model still computes or loads, and only the end of the process
    can end it. Raises DeviceNotFound, SettingsError, SessionStoreError, or OSError where a port is taken.
    """
    allocator.keep_freed_memory()
    # When a series began is a series more for each, and what rates are made of says it too.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    parts = await app_parts.join(settings, trial_process)
    # Before anybody waits: a load makes so many objects that the collector would look at all others meanwhile.
    garbage.set_aside()
    stop = _stop_on_signals()
    recent = Recent(parts.metrics.registry)
    await parts.health.open()
    monitoring = _monitoring_server(parts, recent)
    if monitoring is not None:
        announce(f"metrics on http://{join_address(settings.metrics_host, monitoring.port)}/metrics")
    await _listen(parts, announce)
    parts.liveness.start()
    loading = asyncio.create_task(_load(parts, announce))
    starting = asyncio.create_task(_announce_start(parts, announce))
    # What goes wrong in it otherwise than with one model must not leave a server that is never ready.
    loading.add_done_callback(lambda task: None if task.cancelled() or task.exception() is None else stop.set())
    upkeeping = [asyncio.create_task(work) for work in upkeep.works(parts, recent, loading)]
    await stop.wait()
    for task in [*upkeeping, starting]:
        task.cancel()
    is_loading = not loading.done()
    loading.cancel()
    has_ended = await _end(parts)
    if monitoring is not None:
        monitoring.close()
    if not is_loading:
        loading.result()
    return has_ended and not is_loading and not parts.management.is_loading


def _stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _stop, stop, number)
    return stop


def _stop(stop: asyncio.Event, number: int) -> None:
    if stop.is_set() and number == signal.SIGINT:
        _LOGGER.warning("interrupted again: ending at once")
        os._exit(1)
    stop.set()


def _monitoring_server(parts: Parts, recent: Recent) -> MonitoringServer | None:
    """Serves metrics and the status page; None where no port is to."""
    host, port = parts.settings.metrics_host, parts.settings.metrics_port
    if port is None:
        return None

    def page() -> str:
        return status_page.render(
            Status(
                version=parts.version,
                tensorflow=parts.tensorflow_version,
                device=parts.device,
                started=parts.metrics.machine.started,
                health=parts.health.reading(),
                unready_reasons=parts.readiness.reasons(),
                session_store_problem=parts.session_store.problem,
                entries=parts.registry.entries(),
                loads=parts.loader.loads,
                recent=recent.window(),
            )
        )

    try:
        return MonitoringServer(host, port, parts.metrics.registry, page)
    except OSError as error:
        raise OSError(f"--metrics-port: cannot listen on {join_address(host, port)}: {error.strerror}") from None


async def _listen(parts: Parts, announce: Announce) -> None:
    """Opens the ports, and says so."""
    settings = parts.settings
    if parts.managing is not None:
        announce(f"management on {join_address(settings.management_host, await parts.managing.start())}")
        await parts.managing.set_all_serving(True)
    announce(f"listening on {join_address(settings.host, await parts.server.start())}")
    announce(
        f"weights: up to {parts.weights_bytes / 2**20:,.0f} MiB on {parts.device}"
        + (f", kept in {settings.weights_folder}" if settings.weights_folder else "")
    )
    announce(
        f"requests and responses: up to {parts.capacity.messages_bytes / 2**20:,.0f} MiB at once, less what models take"
    )
    announce(f"metric sessions in {parts.session_store.place}")


async def _load(parts: Parts, announce: Announce) -> None:
    """Loads every model, one after another beside the event loop."""
    parts.management.relabel()
    await parts.management.load_all()
    # What models brought that stays: modules of factories.
    garbage.set_aside()
    # Without models this comes before the first look at the session store.
    await parts.store_watch.checked.wait()
    await parts.health.models_tried()
    if not parts.health.started.is_set():
        announce(f"not ready: {'; '.join(parts.readiness.reasons())}")


async def _announce_start(parts: Parts, announce: Announce) -> None:
    """Waits until the server has started, and says so."""
    await parts.health.started.wait()
    entries = parts.registry.entries()
    failed = [str(entry.source) for entry in entries if entry.state is State.FAILED]
    announce(
        f"ready on {parts.device}: {len(entries) - len(failed)} of {len(entries)} models"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )


async def _end(parts: Parts) -> bool:
    """Lets clients leave and calls end, and commits what is to be. Returns whether all computations have ended."""
    began = time.monotonic()
    if parts.managing is not None:
        await parts.managing.drain()
    await parts.server.drain()
    parts.liveness.end()
    settings = parts.settings
    remaining_s = settings.drain_delay_s + settings.drain_timeout_s - (time.monotonic() - began)
    has_ended = await parts.scheduler.close(max(remaining_s, 0.0))
    if not has_ended:
        _LOGGER.warning("a computation still ran when the time to drain was over")
    await parts.session_store.close()
    if parts.tracing is not None:
        await asyncio.to_thread(parts.tracing.close)
    return has_ended
