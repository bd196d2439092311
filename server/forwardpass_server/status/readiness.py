"""Readiness: whether a server should receive calls, and the reasons why not."""

from __future__ import annotations

from forwardpass_server.catalog.required_models import RequiredModels
from forwardpass_server.process.liveness import Liveness
from forwardpass_server.sessions.store_watch import SessionStoreWatch


class Readiness:
    """The start-up and readiness of one server.

    It has started once all models of the start are loaded or have failed, every required model can be called, and the
    session store has answered. From then on it is ready while the device works and every required model can be called.
    A later failure of the session store does not count: all calls without sessions still work.
    """

    def __init__(self, required: RequiredModels, store: SessionStoreWatch, liveness: Liveness) -> None:
        self._required = required
        self._store = store
        self._liveness = liveness
        self.has_tried_models = False
        self._has_started = False

    @property
    def has_started(self) -> bool:
        """Whether the server has started. Once true, it stays true."""
        if not self._has_started:
            self._has_started = self.has_tried_models and self._store.reached.is_set() and not self._required.missing()
        return self._has_started

    def reasons(self) -> list[str]:
        """A sentence for each reason why the server is not ready; empty when it is ready. Thread-safe."""
        reasons = (
            self._required.missing()
            if self.has_tried_models
            else ["the server is starting: its models are being loaded"]
        )
        if not self.has_started and not self._store.reached.is_set():
            reasons.append(self._store.problem or "the session store has not answered yet: check --session-store")
        if not self._liveness.is_alive:
            reasons.append("the device fails or hangs: see the server's log")
        return reasons
