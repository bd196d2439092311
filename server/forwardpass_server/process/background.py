"""Background work on threads of low priority, such as the load of a model."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import sys
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")

# At 5, a thread of a call gets three times the processor time of background work when all cores are busy. Measured on
# two busy cores against 0: calls during a load took 0.75 of the time, the load 1.6. At 10, loads could take ten times
# as long, and a thread that is preempted while it holds Python's lock blocks all others until it runs again.
_NICENESS = 5


async def run(work: Callable[[], ResultT], name: str) -> ResultT:
    """Runs `work` on a new thread of low priority and returns its result. Cancellation does not stop the work.

    name: of the thread. Threads that the work starts inherit its priority.
    """
    # A new thread each time: a thread cannot raise its priority again, and TensorFlow keeps what a thread traced for
    # the lifetime of the thread.
    pool = concurrent.futures.ThreadPoolExecutor(1, name, initializer=_lower_priority)
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    finally:
        pool.shutdown(wait=False)


def _lower_priority() -> None:
    # On other systems nice() changes the whole process.
    if sys.platform == "linux":
        # A sandbox may forbid it. The work then runs at normal priority.
        with contextlib.suppress(OSError):
            os.nice(_NICENESS)
