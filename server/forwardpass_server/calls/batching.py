"""Runs the predictions of concurrent calls with the same weights as one batch."""

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
from forwardpass_server.calls.model import Leaf
from forwardpass_server.calls.plans import Plan
from forwardpass_server.calls.scheduling import CallTimes, Scheduler

_LOGGER = logging.getLogger(__name__)

_Key = tuple[int, int, tuple[tuple[int, ...], ...]]
"""The ids of a plan and of weights, and the shapes of rows: calls with the same key can share a batch."""


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


@dataclasses.dataclass(eq=False, slots=True)
class _Waiting:
    """One call in a queue."""

    x: Sequence[Array]
    rows: int
    size_bytes: int
    times: CallTimes
    future: asyncio.Future[list[Array]]


class _Queue:
    """Calls that can share a batch. is_running: a batch is running or about to; the next one starts after it."""

    def __init__(self, plan: Plan, weights: Sequence[Leaf]) -> None:
        self.plan = plan
        self.weights = weights
        self.waiting: collections.deque[_Waiting] = collections.deque()
        self.is_running = False


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
        self, plan: Plan, weights: Sequence[Leaf], x: Sequence[Array], size_bytes: int, times: CallTimes
    ) -> list[Array]:
        """The leaves of the predictions of one call.

        plan: of a batch-separable function: all leaves but the weights, and all results, have one row for each example,
        which depends on that example only. weights: the same object for the same weights.
        x: leaves of shape [B, ...]. Returns leaves of shape [B, ...].
        Raises what the model raises for this call alone, whichever calls shared its batch.
        """
        shapes = tuple([leaf.shape for leaf in x])
        rows = shapes[0][0]
        if len(shapes) > 1 and any(shape[0] != rows for shape in shapes):
            # The model may broadcast these leaves: run the call alone.
            return await self._scheduler.run(plan.run, [*weights, *x], plan.estimates, size_bytes, [times])
        key = id(plan), id(weights), tuple([shape[1:] for shape in shapes])
        loop = asyncio.get_running_loop()
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue(plan, weights)
            if self._arrivals.count:
                self._turns = _MOST_TURNS
            if self._turns == 1:
                # The last calls came one by one: run this one at once. Calls that arrive meanwhile make a batch.
                queue.is_running = True
                try:
                    self._observer.batched_calls(1)
                    return await self._scheduler.run(plan.run, [*weights, *x], plan.estimates, size_bytes, [times])
                finally:
                    loop.call_soon(self._start, key, queue)
        waiting = _Waiting(x, rows, size_bytes, times, loop.create_future())
        queue.waiting.append(waiting)
        if not queue.is_running:
            queue.is_running = True
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
            self._start(key, queue)

    def _start(self, key: _Key, queue: _Queue) -> None:
        batch = self._next(queue)
        if not batch:
            del self._queues[key]
            return
        self._turns = min(self._turns + _MORE_TURNS, _MOST_TURNS) if len(batch) > 1 else max(self._turns - 2, 1)
        task = asyncio.ensure_future(self._run(queue, batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._start(key, queue))

    def _next(self, queue: _Queue) -> list[_Waiting]:
        """Takes the calls of the next batch from a queue. Cancelled calls are dropped."""
        batch: list[_Waiting] = []
        rows = 0
        while queue.waiting:
            waiting = queue.waiting[0]
            if batch and rows + waiting.rows > self._max_rows:
                break
            queue.waiting.popleft()
            if not waiting.future.done():
                batch.append(waiting)
                rows += waiting.rows
        return batch

    async def _run(self, queue: _Queue, batch: Sequence[_Waiting]) -> None:
        self._observer.batched_calls(len(batch))
        now = time.perf_counter()
        for waiting in batch:
            self._observer.batch_wait(now - waiting.times.arrived)
        if len(batch) == 1:
            await self._run_alone(queue, batch[0])
            return
        try:
            joined = [np.concatenate(leaves) for leaves in zip(*(waiting.x for waiting in batch), strict=True)]
            size_bytes = sum(waiting.size_bytes for waiting in batch)
            results = await self._scheduler.run(
                queue.plan.run,
                [*queue.weights, *joined],
                queue.plan.estimates,
                size_bytes,
                [waiting.times for waiting in batch],
            )
            rows = sum(waiting.rows for waiting in batch)
            if any(leaf.shape[:1] != (rows,) for leaf in results):
                # The model is not batch-separable after all: no client may get any of these rows.
                _LOGGER.error("a batch of %d rows had results of shapes %s", rows, [leaf.shape for leaf in results])
                raise ValueError("the model returned another number of rows than it was given")
        except Exception:
            # Run each call alone, so that only the call that caused the error fails.
            for waiting in batch:
                await self._run_alone(queue, waiting)
            return
        start = 0
        for waiting in batch:
            end = start + waiting.rows
            if not waiting.future.done():
                waiting.future.set_result([leaf[start:end] for leaf in results])
            start = end

    async def _run_alone(self, queue: _Queue, waiting: _Waiting) -> None:
        if waiting.future.done():
            return
        plan = queue.plan
        try:
            results = await self._scheduler.run(
                plan.run, [*queue.weights, *waiting.x], plan.estimates, waiting.size_bytes, [waiting.times]
            )
        except Exception as error:
            if not waiting.future.done():
                waiting.future.set_exception(error)
        else:
            if not waiting.future.done():
                waiting.future.set_result(results)
