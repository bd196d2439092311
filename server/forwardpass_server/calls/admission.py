"""Limits on the calls in progress and their bytes: for all principals together, and for each one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from forwardpass.wire import errors

# Long enough for some calls to end, and short for the caller.
_RETRY_AFTER_S = 0.1

# Requests that wait for room may hold 1/4 of the bytes that admitted calls may.
_WAITING_SHARE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """calls: in progress at once. size_bytes: of their requests, including those that still arrive in pieces, and of
    responses that their clients have not read yet.
    """

    calls: int
    size_bytes: int


@dataclasses.dataclass(eq=False, slots=True)
class _Use:
    """What is in use, by all principals or by one.

    size_bytes: with state_bytes, those of states. waiting_bytes: of requests that wait for room.
    """

    calls: int = 0
    size_bytes: int = 0
    state_bytes: int = 0
    waiting_bytes: int = 0


class Admission:
    """Counts calls and bytes, and refuses calls beyond the limits. Used on one event loop only.

    in_all: the limits of all principals together. each: the limits of one principal.
    """

    def __init__(self, in_all: Limits, each: Limits) -> None:
        self._in_all = in_all
        self._each = each
        self._use = _Use()
        self._by_principal: dict[str, _Use] = {}

    @property
    def size_bytes(self) -> int:
        """The bytes in use by all principals. May be read on any thread."""
        return self._use.size_bytes

    @property
    def limit_bytes(self) -> int:
        """The limit of the bytes of all principals. May be read on any thread."""
        return self._in_all.size_bytes

    @property
    def principal_limit_bytes(self) -> int:
        """The limit of the bytes of one principal."""
        return self._each.size_bytes

    @property
    def is_full(self) -> bool:
        """Whether no further call can enter, however short its request is."""
        return self._use.calls >= self._in_all.calls or self._use.size_bytes >= self._in_all.size_bytes

    def overloaded(self) -> errors.ServerOverloaded:
        """The error for a call that is refused before its request is read. It names the limit that is reached."""
        is_full_of_calls = self._use.calls >= self._in_all.calls
        limit = f"{self._in_all.calls}" if is_full_of_calls else f"{self._in_all.size_bytes} bytes"
        return _refusal("the server's calls", limit, "more")

    def limit(self, in_all: Limits, each: Limits) -> None:
        """Sets new limits. Calls that were admitted before go on."""
        self._in_all, self._each = in_all, each

    def enter(self, principal: str, size_bytes: int, calls: int = 1) -> None:
        """Admits a call, or with `calls` 0 a part of a call that arrives in pieces. `leave` must end it.

        Raises ServerOverloaded, which names the limit.
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
        """Counts bytes without refusing them, such as those of a response. `leave` with `calls` 0 must end it."""
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
        """Admits a call for the duration of the context. Raises ServerOverloaded."""
        self.enter(principal, size_bytes)
        try:
            yield
        finally:
            self.leave(principal, size_bytes)

    @contextlib.contextmanager
    def admitted_state(self, principal: str, size_bytes: int) -> Iterator[None]:
        """Admits the state of a training for the duration of the context. Raises ServerOverloaded.

        A state does not count as a call, and one request is admitted beside it, whatever its size. A training holds its
        state until its last batch has run. If the state took the room of its batches, the training would never end.
        """
        self.enter(principal, size_bytes, calls=0)
        own = self._by_principal[principal]
        for use in (own, self._use):
            use.state_bytes += size_bytes
        try:
            yield
        finally:
            for use in (own, self._use):
                use.state_bytes -= size_bytes
            self.leave(principal, size_bytes, calls=0)

    @contextlib.contextmanager
    def waiting(self, principal: str, held_bytes: int, refusal: errors.ServerOverloaded) -> Iterator[None]:
        """Counts a request that waits for room, for the duration of the context.

        held_bytes: the memory that it takes meanwhile. refusal: is raised if too many bytes wait already.
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
    """tells_total: the use is that of the caller alone, so that the error may say how much it is."""
    if use.calls + calls > limits.calls:
        raise _refusal(place, f"{limits.calls}", f"{use.calls + calls}" if tells_total else "more")
    # A single request is always admitted: the message size limit bounds it.
    if use.size_bytes > use.state_bytes and use.size_bytes + size_bytes > limits.size_bytes:
        raise _refusal(place, f"{limits.size_bytes} bytes", f"{use.size_bytes + size_bytes}" if tells_total else "more")


def _refusal(place: str, limit: str, found: str) -> errors.ServerOverloaded:
    return errors.ServerOverloaded(
        place=place, expected=f"at most {limit} at once", found=found, retry_after_s=_RETRY_AFTER_S
    )
