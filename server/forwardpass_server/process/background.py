"""Work that gives way to calls."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import sys
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")

# Where calls want every core, each of their threads gets three times as much of one as the work does. Measured in turns
# on two busy cores, calls beside a load took 0.75 of the time, and the load 1.6. At 10, loads could take ten times as
# long, and work that is stopped while it holds Python's lock keeps everybody waiting until it has its turn again.
_NICENESS = 5


async def run(work: Callable[[], ResultT], name: str) -> ResultT:
    """The result of work(), done by a thread of low priority that ends with it. Goes on where nobody waits any longer.

    name: the thread's. Threads that the work starts inherit its priority.
    """
    # A thread cannot take its priority back, and TensorFlow keeps for each thread what was traced on it.
    pool = concurrent.futures.ThreadPoolExecutor(1, name, initializer=_give_way)
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    finally:
        pool.shutdown(wait=False)


def _give_way() -> None:
    # Elsewhere it is the priority of the whole process.
    if sys.platform == "linux":
        # A sandbox may forbid it: the work is done all the same.
        with contextlib.suppress(OSError):
            os.nice(_NICENESS)
