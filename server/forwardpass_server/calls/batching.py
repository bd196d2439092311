"""Runs the predictions of concurrent calls as one batch, or as one computation for several sets of weights."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from forwardpass.wire.dtypes import Array
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.calls.plans import Plan
from forwardpass_server.calls.scheduling import CallTimes, Scheduler
from forwardpass_server.calls.vectorizing import MAX_SETS, Together, Vectorizer, are_equal
from forwardpass_server.weights.stacks import FittedWeights

_LOGGER = logging.getLogger(__name__)

_Key = tuple[int, int, tuple[tuple[int, ...], ...], bool]
"""The ids of a plan and of weights, the shapes of rows, and whether rounding is allowed.

Calls with the same key may share a computation. The id is 0 for calls that may share it with calls of other weights.
"""


# How many turns of the event loop a call waits for others. A call takes several turns from gRPC's thread to here: of 32
# clients, one turn rarely joins two calls, and 48 turns join seven, which gives 1.7 times the calls/s (measured).
# The number of turns adapts: it is 1 for a single client, whose calls run at once, and each batch of several calls
# raises it. So does a call that gRPC has announced: else the calls of many clients could go on running one by one.
# Calls of one pipeline message arrive together. So the wait ends early when no call has come for some turns.
_MORE_TURNS = 16
_MOST_TURNS = 48
_QUIET_TURNS = 12


class BatchObserver(Protocol):
    """Receives measurements of each batch."""

    def batched_calls(self, calls: int) -> None:
        """A batch of so many calls begins; 1 for a call that shares it with no other."""

    def batch_wait(self, seconds: float) -> None:
        """One call waited for so long before its batch ran."""

    def stacked_sets(self, sets: int) -> None:
        """A computation for so many sets of weights begins, at least two."""


@dataclasses.dataclass(eq=False, slots=True)
class _Waiting:
    """One call in a queue."""

    weights: FittedWeights
    x: Sequence[Array]
    rows: int
    size_bytes: int
    times: CallTimes
    future: asyncio.Future[list[Array]]


class _Job:
    """Calls with the same weights that run as one batch."""

    def __init__(self, calls: Sequence[_Waiting]) -> None:
        self.calls = calls
        self.weights = calls[0].weights
        self.x = calls[0].x
        if len(calls) > 1:
            self.x = [np.concatenate(leaves) for leaves in zip(*(call.x for call in calls), strict=True)]
        self.size_bytes = sum(call.size_bytes for call in calls)

    @property
    def times(self) -> list[CallTimes]:
        """Of each call."""
        return [call.times for call in self.calls]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each leaf of x."""
        return tuple([leaf.shape for leaf in self.x])


class _Queue:
    """Calls that may share a computation.

    vectorizer: decides about calls with different weights; None for a queue of one set of weights.
    joins: calls with the same weights run as one batch. Otherwise each is a job of its own.
    busy: the ids of the weights of running jobs; further calls with these weights wait, where calls are joined.
    is_waiting: a batch is about to begin.
    """

    def __init__(self, plan: Plan, vectorizer: Vectorizer | None, *, joins: bool, allow_rounding: bool) -> None:
        self.plan = plan
        self.vectorizer = vectorizer
        self.joins = joins
        self.allow_rounding = allow_rounding
        self.waiting: collections.deque[_Waiting] = collections.deque()
        self.busy: collections.Counter[int] = collections.Counter()
        self.is_waiting = False

    def holds_up(self, weights: FittedWeights) -> bool:
        """Whether calls with these weights wait for the end of a running job."""
        return self.joins and bool(self.busy[id(weights)])

    def began(self, weights: FittedWeights) -> None:
        """A job with these weights begins."""
        self.busy[id(weights)] += 1

    def ended(self, weights: FittedWeights) -> None:
        """A job with these weights has ended."""
        self.busy[id(weights)] -= 1
        if not self.busy[id(weights)]:
            del self.busy[id(weights)]


class Batcher:
    """Joins calls that wait at the same time. Used on one event loop only.

    There is no timer: a batch takes the calls that arrived within some turns of the event loop, or while the batch
    before it ran. max_rows: of a batch of several calls; a longer call runs alone.
    """

    def __init__(self, scheduler: Scheduler, arrivals: Arrivals, observer: BatchObserver, max_rows: int) -> None:
        self._scheduler = scheduler
        self._arrivals = arrivals
        self._observer = observer
        self._max_rows = max_rows
        self._queues: dict[_Key, _Queue] = {}
        self._turns = 1
        self._tasks: set[asyncio.Task[None]] = set()

    async def predict(
        self,
        plan: Plan,
        weights: FittedWeights,
        x: Sequence[Array],
        size_bytes: int,
        times: CallTimes,
        vectorizer: Vectorizer | None = None,
        *,
        joins: bool = True,
        allow_rounding: bool = False,
    ) -> list[Array]:
        """The leaves of the predictions of one call.

        plan: of predict_on_batch. weights: the same object for the same weights. x: leaves of shape [B, ...].
        joins: the function is batch-separable: all leaves but the weights, and all results, have one row for each
        example, which depends on that example only. vectorizer: of the model, if the call may share a computation with
        calls of other weights. allow_rounding: see `Vectorizer.may`.
        Returns leaves of shape [B, ...].
        Raises what the model raises for this call alone, whichever calls shared its batch.
        """
        shapes = tuple([leaf.shape for leaf in x])
        rows = shapes[0][0] if joins else 0
        if joins and len(shapes) > 1 and any(shape[0] != rows for shape in shapes):
            # The model may broadcast these leaves: run the call alone.
            return await self._scheduler.run(plan.run, [*weights, *x], plan.estimates, size_bytes, [times])
        of_rows = tuple([shape[1:] for shape in shapes]) if joins else shapes
        key = id(plan), 0 if vectorizer else id(weights), of_rows, allow_rounding
        loop = asyncio.get_running_loop()
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue(plan, vectorizer, joins=joins, allow_rounding=allow_rounding)
            if self._arrivals.count:
                self._turns = _MOST_TURNS
            if self._turns == 1:
                # The last calls came one by one: run this one at once. Calls that arrive meanwhile make a batch.
                queue.began(weights)
                try:
                    self._observer.batched_calls(1)
                    return await self._scheduler.run(plan.run, [*weights, *x], plan.estimates, size_bytes, [times])
                finally:
                    loop.call_soon(self._ended, key, queue, [weights])
        waiting = _Waiting(weights, x, rows, size_bytes, times, loop.create_future())
        queue.waiting.append(waiting)
        if not queue.is_waiting and not queue.holds_up(weights):
            queue.is_waiting = True
            loop.call_soon(self._wait, key, queue, self._turns, 0, 0)
        return await waiting.future

    def _wait(self, key: _Key, queue: _Queue, turns: int, quiet: int, calls: int) -> None:
        """Waits for some turns of the event loop, so that other calls arrive. A turn takes some microseconds.

        turns: how many are left. quiet: turns without a new call. calls: how many there were in the last turn.
        """
        quiet = quiet + 1 if len(queue.waiting) == calls else 0
        if turns > 1 and quiet < _QUIET_TURNS:
            asyncio.get_running_loop().call_soon(self._wait, key, queue, turns - 1, quiet, len(queue.waiting))
        else:
            queue.is_waiting = False
            self._start(key, queue)

    def _start(self, key: _Key, queue: _Queue) -> None:
        """Begins the computations of the calls that wait."""
        jobs = self._next(queue)
        if not jobs:
            self._forget_if_idle(key, queue)
            return
        are_joined = False
        for group, together in self._groups(queue, jobs):
            are_joined |= together is not None or len(group[0].calls) > 1
            for job in group:
                queue.began(job.weights)
            run = self._run(queue, group[0]) if together is None else self._run_together(queue, group, together)
            task = asyncio.ensure_future(run)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            weights = [job.weights for job in group]
            task.add_done_callback(lambda _, weights=weights: self._ended(key, queue, weights))  # type: ignore[misc]
        self._turns = min(self._turns + _MORE_TURNS, _MOST_TURNS) if are_joined else max(self._turns - 2, 1)

    def _ended(self, key: _Key, queue: _Queue, weights: Sequence[FittedWeights]) -> None:
        """Jobs have ended: begins the calls that arrived meanwhile."""
        for one in weights:
            queue.ended(one)
        if not queue.is_waiting:
            self._start(key, queue)

    def _forget_if_idle(self, key: _Key, queue: _Queue) -> None:
        if not queue.busy and not queue.waiting and self._queues.get(key) is queue:
            del self._queues[key]

    def _next(self, queue: _Queue) -> list[_Job]:
        """Takes the calls of the next jobs from a queue. Cancelled calls are dropped."""
        batches: dict[int, list[_Waiting]] = {}
        rows: collections.Counter[int] = collections.Counter()
        left: collections.deque[_Waiting] = collections.deque()
        full: set[int] = set()
        while queue.waiting:
            waiting = queue.waiting.popleft()
            if waiting.future.done():
                continue
            name = id(waiting.weights) if queue.joins else id(waiting)
            if (
                name in full
                or queue.holds_up(waiting.weights)
                or (name in batches and rows[name] + waiting.rows > self._max_rows)
                or (name not in batches and len(batches) == MAX_SETS)
            ):
                # The calls of one set of weights keep their order.
                full.add(name)
                left.append(waiting)
                continue
            batches.setdefault(name, []).append(waiting)
            rows[name] += waiting.rows
        queue.waiting = left
        return [_Job(calls) for calls in batches.values()]

    def _groups(self, queue: _Queue, jobs: Sequence[_Job]) -> list[tuple[list[_Job], Together | None]]:
        """The jobs by computation: several jobs that run together, or one job each."""
        vectorizer = queue.vectorizer
        if vectorizer is None or len(jobs) == 1:
            return [([job], None) for job in jobs]
        by_shapes: dict[tuple[tuple[int, ...], ...], list[_Job]] = {}
        for job in jobs:
            by_shapes.setdefault(job.shapes, []).append(job)
        groups: list[tuple[list[_Job], Together | None]] = []
        for shapes, alike in by_shapes.items():
            # In one order, so that the same sets need one stack.
            alike.sort(key=lambda job: job.weights.number)
            together = None
            if len(alike) > 1:
                together = vectorizer.choose([job.weights for job in alike], shapes, queue.allow_rounding)
            groups += [([job], None) for job in alike] if together is None else [(alike, together)]
        return groups

    def _observe(self, jobs: Sequence[_Job]) -> None:
        self._observer.batched_calls(sum(len(job.calls) for job in jobs))
        now = time.perf_counter()
        for job in jobs:
            for call in job.calls:
                self._observer.batch_wait(now - call.times.arrived)

    async def _run(self, queue: _Queue, job: _Job) -> None:
        """Runs one job, and completes its calls. Raises nothing."""
        self._observe([job])
        await self._run_job(queue, job)

    async def _run_job(self, queue: _Queue, job: _Job) -> list[Array] | None:
        """Runs one job, and completes its calls. Returns its results; None where it failed. Raises nothing."""
        if len(job.calls) == 1:
            return await self._run_alone(queue, job.calls[0])
        plan = queue.plan
        try:
            results = await self._scheduler.run(
                plan.run, [*job.weights, *job.x], plan.estimates, job.size_bytes, job.times
            )
            _check_rows(job, results)
        except Exception:
            # Run each call alone, so that only the call that caused the error fails.
            for call in job.calls:
                await self._run_alone(queue, call)
            return None
        _complete(job, results)
        return results

    async def _run_alone(self, queue: _Queue, waiting: _Waiting) -> list[Array] | None:
        if waiting.future.done():
            return None
        plan = queue.plan
        try:
            results = await self._scheduler.run(
                plan.run, [*waiting.weights, *waiting.x], plan.estimates, waiting.size_bytes, [waiting.times]
            )
        except Exception as error:
            if not waiting.future.done():
                waiting.future.set_exception(error)
            return None
        if not waiting.future.done():
            waiting.future.set_result(results)
        return results

    async def _run_together(self, queue: _Queue, jobs: Sequence[_Job], together: Together) -> None:
        """Runs jobs with different weights as one computation, and completes their calls. Raises nothing."""
        self._observe(jobs)
        assert queue.vectorizer is not None
        if together.is_trial:
            await self._run_and_try(queue.vectorizer, queue, jobs, together)
            return
        began = time.perf_counter()
        try:
            results = await self._compute(jobs, together, [times for job in jobs for times in job.times])
            if queue.joins:
                for job, own in zip(jobs, results, strict=True):
                    _check_rows(job, own)
        except Exception:
            await asyncio.gather(*(self._run_job(queue, job) for job in jobs))
            return
        queue.vectorizer.ran(together, time.perf_counter() - began)
        for job, own in zip(jobs, results, strict=True):
            _complete(job, own)

    async def _run_and_try(
        self, vectorizer: Vectorizer, queue: _Queue, jobs: Sequence[_Job], together: Together
    ) -> None:
        """Runs jobs one by one, and completes their calls. Then runs them as one computation, which is not used."""
        began = time.perf_counter()
        expected = await asyncio.gather(*(self._run_job(queue, job) for job in jobs))
        one_by_one_s = time.perf_counter() - began
        known = [results for results in expected if results is not None]
        if len(known) < len(jobs):
            vectorizer.failed(together)
            return
        # A task of its own: the next calls with these weights do not wait for it.
        task = asyncio.ensure_future(self._try(vectorizer, jobs, together, known, one_by_one_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _try(
        self,
        vectorizer: Vectorizer,
        jobs: Sequence[_Job],
        together: Together,
        expected: Sequence[list[Array]],
        one_by_one_s: float,
    ) -> None:
        """Runs jobs as one computation, and compares its results and its time. Raises nothing."""
        began = time.perf_counter()
        try:
            found = await self._compute(jobs, together, [])
        except Exception:
            _LOGGER.info("a computation for several sets of weights failed", exc_info=True)
            vectorizer.failed(together)
            return
        seconds = time.perf_counter() - began
        vectorizer.tried(together, one_by_one_s, seconds, are_equal(found, expected))

    async def _compute(self, jobs: Sequence[_Job], together: Together, times: Sequence[CallTimes]) -> list[list[Array]]:
        """The results of each job, of one computation for all."""
        self._observer.stacked_sets(len(jobs))
        x = [np.stack(leaves) for leaves in zip(*(job.x for job in jobs), strict=True)]
        size_bytes = sum(job.size_bytes for job in jobs)
        results = await self._scheduler.run(together.compute, x, together.times.estimates, size_bytes, times)
        if any(leaf.shape[:1] != (len(jobs),) for leaf in results):
            _LOGGER.error("%d sets of weights had results of shapes %s", len(jobs), [leaf.shape for leaf in results])
            raise ValueError("the model returned results for another number of sets of weights")
        return [[leaf[index] for leaf in results] for index in range(len(jobs))]


def _check_rows(job: _Job, results: Sequence[Array]) -> None:
    """Raises ValueError for results of a batch with another number of rows."""
    rows = sum(call.rows for call in job.calls)
    if any(leaf.shape[:1] != (rows,) for leaf in results):
        # The model is not batch-separable after all: no client may get any of these rows.
        _LOGGER.error("a batch of %d rows had results of shapes %s", rows, [leaf.shape for leaf in results])
        raise ValueError("the model returned another number of rows than it was given")


def _complete(job: _Job, results: Sequence[Array]) -> None:
    """Gives each call of a job its results."""
    if len(job.calls) == 1:
        (call,) = job.calls
        if not call.future.done():
            call.future.set_result(list(results))
        return
    start = 0
    for call in job.calls:
        end = start + call.rows
        if not call.future.done():
            call.future.set_result([leaf[start:end] for leaf in results])
        start = end
