"""Backoff: how long a failed call pauses before its next attempt, and when it gives up."""

from __future__ import annotations

import math
import random
import time

from forwardpass.wire import errors
from forwardpass_client.deadlines import Deadline

RETRYABLE = (
    errors.ServerUnavailable,
    errors.CallCancelled,
    errors.ModelLoading,
    errors.SessionStoreUnavailable,
    errors.WeightStoreUnavailable,
)
"""Errors of a server that is away for a moment: it restarts, drains, loads the model or has lost one of its stores."""

RESTART_S = 30.0
"""How long attempts go on where a call must outlive the restart of a server, which takes some seconds."""

BRIEF_S = 3.0
"""How long attempts of a short call go on: a server that is not there is reported soon."""

# As much as the first connection attempts of a client take; the longest pause is gRPC's limit for reconnects.
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0

# Clients that failed together do not come back together.
_JITTER = 0.5


class Backoff:
    """Pauses that double from 0.1 s to 2 s, with a jitter of 50 %, until the deadline of the call.

    limit_s: attempts end so long after the first failure since the last progress, even where the deadline is later.
    """

    def __init__(self, deadline: Deadline, limit_s: float = RESTART_S) -> None:
        self._deadline = deadline
        self._limit_s = limit_s
        self.reset()

    def reset(self) -> None:
        """Notes progress: the pauses and the limit begin anew."""
        self._failing_since: float | None = None
        self._next_pause_s = _FIRST_PAUSE_S

    def pause_s(self, error: errors.ForwardPassError) -> float:
        """Seconds to wait after `error` before the next attempt; at least those that the server asks for.

        Raises `error` where there is no next attempt. Where the deadline is the reason and the error is none of
        RETRYABLE, raises DeadlineExceeded, which names it.
        """
        self._deadline.last_error = error
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since >= self._limit(error):
            raise error
        pause_s = max(error.retry_after_s, self._next_pause_s * random.uniform(1 - _JITTER, 1 + _JITTER))
        self._next_pause_s = min(2 * self._next_pause_s, _LONGEST_PAUSE_S)
        if self._deadline.is_before(pause_s):
            # Waiting for it would only delay the error.
            raise error if isinstance(error, (*RETRYABLE, errors.ServerOverloaded)) else self._deadline.exceeded()
        return pause_s

    def _limit(self, error: errors.ForwardPassError) -> float:
        if isinstance(error, errors.ServerOverloaded):
            # The server is there: the caller's deadline says how long it is worth waiting.
            return RESTART_S if self._deadline.at is None else math.inf
        return self._limit_s
