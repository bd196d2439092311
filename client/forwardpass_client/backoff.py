"""How long a connection that broke is tried again."""

from __future__ import annotations

import time

from forwardpass.wire import errors

AWAY = (errors.ServerUnavailable, errors.CallCancelled, errors.ModelLoading, errors.SessionStoreUnavailable)
"""What calls meet while a server, or what it needs, is gone for a moment, or starts anew."""

# A server may have to start anew, which takes some seconds.
PATIENCE_S = 30.0

_LONGEST_PAUSE_S = 2.0


class Patience:
    """Tells one try from the next, and the last. Counts from the first failure since something came forward.

    first_pause_s: seconds before the first new try; each pause is twice the one before.
    """

    def __init__(self, first_pause_s: float) -> None:
        self._first_pause_s = first_pause_s
        self.renew()

    def renew(self) -> None:
        """Something came forward."""
        self._failing_since: float | None = None
        self._pause_s = self._first_pause_s

    def pause_s(self, *, limited: bool = True) -> float | None:
        """Seconds to wait, after a failure, before the next try; None where it has been long enough.

        limited: False where a deadline says how long is long enough.
        """
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if limited and now - self._failing_since > PATIENCE_S:
            return None
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause_s


def deadline_exceeded(reason: Exception | None) -> errors.DeadlineExceeded:
    """The error of a call whose deadline has passed. reason: why its last try failed; None where none had failed."""
    if reason is None:
        return errors.DeadlineExceeded()
    error = errors.DeadlineExceeded(
        f"{errors.DeadlineExceeded.sentence} Its last try failed with {type(reason).__name__}: {reason}"
    )
    error.__cause__ = reason
    return error
