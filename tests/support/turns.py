"""How much an event loop does before it looks at other callers: counted, since a time would depend on the machine."""

from __future__ import annotations

import asyncio
import sys
import threading
from types import FrameType
from typing import Any


class Turns:
    """Counts what Python calls in each turn of the event loop of the thread that made this, C functions included.

    Work for each leaf or string of a message calls something for each. most: in one turn. where: what the turn ran.
    """

    def __init__(self) -> None:
        self.most = 0
        self.where = ""
        self._thread = threading.get_ident()
        self._count = 0
        run = asyncio.Handle._run

        def counted(handle: asyncio.Handle) -> None:
            if threading.get_ident() != self._thread:
                run(handle)
                return
            self._count = 0
            sys.setprofile(self._profile)
            try:
                run(handle)
            finally:
                sys.setprofile(None)
            if self._count > self.most:
                self.most, self.where = self._count, repr(handle)[:500]

        self._run, self._counted = run, counted

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self._count += 1

    def start(self) -> None:
        asyncio.Handle._run = self._counted  # type: ignore[method-assign]

    def stop(self) -> None:
        asyncio.Handle._run = self._run  # type: ignore[method-assign]
