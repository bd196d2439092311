"""Where a call's computation runs: at once on the event loop, or on a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

from forwardpass.wire.dtypes import Array

ResultT = TypeVar("ResultT")
Estimates = dict[tuple[object, int], float]

# Handing work to a thread and back costs 60 to 100 us and a fight over Python's lock: a computation not much longer
# than that is done sooner where it stands, and holds up nobody for longer than the hand-over would.
_INLINE_S = 300e-6

# An estimate sinks to the fastest run seen and rises by a twentieth with each slower one: one run that was held up by
# something else changes little, a computation that has become slow moves to a thread within some tens of runs.
_RISE = 1.05


class Scheduler:
    """Runs a computation inline while its kind is known to be short, else on a thread.

    threads: how many computations may run beside the event loop at once.
    """

    def __init__(self, threads: int) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="execute")
        # Estimates go with the owner of their computations.
        self._estimates_s: weakref.WeakKeyDictionary[object, Estimates] = weakref.WeakKeyDictionary()

    async def run(
        self, owner: object, kind: object, leaves: Sequence[Array], compute: Callable[[Sequence[Array]], ResultT]
    ) -> ResultT:
        """The result of compute(leaves). Computations of one owner and one kind take equally long for equal sizes."""
        estimates_s = self._estimates_s.setdefault(owner, {})
        # One estimate for each power of two of the input's size.
        key = (kind, sum(leaf.nbytes for leaf in leaves).bit_length())
        if estimates_s.get(key, _INLINE_S) < _INLINE_S:
            return _timed(estimates_s, key, leaves, compute)
        return await asyncio.get_running_loop().run_in_executor(self._pool, _timed, estimates_s, key, leaves, compute)

    def close(self) -> None:
        """Waits for what runs. Nothing may be run afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _timed(
    estimates_s: Estimates,
    key: tuple[object, int],
    leaves: Sequence[Array],
    compute: Callable[[Sequence[Array]], ResultT],
) -> ResultT:
    started = time.perf_counter()
    result = compute(leaves)
    seconds = time.perf_counter() - started
    estimates_s[key] = min(seconds, estimates_s.get(key, seconds) * _RISE)
    return result
