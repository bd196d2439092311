"""Metrics of metric sessions."""

from __future__ import annotations

from collections.abc import Callable

from forwardpass_server.telemetry.families import Families


class SessionMetrics:
    """The metrics of one server's sessions."""

    def __init__(self, families: Families) -> None:
        self._open = families.gauge(
            "forwardpass_sessions",
            "Open metric sessions; with a shared store, those that this server has used recently.",
        )
        self._shared = families.gauge(
            "forwardpass_session_store_shared", "1 if other servers share the session store, else 0."
        )
        self._up = families.gauge(
            "forwardpass_session_store_up", "1 while the session store works, 0 from a failure until it works again."
        )
        self.sessions_expired = families.counter(
            "forwardpass_sessions_expired_total", "Sessions dropped because they were not used for --session-expiry."
        ).inc
        updates = families.counter(
            "forwardpass_session_updates_total",
            'Updates of sessions, by outcome: "applied", or "duplicate" for one that was sent again.',
            ("outcome",),
        )
        self._applied = updates.labels("applied")
        self._duplicates = updates.labels("duplicate")
        self.session_commit = families.histogram(
            "forwardpass_session_commit_seconds",
            "Seconds to write the record of a session to its store.",
        ).observe

    def store(self, count: Callable[[], int], is_shared: bool, is_up: Callable[[], bool]) -> None:
        """Reports count() as the number of open sessions, whether the store is shared, and is_up()."""
        self._open.set_function(count)
        self._up.set_function(is_up)
        self._shared.set(is_shared)

    def session_updates(self, applied: int, duplicates: int) -> None:
        """Counts updates."""
        self._applied.inc(applied)
        self._duplicates.inc(duplicates)
