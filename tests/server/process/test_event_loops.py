"""The server runs on uvloop where it is installed, and on asyncio's own event loop elsewhere."""

from __future__ import annotations

import asyncio
import sys

import uvloop

from forwardpass_server.process import event_loops


def loop_of_run() -> asyncio.AbstractEventLoop:
    found = []

    async def main() -> None:
        found.append(asyncio.get_running_loop())

    event_loops.run(main())
    return found[0]


def test_the_event_loop_is_that_of_uvloop_where_it_is_installed():
    assert isinstance(loop_of_run(), uvloop.Loop)
    assert event_loops.describe() == f"event loop: uvloop {uvloop.__version__}"


def test_the_event_loop_is_that_of_asyncio_without_uvloop(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert type(loop_of_run()).__module__.startswith("asyncio.")
    assert event_loops.describe() == ("event loop: asyncio's own; uvloop is faster: install forwardpass[fast]")
