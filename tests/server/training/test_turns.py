"""The order of optimizer steps, with a real scheduler."""

from __future__ import annotations

import asyncio
import threading

import pytest

from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.calls.scheduling import Estimates, Scheduler
from forwardpass_server.training.turns import Turns

SIZE = 100


class Rig:
    """Turns over a pool of threads. order: what has run."""

    def __init__(self, threads: int, longest_wait_s: float = 60.0) -> None:
        self.scheduler, self.arrivals = Scheduler(threads), Arrivals()
        self.turns = Turns(self.scheduler, self.arrivals, longest_wait_s)
        self.order: list[str] = []
        self.gate = threading.Event()

    def call(self, name: str, *, waits: bool = False) -> asyncio.Future[None]:
        """A call on a thread; it may wait for the gate."""

        def compute(leaves):
            if waits:
                assert self.gate.wait(60)
            self.order.append(name)

        return asyncio.ensure_future(self.scheduler.run(compute, [], Estimates(has_loops=True), SIZE))

    def step(self, name: str, principal: str = "", *, compute=None) -> asyncio.Future[None]:
        """A step on a thread."""

        def note(leaves):
            if compute is not None:
                compute()
            self.order.append(name)

        return asyncio.ensure_future(self.turns.run(principal, note, [], Estimates(has_loops=True), SIZE))


def run(scenario, *arguments) -> None:
    async def main() -> None:
        rig = Rig(*arguments)
        await scenario(rig)
        assert await rig.scheduler.close(10)

    asyncio.run(asyncio.wait_for(main(), 60))


async def some_turns() -> None:
    for _ in range(100):
        await asyncio.sleep(0)


def test_steps_wait_for_calls_that_wait_for_a_thread():
    async def scenario(rig):
        calls = [rig.call("first", waits=True), rig.call("second"), rig.call("third")]
        await asyncio.sleep(0)
        steps = [rig.step(f"step {index}") for index in range(8)]
        await some_turns()
        assert rig.order == []
        rig.gate.set()
        await asyncio.gather(*calls, *steps)
        assert rig.order[:3] == ["first", "second", "third"]

    run(scenario, 1)


def test_a_step_runs_after_the_longest_wait_although_calls_wait():
    async def scenario(rig):
        blocking = rig.call("first", waits=True)
        waiting = rig.call("second")
        await asyncio.sleep(0)
        step = rig.step("step")
        await some_turns()
        # It is in the pool's queue, behind the calls.
        assert not step.done()
        rig.gate.set()
        await asyncio.gather(blocking, waiting, step)

    run(scenario, 1, 0.0)


def test_steps_leave_a_thread_to_calls():
    async def scenario(rig):
        running = [rig.step(f"step {index}", compute=lambda: rig.gate.wait(60)) for index in range(8)]
        await some_turns()
        await rig.call("call")
        assert rig.order == ["call"]
        rig.gate.set()
        await asyncio.gather(*running)

    run(scenario, 2)


def test_a_step_waits_for_an_announced_call_but_not_for_one_that_never_comes():
    async def scenario(rig):
        announced = asyncio.ensure_future(asyncio.sleep(30))
        rig.arrivals.announce(announced)
        step = rig.step("step")
        for _ in range(5):
            await asyncio.sleep(0)
            assert not step.done()
        await step
        announced.cancel()

    run(scenario, 2)


def test_principals_share_by_the_time_that_their_steps_take():
    async def scenario(rig):
        pause = threading.Event()

        async def train(principal: str, seconds: float) -> None:
            while len(rig.order) < 60:
                await rig.step(principal, principal, compute=lambda: pause.wait(seconds))

        # Many streams of one principal do not get more than one stream of another.
        await asyncio.gather(*(train("slow", 0.02) for _ in range(6)), train("quick", 0.001))
        assert rig.order.count("quick") > 2 * rig.order.count("slow")

    run(scenario, 2)


def test_streams_of_one_principal_take_turns():
    async def scenario(rig):
        async def train(name: str) -> None:
            for _ in range(10):
                await rig.step(name)

        await asyncio.gather(*(train(name) for name in "abc"))
        for start in range(3, 27, 3):
            assert sorted(rig.order[start : start + 3]) == ["a", "b", "c"]

    run(scenario, 2)


def test_a_cancelled_step_frees_its_turn_when_its_computation_has_ended():
    async def scenario(rig):
        running = rig.step("running", compute=lambda: rig.gate.wait(60))
        await some_turns()
        waiting = [rig.step("cancelled"), rig.step("waiting")]
        await some_turns()
        running.cancel()
        waiting[0].cancel()
        await some_turns()
        assert rig.order == []
        rig.gate.set()
        await waiting[1]
        assert rig.order == ["running", "waiting"]
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]

    run(scenario, 2)


def test_errors_of_a_step_reach_its_stream():
    async def scenario(rig):
        def fail(leaves):
            raise ValueError("why")

        for _ in range(3):
            with pytest.raises(ValueError, match="why"):
                await rig.turns.run("", fail, [], Estimates(), SIZE)
        await rig.step("step")

    run(scenario, 2)
