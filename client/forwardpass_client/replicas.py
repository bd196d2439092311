"""A call that any of several servers may answer: which server is asked next when one cannot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from forwardpass.wire import errors
from forwardpass_client.patience import AWAY, Patience, deadline_exceeded
from forwardpass_client.transfers import Pause, Steps, Unary

if TYPE_CHECKING:
    from forwardpass_client.calls import Call

# During a rollout some servers have a version, or another content of it, and others do not. An answer of other content
# is never used: ModelChanged is raised in its place.
_LACKING = (errors.ModelNotFound, errors.ModelFailed, errors.ModelChanged)

TransportT = TypeVar("TransportT", bound="_Transport")

TRY_ANOTHER = (*AWAY, *_LACKING)
"""Errors after which another server may answer the same call."""

TURNS = 8
"""How many servers are asked where their number is unknown: as many replicas as the autoscaling component allows."""

# A round asks two servers, so the first pause is short. Pauses double up to 2 s.
_FIRST_PAUSE_S = 0.1

# Rounds for an error of _LACKING, with pauses of 1.5 s together: a version that is gone everywhere is reported soon.
_LACKING_ROUNDS = 5


def deadline(timeout_s: float | None) -> float | None:
    """When a call that begins now must have ended, by time.monotonic; None for never."""
    return None if timeout_s is None else time.monotonic() + timeout_s


def remaining_s(until: float | None, last: Exception | None) -> float | None:
    """Seconds until a deadline. last: why the last server did not answer. Raises DeadlineExceeded, which names it."""
    if until is None:
        return None
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise deadline_exceeded(last)
    return seconds


def ask_others(call: Call[Any], error: errors.ForwardPassError, until: float | None) -> Steps:
    """The steps of a call after the next server in turn failed with `error`: the result in the end.

    Each round asks the sticky server, where the model was looked up, and then the next in turn. until: the deadline.
    Raises the last error after half a minute, and an error of a version that is missing after some seconds.
    """
    patience, lacking_rounds = Patience(_FIRST_PAUSE_S), _LACKING_ROUNDS
    while True:
        for stays in (True, False):
            try:
                return call.read((yield Unary(call.path, call.request, remaining_s(until, error), stays)))
            except TRY_ANOTHER as failure:
                error = failure
            except errors.DeadlineExceeded:
                raise deadline_exceeded(error) from None
        lacking_rounds -= isinstance(error, _LACKING)
        pause_s = patience.pause_s()
        if pause_s is None or not lacking_rounds:
            raise error
        left_s = remaining_s(until, error)
        yield Pause(pause_s if left_s is None else min(pause_s, left_s))


def is_any_serving(call: Call[bool], servers: int, until: float | None) -> Steps:
    """The steps that ask up to so many servers in turn for their health: whether one answers SERVING.

    Raises the last error where no server answers.
    """
    failure: errors.ForwardPassError | None = None
    has_answer = False
    for _ in range(servers):
        try:
            answer = yield Unary(call.path, call.request, remaining_s(until, failure), stays=False)
        except AWAY as error:
            failure = error
            continue
        if call.read(answer):
            return True
        has_answer = True
    if failure is not None and not has_answer:
        raise failure
    return False


class _Transport(Protocol):
    @property
    def has_several_servers(self) -> bool: ...

    @property
    def is_closed(self) -> bool: ...


class Transports(Generic[TransportT]):
    """The transports of a client: the first, and one for each server to which a look-up of a model had to go.

    A transport stays with one server. Where that server lacks a version, a model of it gets the transport of a server
    that has it: so its calls by id, sessions and streams go there, and those of other models remain where they are.
    """

    def __init__(self, connect: Callable[[], TransportT]) -> None:
        self._connect = connect
        self.own = connect()
        self._others: list[TransportT] = []

    @property
    def all(self) -> list[TransportT]:
        return [self.own, *self._others]

    @property
    def servers(self) -> int:
        """How many servers may have to be asked until each was."""
        return TURNS if self.own.has_several_servers else 1

    def candidates(self) -> Iterator[TransportT]:
        """Transports to look a model up with: those that are open, then new ones, to servers taken at random."""
        known = self.all
        yield from known
        for _ in range(self.servers - len(known)):
            yield self._connect()

    def next_failure(
        self, error: errors.ForwardPassError, former: errors.ForwardPassError | None
    ) -> errors.ForwardPassError:
        """What a look-up raises in the end, after another error. Raises it where no other server is to be asked."""
        if isinstance(error, errors.DeadlineExceeded) and former is not None:
            raise deadline_exceeded(former) from None
        if not isinstance(error, TRY_ANOTHER) or self.own.is_closed or not self.own.has_several_servers:
            raise error
        return former or error

    def is_kept(self, transport: TransportT) -> bool:
        """Whether a transport stays open until the client is closed."""
        return any(transport is kept for kept in self.all)

    def keep(self, transport: TransportT) -> None:
        """Keeps a transport open: a model uses it."""
        if not self.is_kept(transport):
            self._others.append(transport)
