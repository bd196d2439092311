"""Builds what runs the calls of a server."""

from __future__ import annotations

import dataclasses

from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.calls.batching import Batcher, BatchObserver
from forwardpass_server.calls.capacity import Capacity
from forwardpass_server.calls.evaluation_steps import EvaluationSteps
from forwardpass_server.calls.execution import CallObserver, Executor
from forwardpass_server.calls.scheduling import Scheduler
from forwardpass_server.weights.store import WeightStore


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallsOptions:
    """threads: computations at once beside the event loop. max_batch_rows: of a batch made of several calls."""

    threads: int
    max_batch_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallsRoom:
    """What admits calls, and what runs them."""

    admission: Admission
    arrivals: Arrivals
    scheduler: Scheduler
    executor: Executor
    evaluation_steps: EvaluationSteps


def build(
    options: CallsOptions,
    capacity: Capacity,
    weights: WeightStore,
    call_observer: CallObserver,
    batch_observer: BatchObserver,
) -> CallsRoom:
    """The executor of a server and its parts. capacity: limits the calls at once."""
    scheduler, arrivals = Scheduler(options.threads), Arrivals()
    batcher = Batcher(scheduler, arrivals, batch_observer, options.max_batch_rows)
    return CallsRoom(
        admission=capacity.admission,
        arrivals=arrivals,
        scheduler=scheduler,
        executor=Executor(weights, scheduler, batcher, call_observer, capacity.admission),
        evaluation_steps=EvaluationSteps(scheduler, call_observer),
    )
