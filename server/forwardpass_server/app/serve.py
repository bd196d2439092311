"""Starts a server, loads its models, and ends it when told to."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import prometheus_client

from forwardpass.wire import errors
from forwardpass.wire.methods import MANAGEMENT_SERVICE, MODEL_SERVICE, SESSION_SERVICE, WEIGHTS_SERVICE
from forwardpass_server.app import allocator, session_stores, status_page
from forwardpass_server.app.health import Health
from forwardpass_server.app.monitoring import MonitoringServer
from forwardpass_server.app.security import Security
from forwardpass_server.app.settings import Settings, SettingsError
from forwardpass_server.app.status_page import Status
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.models.placement import TensorFlowDevice
from forwardpass_server.rpc import handlers
from forwardpass_server.rpc.departure import Departure
from forwardpass_server.rpc.management_servicer import ManagementServicer
from forwardpass_server.rpc.server import Server, ServerOptions, join_address
from forwardpass_server.rpc.servicer import FunctionalModelServicer
from forwardpass_server.rpc.sessions_servicer import SessionsServicer
from forwardpass_server.rpc.weights_servicer import WeightsServicer
from forwardpass_server.serving import repository
from forwardpass_server.serving.admission import Admission, Limits
from forwardpass_server.serving.batching import Batcher
from forwardpass_server.serving.calls import Caller
from forwardpass_server.serving.errors import ModelLoadError
from forwardpass_server.serving.evaluation import Evaluations
from forwardpass_server.serving.liveness import Liveness
from forwardpass_server.serving.loading import ObservedLoader
from forwardpass_server.serving.management import Management, RegistryManagement
from forwardpass_server.serving.models import ModelSource
from forwardpass_server.serving.registry import Registry, State
from forwardpass_server.serving.repository_watch import RepositoryWatch
from forwardpass_server.serving.scheduling import Scheduler
from forwardpass_server.serving.session_store import SessionStore
from forwardpass_server.serving.sessions import Sessions
from forwardpass_server.serving.tokens import Role
from forwardpass_server.serving.version_policy import VersionPolicies
from forwardpass_server.serving.weight_files import WeightFiles
from forwardpass_server.serving.weights import StoreOptions, WeightStore
from forwardpass_server.telemetry import gpus
from forwardpass_server.telemetry.metrics import Metrics
from forwardpass_server.telemetry.models import ModelMetrics
from forwardpass_server.telemetry.recent import INTERVAL_S, Recent

if TYPE_CHECKING:
    from forwardpass_server.telemetry.tracing import Tracing

_LOGGER = logging.getLogger(__name__)

_SWEEP_S = 1.0

# Between trials of the device: probes come every ten seconds or so.
_TRIAL_S = 5.0

# Between looks at the files of certificates and tokens: how long one that was revoked is still good.
_WATCH_S = 1.0

# Names and numbers of versions.
_MAX_MANAGEMENT_BYTES = 2**20


async def serve(settings: Settings, announce: Callable[[str], None]) -> bool:
    """Serves until SIGTERM or SIGINT.

    announce: is told, once each, where the server listens, what weights may take, and when the models are loaded.
    Returns whether everything has ended: otherwise a model still computes or loads, and only the end of the process
    can end it. Raises DeviceNotFound, SettingsError, or OSError where a port is taken.
    """
    allocator.keep_freed_memory()
    # When a series began is a series more for each, and what rates are made of says it too.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = Metrics()
    tracing = _tracing(settings.trace_endpoint)
    tensorflow = TensorFlowLoader(settings.device, metrics.models.trace, settings.batching)
    device_name = tensorflow.device.removeprefix("/device:")
    version = importlib.metadata.version("forwardpass")
    metrics.machine.build(version, tensorflow.tensorflow_version, device_name)
    metrics.machine.read_device = gpus.reader(device_name)
    loader = ObservedLoader(tensorflow, metrics.models)
    try:
        policies = VersionPolicies(settings.model_repository)
    except ModelLoadError as error:
        raise SettingsError(f"--model-repository: {error}") from None
    sources = repository.from_factories(settings.factories)
    if settings.model_repository is not None:
        found = repository.scan(settings.model_repository)
        for taken in {str(source) for source in sources} & {str(source) for source in found}:
            raise SettingsError(f"--factory: the model repository has a {taken} already")
        sources += policies.served(found)
    registry = Registry(sources)
    for state in State:
        metrics.models.in_state(state.value, functools.partial(registry.count, state))
    scheduler = Scheduler(settings.execution_threads)
    device = TensorFlowDevice(tensorflow.device)
    weights_bytes = settings.weights_bytes or device.default_budget_bytes()
    store = _weight_store(settings, device, weights_bytes, metrics)
    batcher = Batcher(scheduler, metrics.models, settings.max_batch_examples)
    admission = _admission(settings)
    caller = Caller(
        registry, store, scheduler, batcher, tracing.of_calls(metrics.models) if tracing else metrics.models, admission
    )
    security = Security(settings)
    session_store = await session_stores.open_store(settings, metrics.sessions)
    metrics.sessions.store(session_store.count)
    sessions = Sessions(session_store, registry, caller, admission, metrics.sessions, settings.max_state_bytes)
    evaluations = Evaluations(sessions, store, caller, admission)
    departure = Departure()
    sessions_servicer = SessionsServicer(sessions, evaluations, settings.max_message_bytes, metrics.models, departure)
    server = Server(
        ServerOptions(
            host=settings.host,
            port=settings.port,
            max_message_bytes=settings.max_message_bytes,
            connection_idle_s=settings.connection_idle_s,
            drain_delay_s=settings.drain_delay_s,
            drain_timeout_s=settings.drain_timeout_s,
        ),
        {
            MODEL_SERVICE: FunctionalModelServicer(
                registry,
                caller,
                settings.max_message_bytes,
                admission,
                metrics,
                handlers.unary(SESSION_SERVICE, sessions_servicer),
                departure,
                tracing,
            ),
            WEIGHTS_SERVICE: WeightsServicer(store),
            SESSION_SERVICE: sessions_servicer,
        },
        metrics,
        security.access(Role.CALL),
        security.certificates,
        departure,
        tracing,
    )
    liveness = Liveness(device, _TRIAL_S, settings.device_timeout_s)
    health = Health(server, registry, liveness)
    management = RegistryManagement(
        registry,
        loader,
        settings.model_repository,
        settings.factories,
        policies,
        functools.partial(_model_changed, health, registry, loader, metrics.models),
    )
    managing = None
    if settings.management_port is not None:
        managing = _management_server(settings, settings.management_port, management, metrics, security)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _stop, stop, number)
    recent = Recent(metrics.registry)
    monitoring = None
    if settings.metrics_port is not None:

        def page() -> str:
            return status_page.render(
                Status(
                    version=version,
                    tensorflow=tensorflow.tensorflow_version,
                    device=device_name,
                    started=metrics.machine.started,
                    is_draining=stop.is_set(),
                    entries=registry.entries(),
                    loads=loader.loads,
                    recent=recent.window(),
                )
            )

        monitoring = _monitoring_server(settings.metrics_host, settings.metrics_port, metrics, page)
        announce(f"metrics on http://{join_address(settings.metrics_host, monitoring.port)}/metrics")
    if managing is not None:
        announce(f"management on {join_address(settings.management_host, await managing.start())}")
    await health.open()
    port = await server.start()
    announce(f"listening on {join_address(settings.host, port)}")
    announce(
        f"weights: up to {weights_bytes / 2**20:,.0f} MiB on {device_name}"
        + (f", kept in {settings.weights_folder}" if settings.weights_folder else "")
    )
    announce(f"metric sessions in {session_store.place}")
    liveness.start()
    loading = asyncio.create_task(_load(registry, management, health, device_name, announce))
    # What goes wrong in it otherwise than with one model must not leave a server that is never ready.
    loading.add_done_callback(lambda task: None if task.cancelled() or task.exception() is None else stop.set())
    looking_after = [
        asyncio.create_task(work)
        for work in (
            _sweep_weights(store),
            _sweep_sessions(session_store),
            _watch(security),
            _remember(recent),
            health.watch(),
            _follow_repository(settings, management, policies, registry, loading),
        )
    ]
    await stop.wait()
    for task in looking_after:
        task.cancel()
    is_loading = not loading.done()
    loading.cancel()
    began = time.monotonic()
    if managing is not None:
        await managing.drain()
    await server.drain()
    remaining_s = settings.drain_delay_s + settings.drain_timeout_s - (time.monotonic() - began)
    liveness.end()
    has_ended = await scheduler.close(max(remaining_s, 0.0))
    await session_store.close()
    if not has_ended:
        _LOGGER.warning("a computation still ran when the time to drain was over")
    if monitoring is not None:
        monitoring.close()
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    if not is_loading:
        loading.result()
    return has_ended and not is_loading and not management.is_loading


def _weight_store(settings: Settings, device: TensorFlowDevice, budget_bytes: int, metrics: Metrics) -> WeightStore:
    files = None
    if settings.weights_folder is not None:
        files = kept = WeightFiles(settings.weights_folder, settings.weights_disk_bytes)
        metrics.weights.files(lambda: kept.size_bytes, settings.weights_disk_bytes, lambda: kept.set_count)
    options = StoreOptions(
        budget_bytes=budget_bytes,
        principal_bytes=settings.share(settings.weights_bytes_per_principal, budget_bytes),
        upload_expiry_s=settings.upload_expiry_s,
    )
    store = WeightStore(options, device, metrics.weights, files)
    metrics.weights.store(lambda: store.used_bytes, budget_bytes, lambda: store.set_count, lambda: store.tensor_count)
    return store


def _admission(settings: Settings) -> Admission:
    in_all = Limits(calls=settings.max_concurrent_calls, size_bytes=settings.max_concurrent_bytes)
    each = Limits(
        calls=settings.share(settings.max_concurrent_calls_per_principal, in_all.calls),
        size_bytes=settings.share(settings.max_concurrent_bytes_per_principal, in_all.size_bytes),
    )
    return Admission(in_all, each)


def _management_server(
    settings: Settings, port: int, management: Management, metrics: Metrics, security: Security
) -> Server:
    return Server(
        ServerOptions(
            host=settings.management_host,
            port=port,
            max_message_bytes=_MAX_MANAGEMENT_BYTES,
            connection_idle_s=settings.connection_idle_s,
            # No client is sent elsewhere, and a load that runs is given up.
            drain_delay_s=0,
            drain_timeout_s=0,
        ),
        {MANAGEMENT_SERVICE: ManagementServicer(management)},
        metrics,
        security.access(Role.MANAGE),
        security.certificates,
        Departure(),
    )


async def _sweep_weights(store: WeightStore) -> None:
    while True:
        await asyncio.sleep(_SWEEP_S)
        store.sweep()


async def _sweep_sessions(store: SessionStore) -> None:
    while True:
        await asyncio.sleep(_SWEEP_S)
        # Whoever needs the store meanwhile is told what is wrong with it.
        with contextlib.suppress(errors.SessionStoreUnavailable):
            await store.sweep()


async def _watch(security: Security) -> None:
    while True:
        await asyncio.sleep(_WATCH_S)
        await asyncio.to_thread(security.refresh)


def _tracing(endpoint: str | None) -> Tracing | None:
    if endpoint is None:
        return None
    try:
        from forwardpass_server.telemetry.tracing import Tracing
    except ImportError:
        raise SettingsError("--trace-endpoint: expected OpenTelemetry: install forwardpass[tracing]") from None
    return Tracing(endpoint)


async def _remember(recent: Recent) -> None:
    while True:
        await asyncio.sleep(INTERVAL_S)
        await asyncio.to_thread(recent.take)


def _monitoring_server(host: str, port: int, metrics: Metrics, page: Callable[[], str]) -> MonitoringServer:
    try:
        return MonitoringServer(host, port, metrics.registry, page)
    except OSError as error:
        raise OSError(f"--metrics-port: cannot listen on {join_address(host, port)}: {error.strerror}") from None


def _stop(stop: asyncio.Event, number: int) -> None:
    if stop.is_set() and number == signal.SIGINT:
        _LOGGER.warning("interrupted again: ending at once")
        os._exit(1)
    stop.set()


async def _follow_repository(
    settings: Settings,
    management: RegistryManagement,
    policies: VersionPolicies,
    registry: Registry,
    loading: asyncio.Task[None],
) -> None:
    if settings.model_repository is None or not settings.repository_poll_s:
        return
    known = [entry.source for entry in registry.entries() if entry.source.folder is not None]
    watch = RepositoryWatch(management, settings.model_repository, policies, known)
    # What the start has to load comes first.
    await asyncio.wait([loading])
    await watch.watch(settings.repository_poll_s)


async def _model_changed(
    health: Health, registry: Registry, loader: ObservedLoader, metrics: ModelMetrics, source: ModelSource
) -> None:
    """Says of a model, and of its version, whether it can be called; forgets what there was of one that is gone."""
    known = [(entry.source.name, entry.source.version) for entry in registry.entries()]
    if (source.name, source.version) not in known:
        loader.forget(source)
    if source.name not in dict(known):
        metrics.forget(source.name)
    await health.model_changed(source)


async def _load(
    registry: Registry, management: RegistryManagement, health: Health, device: str, announce: Callable[[str], None]
) -> None:
    """Loads every model, one after another beside the event loop, and then says so."""
    management.relabel()
    await management.load_all()
    # TensorFlow and the models are hundreds of thousands of objects that stay. The garbage collector would look at them
    # again and again, while calls wait.
    gc.collect()
    gc.freeze()
    entries = registry.entries()
    await health.models_tried()
    failed = [str(entry.source) for entry in entries if entry.state is State.FAILED]
    announce(
        f"ready on {device}: {len(entries) - len(failed)} of {len(entries)} models"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
