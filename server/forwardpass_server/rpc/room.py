"""Builds the gRPC servers: one for calls, and one for management."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwardpass.wire.methods import (
    MANAGEMENT_SERVICE,
    MODEL_SERVICE,
    SESSION_SERVICE,
    TRAINING_SERVICE,
    WEIGHTS_SERVICE,
)
from forwardpass_server.access.guard import Guard
from forwardpass_server.access.tokens import Role
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.calls.room import CallsRoom
from forwardpass_server.catalog.management import Management
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.rpc import handlers
from forwardpass_server.rpc.codec import Codec
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.rpc.management_servicer import ManagementServicer
from forwardpass_server.rpc.server import Server, ServerOptions
from forwardpass_server.rpc.servicer import FunctionalModelServicer
from forwardpass_server.rpc.sessions_servicer import SessionsServicer
from forwardpass_server.rpc.training_servicer import TrainingServicer
from forwardpass_server.rpc.weights_servicer import WeightsServicer
from forwardpass_server.sessions.room import SessionsRoom
from forwardpass_server.status.readiness import Readiness
from forwardpass_server.telemetry.metrics import Metrics
from forwardpass_server.training.service import Trainings
from forwardpass_server.weights.combinations import Combinations
from forwardpass_server.weights.store import WeightStore

if TYPE_CHECKING:
    from forwardpass_server.telemetry.spans import Tracing


def build(
    options: ServerOptions,
    *,
    registry: Registry,
    weights: WeightStore,
    combinations: Combinations,
    calls: CallsRoom,
    sessions: SessionsRoom,
    trainings: Trainings,
    readiness: Readiness,
    guard: Guard,
    metrics: Metrics,
    tracing: Tracing | None,
) -> Server:
    """The server that answers calls."""
    drain, admission, max_message_bytes = Drain(), calls.admission, options.max_message_bytes
    codec = Codec(max_message_bytes, metrics.models)
    sessions_servicer = SessionsServicer(
        sessions.sessions, sessions.evaluations, codec, max_message_bytes, admission, drain
    )
    models_servicer = FunctionalModelServicer(
        registry,
        calls.executor,
        codec,
        max_message_bytes,
        admission,
        metrics,
        readiness,
        handlers.unary(SESSION_SERVICE, sessions_servicer),
        drain,
        weights.is_shared,
        tracing,
    )
    return Server(
        options,
        {
            MODEL_SERVICE: models_servicer,
            WEIGHTS_SERVICE: WeightsServicer(weights, combinations, codec, admission, drain),
            SESSION_SERVICE: sessions_servicer,
            TRAINING_SERVICE: TrainingServicer(trainings, codec, max_message_bytes, admission, drain),
        },
        metrics,
        guard.access(Role.CALL),
        guard.certificates,
        drain,
        calls.arrivals,
        tracing,
        admission,
    )


def build_management(options: ServerOptions, management: Management, metrics: Metrics, guard: Guard) -> Server:
    """The server that loads and unloads models."""
    return Server(
        options,
        {MANAGEMENT_SERVICE: ManagementServicer(management)},
        metrics,
        guard.access(Role.MANAGE),
        guard.certificates,
        Drain(),
        Arrivals(),
    )
