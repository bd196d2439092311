"""Checks every second whether the session store works."""

from __future__ import annotations

import asyncio
import contextlib

from forwardpass.wire import errors
from forwardpass_server.errors import SessionStoreError
from forwardpass_server.sessions.store import SessionStore

_PAUSE_S = 1.0

# The first pause of the backoff at the start and after a failure. Each pause is twice the one before, up to `_PAUSE_S`.
_FIRST_PAUSE_S = 0.1


class SessionStoreWatch:
    """`checked` is set after the first check, and `reached` after the first check that succeeds.

    The store itself logs a failure, and keeps it in `SessionStore.problem`.
    """

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self.checked = asyncio.Event()
        self.reached = asyncio.Event()

    @property
    def problem(self) -> str:
        """Why the store does not work; "" if it works. May be read on any thread."""
        return self._store.problem

    async def watch(self) -> None:
        """Runs until it is cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            # The store has logged the error.
            with contextlib.suppress(errors.SessionStoreUnavailable, SessionStoreError):
                await self._store.check()
                self.reached.set()
            self.checked.set()
            pause_s = min(2 * pause_s, _PAUSE_S) if self.problem else _PAUSE_S
            await asyncio.sleep(pause_s)
            if not self.problem:
                pause_s = _FIRST_PAUSE_S
