"""Where computations run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from forwardpass_server.calls import scheduling
from forwardpass_server.calls.scheduling import Estimates, Scheduler

SMALL, LARGE = 100, 100_000


class Clock:
    """Time that passes only in the computations below, on whatever machine they run."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    monotonic = process_time = perf_counter


CLOCK = Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "time", CLOCK)


def computation(seconds: float) -> Callable[[Any], threading.Thread]:
    """A computation that takes this time, and returns its thread."""

    def compute(leaves: Any) -> threading.Thread:
        CLOCK.now_s += seconds
        return threading.current_thread()

    return compute


quick, long, stalling = computation(1e-5), computation(0.005), computation(0.05)


async def threads(*steps) -> list[bool]:
    """For each (size of the input, computation), whether it ran on the event loop's thread."""
    scheduler = Scheduler(2)
    estimates = Estimates()
    here = threading.current_thread()
    ran = [await scheduler.run(compute, [], estimates, size) is here for size, compute in steps]
    assert await scheduler.close(10)
    return ran


@pytest.mark.parametrize(
    "steps, inline",
    [
        # What is not known yet, and what is long, runs beside the loop; what is known to be short runs on it.
        ([(SMALL, quick)] * 3, [False, True, True]),
        ([(SMALL, long)] * 3, [False, False, False]),
        ([(SMALL, quick), (LARGE, quick), (SMALL + 1, quick)], [False, False, True]),
        ([(SMALL, long), (SMALL, quick), (SMALL, quick)], [False, False, True]),
    ],
)
def test_computations_run_inline_while_their_estimate_is_short(steps, inline):
    assert asyncio.run(threads(*steps)) == inline


def test_a_computation_that_became_long_moves_to_a_thread():
    ran = asyncio.run(threads((SMALL, quick), *[(SMALL, long)] * 300))
    assert ran[1] is True
    assert ran[-1] is False


def test_errors_reach_the_caller():
    def fail(leaves):
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        asyncio.run(threads((SMALL, fail)))


def test_a_call_that_is_cancelled_while_it_waits_for_a_thread_never_runs():
    async def run() -> list[str]:
        scheduler = Scheduler(1)
        ran: list[str] = []

        def compute(leaves):
            time.sleep(0.2)
            ran.append(threading.current_thread().name)

        first = asyncio.ensure_future(scheduler.run(compute, [], Estimates(), SMALL))
        second = asyncio.ensure_future(scheduler.run(compute, [], Estimates(), SMALL))
        await asyncio.sleep(0.05)
        second.cancel()
        await first
        await scheduler.close(10)
        return ran

    assert len(asyncio.run(run())) == 1


def test_a_computation_with_a_loop_never_runs_inline():
    async def run() -> list[bool]:
        scheduler = Scheduler(1)
        estimates = Estimates(has_loops=True)
        here = threading.current_thread()
        ran = [await scheduler.run(quick, [], estimates, SMALL) is here for _ in range(3)]
        await scheduler.close(10)
        return ran

    assert asyncio.run(run()) == [False] * 3


def test_a_computation_that_delayed_the_event_loop_runs_on_a_thread_afterwards():
    steps = [(SMALL, quick), (SMALL, stalling), *[(SMALL, quick)] * 5]
    assert asyncio.run(threads(*steps)) == [False, True, False, False, False, False, False]


@pytest.mark.parametrize(
    "seconds, worked_s, is_short", [(0.02, 0.0001, True), (0.02, 0.02, False), (0.05, 0.0001, False)]
)
def test_preemption_does_not_count_as_a_slow_computation(seconds, worked_s, is_short):
    estimates = Estimates()
    estimates.add(SMALL, 1e-5, 1e-5, inline=True)
    estimates.add(SMALL, seconds, worked_s, inline=True)
    assert estimates.is_short(SMALL) is is_short


def test_closing_waits_at_most_for_its_timeout():
    async def run() -> tuple[bool, float]:
        scheduler = Scheduler(1)
        release = threading.Event()
        running = asyncio.ensure_future(scheduler.run(lambda leaves: release.wait(10), [], Estimates(), SMALL))
        await asyncio.sleep(0.05)
        has_ended = await scheduler.close(0.1)
        was_running = not running.done()
        release.set()
        await running
        return has_ended, was_running

    assert asyncio.run(run()) == (False, True)
