"""All Prometheus metrics of a server. Label values are bounded: methods, codes and the operator's model names."""

from __future__ import annotations

import prometheus_client as prometheus

from forwardpass_server.telemetry.families import Families, Family
from forwardpass_server.telemetry.files import FileMetrics
from forwardpass_server.telemetry.health import HealthMetrics
from forwardpass_server.telemetry.machine import MachineMetrics
from forwardpass_server.telemetry.models import ModelMetrics
from forwardpass_server.telemetry.rpcs import RpcMetrics
from forwardpass_server.telemetry.sessions import SessionMetrics
from forwardpass_server.telemetry.training import TrainingMetrics
from forwardpass_server.telemetry.weights import WeightMetrics


class Metrics:
    """All metrics of one server, in a registry of their own. `families`: the catalogue, grouped by subject."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        self.families: list[Family] = []
        self.health = HealthMetrics(self._about("Health"))
        self.rpcs = RpcMetrics(self._about("Remote calls"))
        self.models = ModelMetrics(self._about("Models"))
        self.weights = WeightMetrics(self._about("Weights"))
        self.sessions = SessionMetrics(self._about("Metric sessions"))
        self.training = TrainingMetrics(self._about("Training"))
        self.files = FileMetrics(self._about("Files"))
        self.machine = MachineMetrics(self._about("Process and device"))

    def _about(self, subject: str) -> Families:
        return Families(subject, self.registry, self.families)
