"""Where a call's computation runs: at once on the event loop, or on a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from forwardpass.wire.dtypes import Array

ResultT = TypeVar("ResultT")
Estimates = dict[int, float]
"""Seconds that a computation takes, by the power of two of the size of its input."""

# Handing work to a thread and back costs 60 to 100 us and a fight over Python's lock: a computation not much longer
# than that is done sooner where it stands, and holds up nobody for longer than the hand-over would.
_INLINE_S = 300e-6

# An estimate sinks to the fastest run seen and rises by a twentieth with each slower one: one run that was held up by
# something else changes little, a computation that has become slow moves to a thread within some tens of runs.
_RISE = 1.05


class Scheduler:
    """Runs a computation inline while it is known to be short, else on a thread.

    threads: how many computations may run beside the event loop at once.
    """

    def __init__(self, threads: int) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="execute")

    async def run(
        self,
        compute: Callable[[Sequence[Array]], ResultT],
        leaves: Sequence[Array],
        estimates: Estimates,
        size_bytes: int,
    ) -> ResultT:
        """The result of compute(leaves). `estimates` belongs to the computation; `size_bytes` is how much goes in."""
        bucket = size_bytes.bit_length()
        if estimates.get(bucket, _INLINE_S) < _INLINE_S:
            return _timed(compute, leaves, estimates, bucket)
        return await asyncio.get_running_loop().run_in_executor(self._pool, _timed, compute, leaves, estimates, bucket)

    def close(self) -> None:
        """Waits for what runs. Nothing may be run afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _timed(
    compute: Callable[[Sequence[Array]], ResultT], leaves: Sequence[Array], estimates: Estimates, bucket: int
) -> ResultT:
    started = time.perf_counter()
    result = compute(leaves)
    seconds = time.perf_counter() - started
    estimates[bucket] = min(seconds, estimates.get(bucket, seconds) * _RISE)
    return result
