"""How much may be done at once: for everybody, and for each principal."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from forwardpass.wire import errors

# Time for some calls to end, and too short to matter to a caller who was refused.
_RETRY_AFTER_S = 0.1

# What waits may hold this part of what is admitted.
_WAITING_SHARE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """calls: that wait or run. size_bytes: of their requests, those included that are still arriving in pieces, and of
    responses that their callers have not read yet.
    """

    calls: int
    size_bytes: int


@dataclasses.dataclass(eq=False, slots=True)
class _Use:
    """What is being done: for everybody, or for one principal. waiting_bytes: held by requests that wait for room."""

    calls: int = 0
    size_bytes: int = 0
    waiting_bytes: int = 0


class Admission:
    """Counts, and refuses what would be too much. Used on one event loop alone.

    in_all: for everybody together. each: for one principal.
    """

    def __init__(self, in_all: Limits, each: Limits) -> None:
        self._in_all = in_all
        self._each = each
        self._use = _Use()
        self._by_principal: dict[str, _Use] = {}

    @property
    def size_bytes(self) -> int:
        """What there is now, for everybody. On any thread."""
        return self._use.size_bytes

    @property
    def limit_bytes(self) -> int:
        """What there may be at once, for everybody. On any thread."""
        return self._in_all.size_bytes

    @property
    def is_full(self) -> bool:
        """Whether no further call can enter, however short its request is."""
        return self._use.calls >= self._in_all.calls or self._use.size_bytes >= self._in_all.size_bytes

    def overloaded(self) -> errors.ServerOverloaded:
        """The error for a call that is refused before its request is read."""
        calls, size_bytes = self._in_all.calls, self._in_all.size_bytes
        return errors.ServerOverloaded(
            place="the server's calls",
            expected=f"at most {calls} calls and {size_bytes} bytes at once",
            found="more",
            retry_after_s=_RETRY_AFTER_S,
        )

    def limit(self, in_all: Limits, each: Limits) -> None:
        """From now on, other limits. What was taken before stays."""
        self._in_all, self._each = in_all, each

    def enter(self, principal: str, size_bytes: int, calls: int = 1) -> None:
        """Takes a call, or with `calls` 0 a part of one that arrives. Raises ServerOverloaded, which names the limit.

        What is taken must `leave`.
        """
        own = self._by_principal.get(principal)
        if own is None:
            own = self._by_principal[principal] = _Use()
        try:
            _check(self._use, self._in_all, size_bytes, calls, "the server's calls", tells_total=False)
            _check(own, self._each, size_bytes, calls, "this principal's calls", tells_total=True)
        except errors.ServerOverloaded:
            self._forget(principal, own)
            raise
        for use in (own, self._use):
            use.calls += calls
            use.size_bytes += size_bytes

    def hold(self, principal: str, size_bytes: int) -> None:
        """Counts bytes that are there, such as a response: they are not refused, but leave less room for others.

        What is held must `leave`, with `calls` 0.
        """
        own = self._by_principal.setdefault(principal, _Use())
        for use in (own, self._use):
            use.size_bytes += size_bytes

    def leave(self, principal: str, size_bytes: int, calls: int = 1) -> None:
        """Ends what `enter` began."""
        own = self._by_principal[principal]
        for use in (own, self._use):
            use.calls -= calls
            use.size_bytes -= size_bytes
        self._forget(principal, own)

    @contextlib.contextmanager
    def admitted(self, principal: str, size_bytes: int) -> Iterator[None]:
        """A call, as long as it lasts. Raises ServerOverloaded."""
        self.enter(principal, size_bytes)
        try:
            yield
        finally:
            self.leave(principal, size_bytes)

    @contextlib.contextmanager
    def waiting(self, principal: str, held_bytes: int, refusal: errors.ServerOverloaded) -> Iterator[None]:
        """A request that waits for room, as long as that lasts, instead of being refused at once.

        held_bytes: what it holds meanwhile. refusal: is raised where too much waits already: requests that wait take
        memory too.
        """
        own = self._by_principal.setdefault(principal, _Use())
        for use, limits in ((self._use, self._in_all), (own, self._each)):
            most = limits.size_bytes // _WAITING_SHARE
            if use.waiting_bytes and use.waiting_bytes + held_bytes > most:
                self._forget(principal, own)
                raise refusal
        for use in (own, self._use):
            use.waiting_bytes += held_bytes
        try:
            yield
        finally:
            for use in (own, self._use):
                use.waiting_bytes -= held_bytes
            self._forget(principal, own)

    def _forget(self, principal: str, own: _Use) -> None:
        is_used = own.calls or own.size_bytes or own.waiting_bytes
        if not is_used and self._by_principal.get(principal) is own:
            del self._by_principal[principal]


def _check(use: _Use, limits: Limits, size_bytes: int, calls: int, place: str, tells_total: bool) -> None:
    """tells_total: the use is the caller's own. What others do is not for the error to tell."""
    if use.calls + calls > limits.calls:
        raise errors.ServerOverloaded(
            place=place,
            expected=f"at most {limits.calls} at once",
            found=f"{use.calls + calls}" if tells_total else "more",
            retry_after_s=_RETRY_AFTER_S,
        )
    # One alone is always taken: its message has a limit of its own.
    if use.size_bytes and use.size_bytes + size_bytes > limits.size_bytes:
        raise errors.ServerOverloaded(
            place=place,
            expected=f"at most {limits.size_bytes} bytes at once",
            found=f"{use.size_bytes + size_bytes}" if tells_total else "more",
            retry_after_s=_RETRY_AFTER_S,
        )
