"""The service's Prometheus metrics. Labels are bounded: methods, codes and the operator's model names."""

from __future__ import annotations

from forwardpass_server.telemetry.families import Families
from forwardpass_server.telemetry.machine import MachineMetrics
from forwardpass_server.telemetry.models import ModelMetrics
from forwardpass_server.telemetry.rpcs import RpcMetrics
from forwardpass_server.telemetry.sessions import SessionMetrics
from forwardpass_server.telemetry.weights import WeightMetrics


class Metrics:
    """All metrics of one server, in a registry of their own. `families`: what there is, by subject."""

    def __init__(self) -> None:
        made = Families()
        self.registry = made.registry
        self.families = made.made
        self.rpcs = RpcMetrics(made)
        self.models = ModelMetrics(made)
        self.weights = WeightMetrics(made)
        self.sessions = SessionMetrics(made)
        self.machine = MachineMetrics(made)
