"""Decides where a computation runs: inline on the event loop, or on a thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from forwardpass_server.calls.model import Leaf

ResultT = TypeVar("ResultT")

# Run inline below 300 us: a thread hand-over costs 60 to 100 us, and threads compete for Python's lock. So a short
# computation ends sooner inline, and delays other calls no longer than the hand-over would.
INLINE_S = 300e-6
"""The longest computation that may run on the event loop."""

# An estimate falls to the fastest run seen, and rises by at most 5 % with each slower run. So one run that something
# else delayed changes little, and a computation that has become slow moves to a thread within some tens of runs.
_RISE = 1.05

# The cost of a computation may depend on its values too. A computation that has blocked the event loop for more than
# 3 ms runs on threads for 100 times as long, so that it blocks the loop for at most 1 % of the time. Below 30 ms only
# the process's own processor time counts: preemption and CPU quotas delay a thread just as much.
_STALL_S = 10 * INLINE_S
_LONG_STALL_S = 10 * _STALL_S
_STALL_FACTOR = 100


def smoothed(known: float | None, seconds: float) -> float:
    """An estimate after one more run. known: the estimate so far; None for none."""
    return seconds if known is None else min(seconds, known * _RISE)


class Estimates:
    """Estimates the time of one computation, by the size of its input in powers of two (the bucket).

    has_loops: the computation has a loop whose length its values decide, and is never run inline.
    """

    def __init__(self, has_loops: bool = False) -> None:
        self._has_loops = has_loops
        self._seconds: dict[int, float] = {}
        self._inline_from: dict[int, float] = {}

    def is_short(self, bucket: int) -> bool:
        """Whether the computation may run inline."""
        return (
            self._seconds.get(bucket, INLINE_S) < INLINE_S
            and not self._has_loops
            and (not self._inline_from or self._inline_from.get(bucket, 0) < time.monotonic())
        )

    def add(self, bucket: int, seconds: float, worked_s: float, *, inline: bool) -> None:
        """Adds a measured run.

        worked_s: the processor time that the process used meanwhile. inline: whether it ran on the event loop.
        """
        self._seconds[bucket] = smoothed(self._seconds.get(bucket), seconds)
        if inline and (seconds > _LONG_STALL_S or min(seconds, worked_s) > _STALL_S):
            self._inline_from[bucket] = time.monotonic() + _STALL_FACTOR * seconds


class CallTimes:
    """When a call arrived, and when its computation began and ended, by time.perf_counter; 0.0 if not yet.

    A call with two computations has the beginning of the first and the end of the last. arrived: now.
    """

    __slots__ = ("arrived", "began", "ended")

    def __init__(self) -> None:
        self.arrived = time.perf_counter()
        self.began = 0.0
        self.ended = 0.0


class Scheduler:
    """Runs short computations inline, and all others on a pool of threads.

    threads: the size of the pool.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="execute")
        # One object for each computation that waits for a thread. The threads remove them: a set needs no lock for it.
        self._waiting: set[object] = set()
        # Called on the event loop after each computation on a thread.
        self.on_end: Callable[[], None] = _do_nothing

    @property
    def has_waiting(self) -> bool:
        """Whether a computation waits for a thread."""
        return bool(self._waiting)

    async def run(
        self,
        compute: Callable[[Sequence[Leaf]], ResultT],
        leaves: Sequence[Leaf],
        estimates: Estimates,
        size_bytes: int,
        times_of_calls: Sequence[CallTimes] = (),
    ) -> ResultT:
        """The result of compute(leaves).

        estimates: of this computation. size_bytes: of its input. times_of_calls: of the calls that it is for.
        """
        bucket = size_bytes.bit_length()
        if estimates.is_short(bucket):
            return _timed(compute, leaves, estimates, bucket, True, times_of_calls)
        place = object()
        self._waiting.add(place)

        def begin_and_compute() -> ResultT:
            self._waiting.discard(place)
            return _timed(compute, leaves, estimates, bucket, False, times_of_calls)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, begin_and_compute)
        finally:
            # A computation that was cancelled before it began has not removed itself.
            self._waiting.discard(place)
            self.on_end()

    async def close(self, timeout_s: float) -> bool:
        """Stops the pool, and waits for running computations until the timeout. Returns whether all have ended."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._pool.shutdown(cancel_futures=True)
            with contextlib.suppress(RuntimeError):  # The event loop was closed after the timeout.
                loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=shut_down, daemon=True).start()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ended.wait(), timeout_s)
        return ended.is_set()


def _do_nothing() -> None:
    pass


def _timed(
    compute: Callable[[Sequence[Leaf]], ResultT],
    leaves: Sequence[Leaf],
    estimates: Estimates,
    bucket: int,
    inline: bool,
    times_of_calls: Sequence[CallTimes],
) -> ResultT:
    started, worked_s = time.perf_counter(), time.process_time()
    for times in times_of_calls:
        times.began = times.began or started
    try:
        result = compute(leaves)
    finally:
        ended = time.perf_counter()
        for times in times_of_calls:
            times.ended = ended
    estimates.add(bucket, ended - started, time.process_time() - worked_s, inline=inline)
    return result
