"""Whether a server can do what it is for, and if not, why."""

from __future__ import annotations

from forwardpass_server.catalog.required_models import RequiredModels
from forwardpass_server.process.liveness import Liveness
from forwardpass_server.sessions.store_watch import SessionStoreWatch


class Readiness:
    """Starts once every model of the start was tried, every required model can be called, and the session store works.

    After that it is ready while the device works and every required model can be called. A session store that fails
    later does not count: other calls go on without it.
    """

    def __init__(self, required: RequiredModels, store: SessionStoreWatch, liveness: Liveness) -> None:
        self._required = required
        self._store = store
        self._liveness = liveness
        self.has_tried_models = False
        self._has_started = False

    @property
    def has_started(self) -> bool:
        """Stays true once it is."""
        if not self._has_started:
            self._has_started = self.has_tried_models and self._store.reached.is_set() and not self._required.missing()
        return self._has_started

    def reasons(self) -> list[str]:
        """Why the server is not ready, each as a sentence for callers; empty when it is. On any thread."""
        reasons = self._required.missing() if self.has_tried_models else ["the models of the start are being loaded"]
        if not self.has_started and not self._store.reached.is_set():
            reasons.append(self._store.problem or "the session store has not answered yet")
        if not self._liveness.is_alive:
            reasons.append("the device fails or hangs")
        return reasons
