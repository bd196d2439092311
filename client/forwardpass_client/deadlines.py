"""Deadlines: the point in time at which a public call ends."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator

from forwardpass.wire import errors


class Deadline:
    """When one public call must have ended. It is made once for the call, and every attempt, pause and stream gets it.

    timeout_s: seconds from now; None for no limit.
    is_renewable: whether progress moves the deadline, as in transfers and evaluations without a timeout of their own:
      the client's timeout then limits the time without progress.
    at: by time.monotonic; None for no limit.
    last_error: why the last attempt failed; None while none has failed.
    """

    # In the class: a small call pays for each attribute that is set (40 ns).
    is_renewable = False
    last_error: Exception | None = None

    def __init__(self, timeout_s: float | None, *, is_renewable: bool = False) -> None:
        self.timeout_s = timeout_s
        if is_renewable:
            self.is_renewable = True
        self.at = None if timeout_s is None else time.monotonic() + timeout_s

    def remaining_s(self) -> float | None:
        """Seconds until the deadline; None for no limit. Raises DeadlineExceeded where none is left."""
        if self.at is None:
            return None
        remaining_s = self.at - time.monotonic()
        if remaining_s <= 0:
            raise self.exceeded()
        return remaining_s

    def wait_s(self) -> float | None:
        """How long to wait for a condition at most: seconds until the deadline, 0 after it; None for no limit."""
        return None if self.at is None else max(self.at - time.monotonic(), 0)

    def is_before(self, pause_s: float) -> bool:
        """Whether the deadline passes within so many seconds."""
        return self.at is not None and time.monotonic() + pause_s >= self.at

    def restart(self) -> None:
        """Counts the timeout from now on: a coroutine's time begins when it is awaited."""
        if self.timeout_s is not None:
            self.at = time.monotonic() + self.timeout_s

    def renew(self, more_s: float = 0.0) -> None:
        """Notes progress: the timeout of a renewable deadline counts from now on, with so many seconds added."""
        if self.is_renewable and self.timeout_s is not None:
            self.at = time.monotonic() + self.timeout_s + more_s

    def fixed(self) -> Deadline:
        """The same point in time, which progress does not move."""
        fixed = Deadline(None)
        fixed.at, fixed.last_error = self.at, self.last_error
        return fixed

    def part_s(self) -> float | None:
        """The `timeout_s` for a public call that is one part of this one: None for the client's own."""
        return None if self.is_renewable else self.remaining_s()

    def exceeded(self) -> errors.DeadlineExceeded:
        """The error of this deadline. It names the last error."""
        if self.last_error is None:
            return errors.DeadlineExceeded()
        error = errors.DeadlineExceeded(
            f"{errors.DeadlineExceeded.sentence} The last attempt failed with "
            f"{type(self.last_error).__name__}: {self.last_error}"
        )
        error.__cause__ = self.last_error
        return error

    def explained(self, error: errors.ForwardPassError) -> errors.ForwardPassError:
        """The same error; a DeadlineExceeded names the last error."""
        if isinstance(error, errors.DeadlineExceeded) and self.last_error is not None:
            return self.exceeded()
        return error


@contextlib.contextmanager
def locked(lock: threading.Lock, deadline: Deadline) -> Iterator[None]:
    """Holds the lock. Raises DeadlineExceeded where another thread holds it until the deadline."""
    wait_s = deadline.wait_s()
    if not lock.acquire(timeout=-1 if wait_s is None else wait_s):
        raise deadline.exceeded()
    try:
        yield
    finally:
        lock.release()


def check_timeout(timeout_s: float | None) -> float | None:
    """The timeout as a float. Raises TypeError for other types than numbers, and ValueError for an invalid number."""
    if timeout_s is None:
        return None
    if isinstance(timeout_s, (bool, str, bytes)):
        raise TypeError(f"timeout_s: expected seconds as a number, or None, got {timeout_s!r}")
    try:
        seconds = float(timeout_s)
    except (TypeError, ValueError):
        raise TypeError(f"timeout_s: expected seconds as a number, or None, got {timeout_s!r}") from None
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        hint = "; None means no limit" if seconds == math.inf else ""
        raise ValueError(f"timeout_s: expected seconds >= 0, got {timeout_s!r}{hint}")
    return seconds
