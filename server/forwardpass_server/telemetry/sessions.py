"""What is counted of metric sessions."""

from __future__ import annotations

from collections.abc import Callable

from forwardpass_server.telemetry.families import Families


class SessionMetrics:
    """Of one server's sessions."""

    def __init__(self, families: Families) -> None:
        self._open = families.gauge(
            "forwardpass_sessions",
            "Metric sessions that are open; where servers share them, those that this one has used of late.",
        )
        self._shared = families.gauge(
            "forwardpass_session_store_shared", "1 where other servers find this one's sessions too, 0 where none does."
        )
        self._up = families.gauge(
            "forwardpass_session_store_up", "1 while the session store works, 0 from a failure until it works again."
        )
        self.sessions_expired = families.counter(
            "forwardpass_sessions_expired_total", "Sessions dropped since nobody used them."
        ).inc
        updates = families.counter(
            "forwardpass_session_updates_total",
            "Updates of sessions: applied, or answered since they had been applied before.",
            ("outcome",),
        )
        self._applied = updates.labels("applied")
        self._duplicates = updates.labels("duplicate")
        self.session_commit = families.histogram(
            "forwardpass_session_commit_seconds",
            "Seconds from handing a session's record to its store until it was kept.",
        ).observe

    def store(self, count: Callable[[], int], is_shared: bool, is_up: Callable[[], bool]) -> None:
        """Shows count() as the number of open sessions, whether they are this server's alone, and is_up()."""
        self._open.set_function(count)
        self._up.set_function(is_up)
        self._shared.set(is_shared)

    def session_updates(self, applied: int, duplicates: int) -> None:
        self._applied.inc(applied)
        self._duplicates.inc(duplicates)
