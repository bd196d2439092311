"""Where a call's computation runs: at once on the event loop, or on a thread of its own."""

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

# Handing work to a thread and back costs 60 to 100 us and a fight over Python's lock: a computation not much longer
# than that is done sooner where it stands, and holds up nobody for longer than the hand-over would.
_INLINE_S = 300e-6

# An estimate sinks to the fastest run seen and rises by a twentieth with each slower one: one run that was held up by
# something else changes little, a computation that has become slow moves to a thread within some tens of runs.
_RISE = 1.05

# What a computation costs may depend on its values, too. One that has held up the event loop for longer than this is
# kept away from it a hundred times as long: it cannot hold it up for more than a hundredth of the time. Unless it took
# that long, only what the process worked meanwhile counts: where others take the processor away for some milliseconds,
# or the kernel's quota does, a thread is no better, and twice the work.
_STALL_S = 10 * _INLINE_S
_LONG_STALL_S = 10 * _STALL_S
_STALL_FACTOR = 100


class Estimates:
    """How long one computation takes, by the power of two of the size of its input.

    has_loops: it may go on for as long as its values say, and is never run inline.
    """

    def __init__(self, has_loops: bool = False) -> None:
        self._has_loops = has_loops
        self._seconds: dict[int, float] = {}
        self._inline_from: dict[int, float] = {}

    def is_short(self, bucket: int) -> bool:
        return (
            self._seconds.get(bucket, _INLINE_S) < _INLINE_S
            and not self._has_loops
            and (not self._inline_from or self._inline_from.get(bucket, 0) < time.monotonic())
        )

    def add(self, bucket: int, seconds: float, worked_s: float, *, inline: bool) -> None:
        """Takes note of a run.

        worked_s: the processor time that the process took meanwhile. inline: it ran on the event loop.
        """
        self._seconds[bucket] = min(seconds, self._seconds.get(bucket, seconds) * _RISE)
        if inline and (seconds > _LONG_STALL_S or min(seconds, worked_s) > _STALL_S):
            self._inline_from[bucket] = time.monotonic() + _STALL_FACTOR * seconds


class Passage:
    """A call's way through what runs it. Each moment by time.perf_counter; 0 for one that has not been.

    arrived: when it came, which is now. began, ended: of its computation, of the first and the last where it takes two.
    """

    __slots__ = ("arrived", "began", "ended")

    def __init__(self) -> None:
        self.arrived = time.perf_counter()
        self.began = 0.0
        self.ended = 0.0


class Scheduler:
    """Runs a computation inline while it is known to be short, else on a thread.

    threads: how many computations may run beside the event loop at once.
    """

    def __init__(self, threads: int) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="execute")

    async def run(
        self,
        compute: Callable[[Sequence[Leaf]], ResultT],
        leaves: Sequence[Leaf],
        estimates: Estimates,
        size_bytes: int,
        passages: Sequence[Passage] = (),
    ) -> ResultT:
        """The result of compute(leaves). `estimates` belongs to the computation; `size_bytes` is how much goes in.

        passages: of the calls that it is for.
        """
        bucket = size_bytes.bit_length()
        if estimates.is_short(bucket):
            return _timed(compute, leaves, estimates, bucket, True, passages)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, _timed, compute, leaves, estimates, bucket, False, passages)

    async def close(self, timeout_s: float) -> bool:
        """Waits for what runs, so long. Nothing may be run afterwards. Returns whether everything has ended."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._pool.shutdown(cancel_futures=True)
            with contextlib.suppress(RuntimeError):  # Nobody waits any longer.
                loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=shut_down, daemon=True).start()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ended.wait(), timeout_s)
        return ended.is_set()


def _timed(
    compute: Callable[[Sequence[Leaf]], ResultT],
    leaves: Sequence[Leaf],
    estimates: Estimates,
    bucket: int,
    inline: bool,
    passages: Sequence[Passage],
) -> ResultT:
    started, worked_s = time.perf_counter(), time.process_time()
    for passage in passages:
        passage.began = passage.began or started
    try:
        result = compute(leaves)
    finally:
        ended = time.perf_counter()
        for passage in passages:
            passage.ended = ended
    estimates.add(bucket, ended - started, time.process_time() - worked_s, inline=inline)
    return result
