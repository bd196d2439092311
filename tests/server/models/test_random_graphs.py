"""Random graphs: each is served as it runs locally, and batched only where other callers' rows change nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import types
from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow as tf

from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.calls.batching import Batcher
from forwardpass_server.calls.scheduling import CallTimes, Estimates, Scheduler
from forwardpass_server.models import row_analysis
from support.predictors import Predictor
from support.random_graphs import RandomGraph

_GRAPHS = 500
_SEED = 20_240_611

# Rows of each caller of a batch.
_CALLERS = (2, 0, 1, 5)


class Observer:
    def __init__(self):
        self.calls = []

    def batched_calls(self, calls):
        self.calls.append(calls)

    def batch_wait(self, seconds):
        assert seconds >= 0


@dataclasses.dataclass
class Outcome:
    """What became of one graph. difference: what was wrong with it; "" for nothing."""

    graph: RandomGraph
    reason: str
    difference: str


async def _batched(scheduler: Scheduler, predictor: Predictor, callers: Sequence[Sequence[np.ndarray]]) -> list:
    """What the server's own batcher answers to callers that come at the same time."""
    observer = Observer()
    batcher = Batcher(scheduler, Arrivals(), observer, max_rows=100)
    batcher._turns = 4  # Calls have come together of late: these are waited for.
    plan = types.SimpleNamespace(run=predictor.run_flat, estimates=Estimates())
    answers = await asyncio.gather(*(batcher.predict(plan, predictor.weights, x, 100, CallTimes()) for x in callers))
    assert observer.calls == [len(callers)]
    return answers


def _agree(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether results are equal but for the order in which float32 numbers were summed, 1e-4 of the largest.

    Sums that cancel out leave rounding alone: numbers below 1 count as 1.
    """
    if one.shape != other.shape or one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    scale = max(float(np.abs(one[np.isfinite(one)]).max(initial=0)), 1)
    return bool(np.allclose(one, other, rtol=0, atol=1e-4 * scale, equal_nan=True))


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype.kind == "O":
        return bool(np.array_equal(one, other))
    return one.shape == other.shape and one.tobytes() == other.tobytes()


async def _difference(scheduler: Scheduler, graph: RandomGraph, predictor: Predictor) -> str:
    """What other callers' rows change in a caller's answers; "" for nothing."""
    mine = [graph.inputs(rows, seed) for seed, rows in enumerate(_CALLERS)]
    others = [graph.inputs(rows, seed + 100) for seed, rows in enumerate(_CALLERS)]
    alone = [predictor.run(x) for x in mine]
    together = await _batched(scheduler, predictor, mine)
    for index, rows in enumerate(_CALLERS):
        # The same rows in the same places of a batch of the same size, which runs the same kernels: with the rows of
        # other neighbours, every bit is the same.
        neighbours = await _batched(scheduler, predictor, [*others[:index], mine[index], *others[index + 1 :]])
        for position in range(len(predictor.spec.predictions.leaves)):
            one, joined, again = alone[index][position], together[index][position], neighbours[index][position]
            if len(one) != rows or one.shape != joined.shape:
                return f"caller {index} has results of shapes {one.shape} alone and {joined.shape} in a batch"
            if not _same_bits(joined, again):
                return f"the results of caller {index} change with its neighbours"
            # Rounding or comparing may turn the last bit of a float into a whole number.
            if not graph.is_sensitive and not _agree(one, joined):
                return f"caller {index} has other results alone"
    return ""


async def _outcomes() -> list[Outcome]:
    scheduler = Scheduler(2)
    outcomes = []
    try:
        for number in range(_GRAPHS):
            graph = RandomGraph(_SEED + number)
            predictor = Predictor(graph.predict, graph.x, graph.weights)
            difference = _difference_from_local(graph, predictor)
            reason = predictor.reason()
            if not reason and not difference:
                difference = await _difference(scheduler, graph, predictor)
            outcomes.append(Outcome(graph, reason, difference))
    finally:
        await scheduler.close(10)
    return outcomes


def _difference_from_local(graph: RandomGraph, predictor: Predictor) -> str:
    """What the served graph answers other than the same Python code, run by TensorFlow operation by operation."""
    for rows in (3, 1, 0):
        x = graph.inputs(rows, rows)
        local, failure = None, None
        try:
            local = graph.predict([tf.constant(leaf) for leaf in x], [tf.constant(leaf) for leaf in graph.weights])
        except Exception as error:
            failure = error
        try:
            served = predictor.run(x)
        except Exception as error:
            if failure is None:
                return f"{rows} rows are refused: {error}"
            continue
        if failure is not None:
            return f"{rows} rows are served, and refused locally: {failure}"
        for one, other in zip(local, served, strict=True):
            if one.shape != other.shape or not (graph.is_sensitive or _agree(one.numpy(), other)):
                return f"{rows} rows: local {one.shape}, served {other.shape}"
    return ""


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return asyncio.run(_outcomes())


def test_every_random_graph_is_served_as_it_runs_locally_and_batched_as_it_runs_alone(outcomes):
    assert [(outcome.graph.steps, outcome.difference) for outcome in outcomes if outcome.difference] == []


def test_the_probe_accepts_every_random_graph_that_the_rules_accept(outcomes):
    found = [outcome for outcome in outcomes if "differ between a batch" in outcome.reason]
    assert [outcome.graph.steps for outcome in found if not outcome.graph.is_sensitive] == []


def test_many_random_graphs_are_accepted_and_many_are_refused(outcomes):
    accepted = [outcome for outcome in outcomes if not outcome.reason]
    # A proof that refused everything would be right, and of no use.
    assert len(accepted) >= _GRAPHS * 0.5
    # The others mix rows, or hold an operation that has no rule.
    assert len(accepted) <= _GRAPHS * 0.8


def test_the_random_graphs_use_most_rules(outcomes):
    reached = {operation for outcome in outcomes for operation in outcome.graph.operations}
    missing = set(row_analysis.RULES) - reached
    assert len(missing) <= len(row_analysis.RULES) * 0.25, sorted(missing)
