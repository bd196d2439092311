"""Which sessions of one server are open and which have ended, by its monotonic clock."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable

from forwardpass_server.sessions.store import SessionKey, SessionLimits, SessionObserver
from forwardpass_server.sessions.stores import refusals

# Ended sessions of one principal, the latest ones: else who opens and closes them in a loop would fill the memory.
MAX_REMEMBERED = 2**16


class Lifetimes:
    """Used on one event loop. clock: in seconds; never goes back."""

    def __init__(self, limits: SessionLimits, observer: SessionObserver, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._observer = observer
        self._clock = clock
        # When each was used; what was not for the longest time stands first.
        self._open: collections.OrderedDict[SessionKey, float] = collections.OrderedDict()
        # Of each that is open and has one, and how many are of each.
        self._models: dict[SessionKey, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        # Of each principal, in the order in which they ended: whether by expiry, and until when that is remembered.
        self._ended: dict[str, collections.OrderedDict[bytes, tuple[bool, float]]] = {}
        self._forgotten: list[SessionKey] = []

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def count_of(self, model: str) -> int:
        """How many of a model are open."""
        return self._counts[model]

    def open(self, key: SessionKey, model: str = "") -> None:
        """A session is there, and counts as used now, if it has not ended meanwhile. model: of a new one."""
        if self._has_ended(key):
            return
        if model and key not in self._open:
            self._models[key] = model
            self._counts[model] += 1
        self._open[key] = self._clock()
        self._open.move_to_end(key)

    def use(self, key: SessionKey) -> None:
        """Counts a session as used now. Raises SessionNotFound or SessionExpired."""
        if key not in self._open:
            self.refuse_ended(key)
            raise refusals.not_found(key)
        self.open(key)

    def refuse_ended(self, key: SessionKey) -> None:
        """Raises SessionNotFound or SessionExpired where it is remembered that a session has ended."""
        if self._has_ended(key):
            is_expired, _ = self._ended[key.principal][key.session_id]
            raise refusals.ended(key, is_expired)

    def end(self, key: SessionKey, *, is_expired: bool) -> None:
        """A session has ended, which is remembered."""
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
        """Ends what was not used for too long, and returns it."""
        last = self._clock() - self._limits.idle_expiry_s
        expired = [key for key, _ in itertools.takewhile(lambda entry: entry[1] <= last, self._open.items())]
        for key in expired:
            self.end(key, is_expired=True)
        if expired:
            self._observer.sessions_expired(len(expired))
        return expired

    def forget(self) -> list[SessionKey]:
        """What was remembered for long enough, and is not any more."""
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
