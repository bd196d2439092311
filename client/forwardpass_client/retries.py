"""A call that is made again after errors which its next attempt may not meet."""

from __future__ import annotations

from forwardpass.wire import errors
from forwardpass.wire.chunks import Pieces
from forwardpass_client import long_calls
from forwardpass_client.backoff import BRIEF_S, RETRYABLE, Backoff
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import Puttable
from forwardpass_client.transfers import Pause, Steps, Unary


def is_retryable(error: Exception, request: bytes | Pieces) -> bool:
    """Whether another attempt may succeed at the same server.

    A long request that the server has no memory for is sent again; a short one fails at once, so that a busy server
    gets fewer calls and not more.
    """
    if isinstance(error, errors.ServerOverloaded):
        return len(request) >= long_calls.MIN_BYTES
    return isinstance(error, RETRYABLE)


def attempts(
    attempt: Unary,
    held: Puttable | None,
    deadline: Deadline,
    *,
    limit_s: float = BRIEF_S,
    after: errors.ForwardPassError | None = None,
) -> Steps:
    """The steps of one call at one server: its answer in the end.

    held: weights that the request names; where the server has dropped them, they are put again, once for each server
      that takes the call. limit_s: see `Backoff`. after: the error of an attempt that was made already.
    Raises the last error, or DeadlineExceeded, which names it.
    """
    backoff = Backoff(deadline, limit_s)
    has_put = False
    error = after
    while True:
        if error is None:
            try:
                return (yield attempt)
            except errors.ForwardPassError as failure:
                error = failure
        if isinstance(error, errors.WeightsNotFound) and held is not None and not has_put:
            has_put, error = True, None
            # Outside the attempt: a put retries by itself, and its errors are final.
            yield from held.put(deadline)
            continue
        if not is_retryable(error, attempt.request):
            raise error
        pause_s = backoff.pause_s(error)
        # Another server may have taken the place of the one that failed.
        has_put, error = False, None
        yield Pause(pause_s)
