"""Starts a server, loads its models, and stops it on a signal."""

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
    announce: prints lines for the operator: the ports, the limits, and that the server has started, or why it is not
    ready after the models were loaded.
    Returns whether everything has ended. If not, a model still computes or loads, and only the end of the process
    stops it. Raises DeviceNotFound, SettingsError, SessionStoreError, or OSError where a port is taken.
    """
    allocator.keep_freed_memory()
    # These series would double the number of counters, and rates do not need them.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    parts = await app_parts.join(settings, trial_process)
    # Before the ports open: the collector would look at all these objects again during each load.
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
    # Without this, an error outside of a model's own load would leave a server that never becomes ready.
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
        _LOGGER.warning("second interrupt: stopping at once")
        os._exit(1)
    stop.set()


def _monitoring_server(parts: Parts, recent: Recent) -> MonitoringServer | None:
    """The HTTP server of metrics and the status page; None if the operator wants none."""
    host, port = parts.settings.metrics_host, parts.settings.metrics_port
    if port is None:
        return None

    def page() -> str:
        return status_page.render(
            Status(
                version=parts.version,
                tensorflow=parts.models.loader.tensorflow_version,
                device=parts.models.device,
                started=parts.metrics.machine.started,
                health=parts.health.reading(),
                unready_reasons=parts.readiness.reasons(),
                session_store_problem=parts.sessions.store.problem,
                entries=parts.catalog.registry.entries(),
                loads=parts.loader.loads,
                recent=recent.window(),
            )
        )

    try:
        return MonitoringServer(host, port, parts.metrics.registry, page)
    except OSError as error:
        place = join_address(host, port)
        raise OSError(
            f"--metrics-port: cannot listen on {place}: {error.strerror}: choose another address or port"
        ) from None


async def _listen(parts: Parts, announce: Announce) -> None:
    """Opens the ports, and prints them."""
    settings = parts.settings
    if parts.managing is not None:
        announce(f"management on {join_address(settings.management_host, await parts.managing.start())}")
        await parts.managing.set_all_serving(True)
    announce(f"listening on {join_address(settings.host, await parts.server.start())}")
    announce(
        f"weights: up to {parts.weights_bytes / 2**20:,.0f} MiB on {parts.models.device}"
        + (f", kept in {settings.weights_folder}" if settings.weights_folder else "")
        + (", for every server with this URL" if parts.weights.is_shared else "")
    )
    announce(
        f"requests and responses: up to {parts.capacity.messages_bytes / 2**20:,.0f} MiB at once, less what models take"
    )
    announce(f"metric sessions in {parts.sessions.store.place}")


async def _load(parts: Parts, announce: Announce) -> None:
    """Loads every model, one after another, on another thread than the event loop's."""
    parts.management.relabel()
    await parts.management.load_all()
    # Modules that factories imported.
    garbage.set_aside()
    # A server without models gets here before the session store was checked once.
    await parts.sessions.store_watch.checked.wait()
    await parts.health.models_tried()
    if not parts.health.started.is_set():
        announce(f"not ready: {'; '.join(parts.readiness.reasons())}")


async def _announce_start(parts: Parts, announce: Announce) -> None:
    """Waits until the server has started, and prints that."""
    await parts.health.started.wait()
    entries = parts.catalog.registry.entries()
    failed = [str(entry.source) for entry in entries if entry.state is State.FAILED]
    announce(
        f"ready on {parts.models.device}: {len(entries) - len(failed)} of {len(entries)} models"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )


async def _end(parts: Parts) -> bool:
    """Drains the server and commits session updates. Returns whether all computations have ended."""
    began = time.monotonic()
    if parts.managing is not None:
        await parts.managing.drain()
    await parts.server.drain()
    parts.liveness.end()
    settings = parts.settings
    remaining_s = settings.drain_delay_s + settings.drain_timeout_s - (time.monotonic() - began)
    has_ended = await parts.calls.scheduler.close(max(remaining_s, 0.0))
    if not has_ended:
        _LOGGER.warning("a computation was still running at the end of the drain timeout")
    await parts.sessions.store.close()
    await asyncio.to_thread(parts.catalog.close)
    if parts.tracing is not None:
        await asyncio.to_thread(parts.tracing.close)
    return has_ended
