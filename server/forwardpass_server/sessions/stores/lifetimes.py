"""Tracks which sessions of one server are open and which have ended, by its monotonic clock."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable

from forwardpass_server.sessions.store import SessionKey, SessionLimits, SessionObserver
from forwardpass_server.sessions.stores import refusals

# How many ended sessions of one principal are remembered: a client may open and close sessions in a loop.
MAX_REMEMBERED = 2**16


class Lifetimes:
    """Used on one event loop. clock: in seconds; never goes back."""

    def __init__(self, limits: SessionLimits, observer: SessionObserver, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._observer = observer
        self._clock = clock
        # The time of the last use of each, in the order of use.
        self._open: collections.OrderedDict[SessionKey, float] = collections.OrderedDict()
        # The model of each open session that has one, and the number of sessions of each model.
        self._models: dict[SessionKey, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        # For each principal, in the order of their end: whether the session expired, and until when it is remembered.
        self._ended: dict[str, collections.OrderedDict[bytes, tuple[bool, float]]] = {}
        self._forgotten: list[SessionKey] = []

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def count_of(self, model: str) -> int:
        """How many of a model are open."""
        return self._counts[model]

    def open(self, key: SessionKey, model: str = "") -> None:
        """Adds a session, or marks it as used, unless it has ended. model: of a new session."""
        if self._has_ended(key):
            return
        if model and key not in self._open:
            self._models[key] = model
            self._counts[model] += 1
        self._open[key] = self._clock()
        self._open.move_to_end(key)

    def use(self, key: SessionKey) -> None:
        """Marks a session as used. Raises SessionNotFound or SessionExpired."""
        if key not in self._open:
            self.refuse_ended(key)
            raise refusals.not_found(key)
        self.open(key)

    def refuse_ended(self, key: SessionKey) -> None:
        """Raises SessionNotFound or SessionExpired for a session that is remembered to have ended."""
        if self._has_ended(key):
            is_expired, _ = self._ended[key.principal][key.session_id]
            raise refusals.ended(key, is_expired)

    def end(self, key: SessionKey, *, is_expired: bool) -> None:
        """Removes a session, and remembers that it has ended."""
        self._open.pop(key, None)
        model = self._models.pop(key, "")
        if model:
            self._counts[model] -= 1
            if not self._counts[model]:
                del self._counts[model]
        remembered = self._ended.setdefault(key.principal, collections.OrderedDict())
        remembered.setdefault(key.session_id, (is_expired, self._clock() + self._limits.remember_s))
        if len(remembered) > MAX_REMEMBERED:
            session_id, _ = remembered.popitem(last=False)
            self._forgotten.append(SessionKey(key.principal, session_id))

    def expire(self) -> list[SessionKey]:
        """Ends the sessions that were idle for too long, and returns their keys."""
        last = self._clock() - self._limits.idle_expiry_s
        expired = [key for key, _ in itertools.takewhile(lambda entry: entry[1] <= last, self._open.items())]
        for key in expired:
            self.end(key, is_expired=True)
        if expired:
            self._observer.sessions_expired(len(expired))
        return expired

    def forget(self) -> list[SessionKey]:
        """Forgets ended sessions that were remembered for long enough, and returns their keys."""
        now = self._clock()
        for principal, remembered in list(self._ended.items()):
            old = [one for one, _ in itertools.takewhile(lambda entry: entry[1][1] <= now, remembered.items())]
            for session_id in old:
                del remembered[session_id]
                self._forgotten.append(SessionKey(principal, session_id))
            if not remembered:
                del self._ended[principal]
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def _has_ended(self, key: SessionKey) -> bool:
        return key.session_id in self._ended.get(key.principal, {})
