"""Builds what trains models on the server."""

from __future__ import annotations

from typing import Protocol

from forwardpass_server.calls.room import CallsRoom
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.training.preparation import PreparationObserver, Preparations
from forwardpass_server.training.service import TrainingObserver, Trainings
from forwardpass_server.training.turns import Turns
from forwardpass_server.weights.store import WeightStore


class Observer(TrainingObserver, PreparationObserver, Protocol):
    """Receives measurements of updates and of preparations."""


def build(
    registry: Registry, weights: WeightStore, calls: CallsRoom, observer: Observer, *, optimizers: str
) -> Trainings:
    """What trains the models of a registry. optimizers: those that may train, see `preparation.ANY`."""
    preparations = Preparations(optimizers, observer)
    turns = Turns(calls.scheduler, calls.arrivals)
    return Trainings(registry, weights, preparations, turns, calls.admission, observer)
