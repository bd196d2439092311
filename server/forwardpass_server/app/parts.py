"""Builds a server from its settings: each room builds itself, and this module joins them."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.metadata
import logging
import urllib.parse
from typing import TYPE_CHECKING

from forwardpass.wire.hosts import is_loopback
from forwardpass_server.access.guard import Guard, GuardOptions
from forwardpass_server.app.health import Health
from forwardpass_server.app.settings import Settings
from forwardpass_server.calls import room as calls_room
from forwardpass_server.calls.capacity import Capacity, CapacityOptions
from forwardpass_server.calls.memory_budget import MemoryBudget
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.calls.room import CallsOptions, CallsRoom
from forwardpass_server.catalog import room as catalog_room
from forwardpass_server.catalog.load_log import ObservedLoader
from forwardpass_server.catalog.management import RegistryManagement
from forwardpass_server.catalog.registry import State
from forwardpass_server.catalog.required_models import RequiredModels
from forwardpass_server.catalog.room import CatalogRoom
from forwardpass_server.errors import SettingsError
from forwardpass_server.models import room as models_room
from forwardpass_server.models.room import ModelsOptions, ModelsRoom
from forwardpass_server.models.trial_process import TrialProcess
from forwardpass_server.process import control_groups, garbage
from forwardpass_server.process.liveness import Liveness
from forwardpass_server.rpc import room as rpc_room
from forwardpass_server.rpc.server import OPENABLE, Server, ServerOptions
from forwardpass_server.sessions import room as sessions_room
from forwardpass_server.sessions.room import SessionsRoom
from forwardpass_server.sessions.store import SessionLimits, SessionStore
from forwardpass_server.sessions.stores import opening
from forwardpass_server.status.readiness import Readiness
from forwardpass_server.telemetry import gpus, machine
from forwardpass_server.telemetry.metrics import Metrics
from forwardpass_server.training import room as training_room
from forwardpass_server.training.service import Trainings
from forwardpass_server.weights import room as weights_room
from forwardpass_server.weights.combinations import Combinations
from forwardpass_server.weights.deletions import Deletions
from forwardpass_server.weights.room import WeightsOptions
from forwardpass_server.weights.store import StoreOptions, WeightStore

if TYPE_CHECKING:
    from forwardpass_server.telemetry.spans import Tracing

_LOGGER = logging.getLogger(__name__)

# Between two trials of the device. Probes come about every ten seconds.
_TRIAL_INTERVAL_S = 5.0

# A management message holds names and version numbers only.
_MAX_MANAGEMENT_BYTES = 2**20

# How long after its expiry a session is reported as expired, and not as unknown.
_REMEMBER_EXPIRED_S = 24 * 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a server that start, run and end together.

    version: of this package. managing: the server of the management port; None if there is none.
    """

    settings: Settings
    version: str
    metrics: Metrics
    tracing: Tracing | None
    guard: Guard
    catalog: CatalogRoom
    models: ModelsRoom
    loader: ObservedLoader
    weights: WeightStore
    deletions: Deletions | None
    weights_bytes: int
    capacity: Capacity
    calls: CallsRoom
    sessions: SessionsRoom
    trainings: Trainings
    server: Server
    liveness: Liveness
    readiness: Readiness
    health: Health
    management: RegistryManagement
    managing: Server | None


async def join(settings: Settings, trial_process: TrialProcess | None) -> Parts:
    """Builds the parts of a server.

    trial_process: the child process in which models are tried; None where they are not.
    Raises DeviceNotFound, SettingsError, ModelLoadError or SessionStoreError for settings that cannot be used.
    """
    metrics, tracing = Metrics(), _tracing(settings.trace_endpoint)
    guard = _guard(settings)
    models = models_room.build(_models_options(settings), metrics.models.trace, trial_process)
    # On a thread: the versions of a repository with a URL are copied.
    catalog = await asyncio.to_thread(
        catalog_room.build, settings.model_repository, settings.factories, settings.repository_cache
    )
    weights_bytes = settings.weights_bytes or models.placement.default_budget_bytes()
    # On a thread: a tier that does not answer takes seconds.
    in_weights = await asyncio.to_thread(
        weights_room.build, _weights_options(settings, weights_bytes), models.placement, metrics.weights
    )
    weights = in_weights.store
    capacity = _capacity(settings, catalog, weights_bytes if models.is_on_cpu else 0)
    calls = calls_room.build(
        CallsOptions(threads=settings.execution_threads, max_batch_rows=settings.max_batch_examples),
        capacity,
        weights,
        tracing.of_calls(metrics.models) if tracing else metrics.models,
        metrics.models,
    )
    sessions = sessions_room.build(
        await _session_store(settings, metrics),
        catalog.registry,
        weights,
        calls,
        metrics.sessions,
        max_state_bytes=settings.max_state_bytes,
    )
    trainings = training_room.build(
        catalog.registry, weights, calls, metrics.training, optimizers=settings.training_optimizers
    )
    liveness = Liveness(models.placement, _TRIAL_INTERVAL_S, settings.device_timeout_s)
    required = RequiredModels(catalog.registry, settings.required_models)
    readiness = Readiness(required, sessions.store_watch, liveness)
    server = rpc_room.build(
        _server_options(settings),
        registry=catalog.registry,
        weights=weights,
        combinations=Combinations(weights, models.placement),
        calls=calls,
        sessions=sessions,
        trainings=trainings,
        readiness=readiness,
        guard=guard,
        metrics=metrics,
        tracing=tracing,
    )
    health = Health(server, catalog.registry, liveness, readiness)
    loader = ObservedLoader(models.loader, metrics.models)
    management = RegistryManagement(
        catalog.registry,
        loader,
        catalog.folder,
        settings.factories,
        catalog.policies,
        functools.partial(_model_changed, health, capacity, catalog, loader, metrics),
        sessions.models,
        settings.unload_with_sessions == "refuse",
        catalog.refresh,
    )
    parts = Parts(
        settings=settings,
        version=importlib.metadata.version("forwardpass"),
        metrics=metrics,
        tracing=tracing,
        guard=guard,
        catalog=catalog,
        models=models,
        loader=loader,
        weights=weights,
        deletions=in_weights.deletions,
        weights_bytes=weights_bytes,
        capacity=capacity,
        calls=calls,
        sessions=sessions,
        trainings=trainings,
        server=server,
        liveness=liveness,
        readiness=readiness,
        health=health,
        management=management,
        managing=_management_server(settings, management, metrics, guard),
    )
    _show(parts)
    return parts


def _show(parts: Parts) -> None:
    """Connects the gauges of the metrics to what they show."""
    metrics, models, admission, store = parts.metrics, parts.models, parts.calls.admission, parts.sessions.store
    parts.guard.show(metrics.files)
    metrics.machine.build(parts.version, models.loader.tensorflow_version, models.device)
    metrics.machine.read_device = gpus.reader(models.device)
    for state in State:
        metrics.models.in_state(state.value, functools.partial(parts.catalog.registry.count, state))
    metrics.rpcs.messages(lambda: admission.size_bytes, lambda: admission.limit_bytes)
    metrics.sessions.store(store.count, store.is_shared, lambda: not store.problem)
    metrics.training.states(lambda: parts.trainings.states_bytes)
    metrics.health.read = parts.health.reading


def _guard(settings: Settings) -> Guard:
    """Reads the certificates and tokens. Warns of a port that others can reach and that is not protected."""
    guard = Guard(
        GuardOptions(
            certificate=settings.tls_certificate,
            key=settings.tls_key,
            client_ca=settings.tls_client_ca,
            tokens=settings.tokens,
            open_services=frozenset(name for one in settings.open_services for name in OPENABLE[one]),
        )
    )
    if not is_loopback(settings.host):
        if guard.certificates is None:
            _LOGGER.warning("requests and responses on %s are not encrypted by this server", settings.host)
        if not settings.tells_principals_apart:
            _LOGGER.warning("everybody who can reach %s may call this server", settings.host)
    return guard


def _models_options(settings: Settings) -> ModelsOptions:
    return ModelsOptions(
        device=settings.device,
        cores=control_groups.cores(),
        batching=settings.batching,
        imports=settings.imports,
        factories=list(settings.factories.values()),
    )


def _weights_options(settings: Settings, budget_bytes: int) -> WeightsOptions:
    return WeightsOptions(
        store=StoreOptions(
            budget_bytes=budget_bytes,
            principal_bytes=settings.share(settings.weights_bytes_per_principal, budget_bytes),
            upload_expiry_s=settings.upload_expiry_s,
        ),
        folder=settings.weights_folder,
        disk_bytes=settings.weights_disk_bytes,
    )


def _capacity(settings: Settings, catalog: CatalogRoom, weights_bytes: int) -> Capacity:
    """weights_bytes: the memory of this process that weights of callers may take."""
    options = CapacityOptions(
        max_message_bytes=settings.max_message_bytes,
        max_calls=settings.max_concurrent_calls,
        max_bytes=settings.max_concurrent_bytes,
        principal_calls=functools.partial(settings.share, settings.max_concurrent_calls_per_principal),
        principal_bytes=functools.partial(settings.share, settings.max_concurrent_bytes_per_principal),
    )
    budget = MemoryBudget(
        memory_bytes=control_groups.memory_bytes(), base_bytes=machine.resident_bytes(), weights_bytes=weights_bytes
    )
    return Capacity(options, budget, catalog.models_bytes)


async def _session_store(settings: Settings, metrics: Metrics) -> SessionStore:
    limits = SessionLimits(
        max_sessions=settings.max_sessions,
        max_bytes=settings.sessions_bytes,
        idle_expiry_s=settings.session_expiry_s,
        remember_s=_REMEMBER_EXPIRED_S,
    )
    # With port 0 every start gets another port, and would get another file.
    default_file = f"sessions-{settings.port}.sqlite3" if settings.port else None
    return await opening.open_store(settings.session_store, default_file, limits, metrics.sessions)


def _server_options(settings: Settings) -> ServerOptions:
    return ServerOptions(
        host=settings.host,
        port=settings.port,
        max_message_bytes=settings.max_message_bytes,
        max_unary_bytes=settings.max_unary_bytes,
        connection_idle_s=settings.connection_idle_s,
        accept_compressed=settings.accept_compressed,
        drain_delay_s=settings.drain_delay_s,
        drain_timeout_s=settings.drain_timeout_s,
    )


def _management_server(
    settings: Settings, management: RegistryManagement, metrics: Metrics, guard: Guard
) -> Server | None:
    if settings.management_port is None:
        return None
    options = dataclasses.replace(
        _server_options(settings),
        host=settings.management_host,
        port=settings.management_port,
        max_message_bytes=_MAX_MANAGEMENT_BYTES,
        # No load balancer watches this port, and a load that runs is not waited for.
        drain_delay_s=0,
        drain_timeout_s=0,
    )
    return rpc_room.build_management(options, management, metrics, guard)


def _tracing(endpoint: str | None) -> Tracing | None:
    if endpoint is None:
        return None
    try:
        from forwardpass_server.telemetry.spans import Tracing
    except ImportError:
        raise SettingsError(
            "--trace-endpoint: OpenTelemetry is not installed: pip install 'forwardpass[tracing]'"
        ) from None
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    return Tracing(endpoint, uses_proxy=not is_loopback(host))


async def _model_changed(
    health: Health,
    capacity: Capacity,
    catalog: CatalogRoom,
    loader: ObservedLoader,
    metrics: Metrics,
    source: ModelSource,
) -> None:
    """Updates health, limits, metrics and the load log after a version was loaded, failed, or was unloaded."""
    await asyncio.to_thread(garbage.collect)
    known = [(entry.source.name, entry.source.version) for entry in catalog.registry.entries()]
    if (source.name, source.version) not in known:
        loader.forget(source)
    if source.name not in dict(known):
        metrics.models.forget(source.name)
        metrics.training.forget(source.name)
    capacity.refresh()
    await health.model_changed(source)
