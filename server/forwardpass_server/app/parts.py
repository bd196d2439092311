"""What a server is made of, joined from its settings."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.metadata
import urllib.parse
from typing import TYPE_CHECKING

from forwardpass.wire.methods import MANAGEMENT_SERVICE, MODEL_SERVICE, SESSION_SERVICE, WEIGHTS_SERVICE
from forwardpass_server.access.tokens import Role
from forwardpass_server.app import session_stores
from forwardpass_server.app.capacity import Capacity
from forwardpass_server.app.health import Health
from forwardpass_server.app.security import Security
from forwardpass_server.app.settings import Settings, SettingsError, is_loopback
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.calls.batching import Batcher
from forwardpass_server.calls.execution import Executor
from forwardpass_server.calls.memory_budget import MemoryBudget
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.calls.scheduling import Scheduler
from forwardpass_server.catalog import repository
from forwardpass_server.catalog.load_log import ObservedLoader
from forwardpass_server.catalog.management import Management, RegistryManagement
from forwardpass_server.catalog.registry import Registry, State
from forwardpass_server.catalog.required_models import RequiredModels
from forwardpass_server.catalog.version_policy import VersionPolicies
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import device as devices
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.models.placement import TensorFlowDevice
from forwardpass_server.models.trial_process import TrialProcess
from forwardpass_server.process import control_groups, garbage
from forwardpass_server.process.liveness import Liveness
from forwardpass_server.rpc import handlers
from forwardpass_server.rpc.codec import Codec
from forwardpass_server.rpc.departure import Departure
from forwardpass_server.rpc.management_servicer import ManagementServicer
from forwardpass_server.rpc.server import Server, ServerOptions
from forwardpass_server.rpc.servicer import FunctionalModelServicer
from forwardpass_server.rpc.sessions_servicer import SessionsServicer
from forwardpass_server.rpc.weights_servicer import WeightsServicer
from forwardpass_server.sessions.cache import KnownSessions
from forwardpass_server.sessions.commits import SessionCommits
from forwardpass_server.sessions.evaluation import Evaluations
from forwardpass_server.sessions.retained_models import SessionModels
from forwardpass_server.sessions.service import Sessions
from forwardpass_server.sessions.store import SessionStore
from forwardpass_server.sessions.store_watch import SessionStoreWatch
from forwardpass_server.status.readiness import Readiness
from forwardpass_server.telemetry import gpus, machine
from forwardpass_server.telemetry.metrics import Metrics
from forwardpass_server.telemetry.models import ModelMetrics
from forwardpass_server.weights.files import WeightFiles
from forwardpass_server.weights.store import StoreOptions, WeightStore

if TYPE_CHECKING:
    from forwardpass_server.telemetry.tracing import Tracing

# Between trials of the device: probes come every ten seconds or so.
_TRIAL_S = 5.0

# Names and numbers of versions.
_MAX_MANAGEMENT_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What starts, runs and ends together.

    device, version, tensorflow_version: for people. managing: the server of the management port; None for none.
    """

    settings: Settings
    version: str
    tensorflow_version: str
    device: str
    metrics: Metrics
    tracing: Tracing | None
    security: Security
    policies: VersionPolicies
    registry: Registry
    loader: ObservedLoader
    scheduler: Scheduler
    capacity: Capacity
    weights: WeightStore
    weights_bytes: int
    session_store: SessionStore
    store_watch: SessionStoreWatch
    session_models: SessionModels
    known_sessions: KnownSessions
    server: Server
    liveness: Liveness
    readiness: Readiness
    health: Health
    management: RegistryManagement
    managing: Server | None


async def join(settings: Settings, trial_process: TrialProcess | None) -> Parts:
    """trial_process: the child process in which models are tried; None where they are not.

    Raises DeviceNotFound, SettingsError, ModelLoadError or SessionStoreError for settings that cannot be used.
    """
    metrics = Metrics()
    tracing = _tracing(settings.trace_endpoint)
    security = Security(settings)
    security.show(metrics.files)
    devices.use_cores(control_groups.cores())
    tensorflow = TensorFlowLoader(
        settings.device,
        metrics.models.trace,
        settings.batching,
        trial_process,
        imports=settings.imports,
        factories=list(settings.factories.values()),
    )
    device = tensorflow.device.removeprefix("/device:")
    version = importlib.metadata.version("forwardpass")
    metrics.machine.build(version, tensorflow.tensorflow_version, device)
    metrics.machine.read_device = gpus.reader(device)
    policies, registry = _models(settings)
    for state in State:
        metrics.models.in_state(state.value, functools.partial(registry.count, state))
    placing = TensorFlowDevice(tensorflow.device)
    weights_bytes = settings.weights_bytes or placing.default_budget_bytes()
    weights = _weight_store(settings, placing, weights_bytes, metrics)
    scheduler = Scheduler(settings.execution_threads)
    arrivals = Arrivals()
    batcher = Batcher(scheduler, arrivals, metrics.models, settings.max_batch_examples)
    capacity = Capacity(settings, _memory_budget(weights_bytes, device), registry)
    admission = capacity.admission
    metrics.rpcs.messages(lambda: admission.size_bytes, lambda: admission.limit_bytes)
    observer = tracing.of_calls(metrics.models) if tracing else metrics.models
    executor = Executor(weights, scheduler, batcher, observer, admission)
    session_store = await session_stores.open_store(settings, metrics.sessions)
    metrics.sessions.store(session_store.count, session_store.is_shared, lambda: not session_store.problem)
    store_watch = SessionStoreWatch(session_store)
    liveness = Liveness(placing, _TRIAL_S, settings.device_timeout_s)
    readiness = Readiness(RequiredModels(registry, settings.required_models), store_watch, liveness)
    session_models = SessionModels(registry, session_store)
    known_sessions = KnownSessions(session_store, session_models)
    commits = SessionCommits(session_store, metrics.sessions, settings.max_state_bytes)
    sessions = Sessions(session_store, session_models, known_sessions, commits, executor, admission)
    evaluations = Evaluations(sessions, weights, executor, admission)
    departure = Departure()
    codec = Codec(settings.max_message_bytes, metrics.models)
    sessions_servicer = SessionsServicer(sessions, evaluations, codec, settings.max_message_bytes, admission, departure)
    server = Server(
        ServerOptions(
            host=settings.host,
            port=settings.port,
            max_message_bytes=settings.max_message_bytes,
            max_unary_bytes=settings.max_unary_bytes,
            connection_idle_s=settings.connection_idle_s,
            accept_compressed=settings.accept_compressed,
            drain_delay_s=settings.drain_delay_s,
            drain_timeout_s=settings.drain_timeout_s,
        ),
        {
            MODEL_SERVICE: FunctionalModelServicer(
                registry,
                executor,
                codec,
                settings.max_message_bytes,
                admission,
                metrics,
                readiness,
                handlers.unary(SESSION_SERVICE, sessions_servicer),
                departure,
                tracing,
            ),
            WEIGHTS_SERVICE: WeightsServicer(weights, codec, departure),
            SESSION_SERVICE: sessions_servicer,
        },
        metrics,
        security.access(Role.CALL),
        security.certificates,
        departure,
        arrivals,
        tracing,
        admission,
    )
    health = Health(server, registry, liveness, readiness)
    metrics.health.read = health.reading
    loader = ObservedLoader(tensorflow, metrics.models)
    management = RegistryManagement(
        registry,
        loader,
        settings.model_repository,
        settings.factories,
        policies,
        functools.partial(_model_changed, health, capacity, registry, loader, metrics.models),
        session_models,
        settings.unload_with_sessions == "refuse",
    )
    return Parts(
        settings=settings,
        version=version,
        tensorflow_version=tensorflow.tensorflow_version,
        device=device,
        metrics=metrics,
        tracing=tracing,
        security=security,
        policies=policies,
        registry=registry,
        loader=loader,
        scheduler=scheduler,
        capacity=capacity,
        weights=weights,
        weights_bytes=weights_bytes,
        session_store=session_store,
        store_watch=store_watch,
        session_models=session_models,
        known_sessions=known_sessions,
        server=server,
        liveness=liveness,
        readiness=readiness,
        health=health,
        management=management,
        managing=_management_server(settings, management, metrics, security),
    )


def _models(settings: Settings) -> tuple[VersionPolicies, Registry]:
    """The versions that are to be served at the start."""
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
    return policies, Registry(sources)


def _weight_store(settings: Settings, device: TensorFlowDevice, budget_bytes: int, metrics: Metrics) -> WeightStore:
    files = None
    if settings.weights_folder is not None:
        try:
            files = kept = WeightFiles(settings.weights_folder, settings.weights_disk_bytes)
        except OSError as error:
            raise SettingsError(f"--weights-folder: {error}") from None
        metrics.weights.files(lambda: kept.size_bytes, settings.weights_disk_bytes, lambda: kept.set_count)
    options = StoreOptions(
        budget_bytes=budget_bytes,
        principal_bytes=settings.share(settings.weights_bytes_per_principal, budget_bytes),
        upload_expiry_s=settings.upload_expiry_s,
    )
    store = WeightStore(options, device, metrics.weights, files)
    metrics.weights.store(lambda: store.used_bytes, budget_bytes, lambda: store.set_count, lambda: store.tensor_count)
    return store


def _memory_budget(weights_bytes: int, device: str) -> MemoryBudget:
    return MemoryBudget(
        memory_bytes=control_groups.memory_bytes(),
        base_bytes=machine.resident_bytes(),
        weights_bytes=weights_bytes if device.startswith("CPU") else 0,
    )


def _management_server(
    settings: Settings, management: Management, metrics: Metrics, security: Security
) -> Server | None:
    if settings.management_port is None:
        return None
    return Server(
        ServerOptions(
            host=settings.management_host,
            port=settings.management_port,
            max_message_bytes=_MAX_MANAGEMENT_BYTES,
            max_unary_bytes=_MAX_MANAGEMENT_BYTES,
            connection_idle_s=settings.connection_idle_s,
            accept_compressed=settings.accept_compressed,
            # No client is sent elsewhere, and a load that runs is given up.
            drain_delay_s=0,
            drain_timeout_s=0,
        ),
        {MANAGEMENT_SERVICE: ManagementServicer(management)},
        metrics,
        security.access(Role.MANAGE),
        security.certificates,
        Departure(),
        Arrivals(),
    )


def _tracing(endpoint: str | None) -> Tracing | None:
    if endpoint is None:
        return None
    try:
        from forwardpass_server.telemetry.tracing import Tracing
    except ImportError:
        raise SettingsError("--trace-endpoint: expected OpenTelemetry: install forwardpass[tracing]") from None
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    return Tracing(endpoint, uses_proxy=not is_loopback(host))


async def _model_changed(
    health: Health,
    capacity: Capacity,
    registry: Registry,
    loader: ObservedLoader,
    metrics: ModelMetrics,
    source: ModelSource,
) -> None:
    """Says of a model, and of its version, whether it can be called; forgets what there was of one that is gone."""
    await asyncio.to_thread(garbage.collect)
    known = [(entry.source.name, entry.source.version) for entry in registry.entries()]
    if (source.name, source.version) not in known:
        loader.forget(source)
    if source.name not in dict(known):
        metrics.forget(source.name)
    capacity.refresh()
    await health.model_changed(source)
