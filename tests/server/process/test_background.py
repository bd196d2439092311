"""Background work at low priority."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import pytest

from forwardpass_server.process import background


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_only_the_thread_of_the_work_has_low_priority():
    before = priority()
    assert asyncio.run(background.run(priority, "work")) == min(before + 5, 19)
    assert priority() == before


def test_each_work_has_a_thread_that_ends_with_it():
    async def run() -> list[threading.Thread]:
        return [await background.run(threading.current_thread, "work") for _ in range(2)]

    one, other = asyncio.run(run())
    assert one is not other
    for thread in (one, other):
        thread.join(30)
        assert not thread.is_alive()


def test_an_exception_of_the_work_is_raised():
    with pytest.raises(KeyError, match="nothing"):
        asyncio.run(background.run(lambda: {}["nothing"], "work"))


def test_work_continues_after_cancellation():
    began, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        go_on.wait(30)
        ended.set()

    async def run() -> None:
        task = asyncio.create_task(background.run(work, "work"))
        assert await asyncio.to_thread(began.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        assert await asyncio.to_thread(ended.wait, 30)

    asyncio.run(run())
