"""Where computations run."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import numpy as np
import pytest

from forwardpass_server.serving.scheduling import Scheduler


class Owner:
    """Owns computations, as a model does."""


SMALL, LARGE = [np.zeros(4)], [np.zeros(4000)]


def quick(leaves) -> threading.Thread:
    return threading.current_thread()


def long(leaves) -> threading.Thread:
    time.sleep(0.005)
    return threading.current_thread()


async def threads(*steps) -> list[bool]:
    """For each (kind, leaves, compute), whether it ran on the event loop's thread."""
    scheduler = Scheduler(2)
    owner = Owner()
    here = threading.current_thread()
    ran = [await scheduler.run(owner, kind, leaves, compute) is here for kind, leaves, compute in steps]
    scheduler.close()
    return ran


@pytest.mark.parametrize(
    "steps, inline",
    [
        # What is not known yet, and what is long, runs beside the loop; what is known to be short runs on it.
        ([("f", SMALL, quick)] * 3, [False, True, True]),
        ([("f", SMALL, long)] * 3, [False, False, False]),
        ([("f", SMALL, quick), ("g", SMALL, quick), ("f", LARGE, quick)], [False, False, False]),
        ([("f", SMALL, long), ("f", SMALL, quick), ("f", SMALL, quick)], [False, False, True]),
    ],
)
def test_computations_run_inline_while_they_are_known_to_be_short(steps, inline):
    assert asyncio.run(threads(*steps)) == inline


def test_a_computation_that_became_long_moves_to_a_thread():
    ran = asyncio.run(threads(("f", SMALL, quick), *[("f", SMALL, long)] * 300))
    assert ran[1] is True
    assert ran[-1] is False


def test_errors_reach_the_caller():
    def fail(leaves):
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        asyncio.run(threads(("f", SMALL, fail)))


def test_a_call_that_is_given_up_while_it_waits_for_a_thread_never_runs():
    async def run() -> list[str]:
        scheduler = Scheduler(1)
        owner = Owner()
        ran: list[str] = []

        def compute(leaves):
            time.sleep(0.2)
            ran.append(threading.current_thread().name)

        first = asyncio.ensure_future(scheduler.run(owner, "f", SMALL, compute))
        second = asyncio.ensure_future(scheduler.run(owner, "g", SMALL, compute))
        await asyncio.sleep(0.05)
        second.cancel()
        await first
        scheduler.close()
        return ran

    assert len(asyncio.run(run())) == 1


def test_nothing_is_kept_of_an_owner_that_is_gone():
    async def run() -> int:
        scheduler = Scheduler(1)
        await scheduler.run(Owner(), "f", SMALL, quick)
        gc.collect()
        scheduler.close()
        return len(scheduler._estimates_s)

    assert asyncio.run(run()) == 0
