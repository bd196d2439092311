"""Asks the session store again and again whether it works."""

from __future__ import annotations

import asyncio
import contextlib

from forwardpass.wire import errors
from forwardpass_server.errors import SessionStoreError
from forwardpass_server.sessions.store import SessionStore

_PAUSE_S = 1.0

# At the start, and after a failure: each pause is twice the one before, up to `_PAUSE_S`.
_FIRST_PAUSE_S = 0.1


class SessionStoreWatch:
    """Checks a store every second. `checked` is set after the first check, `reached` after the first that succeeds.

    The store keeps what the checks find, for callers, for the log and for `SessionStore.problem`.
    """

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self.checked = asyncio.Event()
        self.reached = asyncio.Event()

    @property
    def problem(self) -> str:
        """Why the store does not work; "" while it does. On any thread."""
        return self._store.problem

    async def watch(self) -> None:
        """Goes on until it is cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            # The store has logged what is wrong with it.
            with contextlib.suppress(errors.SessionStoreUnavailable, SessionStoreError):
                await self._store.check()
                self.reached.set()
            self.checked.set()
            pause_s = min(2 * pause_s, _PAUSE_S) if self.problem else _PAUSE_S
            await asyncio.sleep(pause_s)
            if not self.problem:
                pause_s = _FIRST_PAUSE_S
