"""Calls that any of several replicas may answer: which replica is asked next where one cannot answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from forwardpass.wire import errors
from forwardpass.wire.chunks import Pieces
from forwardpass_client import retries
from forwardpass_client.backoff import RETRYABLE, Backoff
from forwardpass_client.call import Call
from forwardpass_client.deadlines import Deadline
from forwardpass_client.transfers import Pause, Steps, Unary

# During a rollout some replicas have a version, or another content of it, and others do not. An answer of other content
# is never used: ModelChanged is raised instead.
LACKING = (errors.ModelNotFound, errors.ModelFailed, errors.ModelChanged)

TransportT = TypeVar("TransportT", bound="_Transport")

TURNS = 8
"""How many servers are asked where their number is unknown: as many replicas as the autoscaling component allows."""

# Rounds for an error of LACKING, with pauses of some 1.5 s together: a version that no replica has is reported soon.
LACKING_ROUNDS = 5


def is_for_another(error: Exception, request: bytes | Pieces = b"") -> bool:
    """Whether another replica may answer the same call."""
    return retries.is_retryable(error, request) or isinstance(error, LACKING)


def ask_others(call: Call[Any], error: errors.ForwardPassError, deadline: Deadline) -> Steps:
    """The steps of a call after the next replica in turn failed with `error`: the result in the end.

    Each round asks the sticky server, where the model was looked up, and then the next in turn.
    Raises the last error after half a minute, an error of a version that is missing after some seconds, and
    DeadlineExceeded, which names the last error.
    """
    backoff, lacking_rounds = Backoff(deadline), LACKING_ROUNDS
    while True:
        for sticky in (True, False):
            deadline.last_error = error
            try:
                return call.read((yield Unary(call.path, call.request, sticky)))
            except errors.ForwardPassError as failure:
                if not is_for_another(failure, call.request):
                    raise
                error = failure
        lacking_rounds -= isinstance(error, LACKING)
        if not lacking_rounds:
            raise error
        yield Pause(backoff.pause_s(error))


def is_any_serving(call: Call[bool], servers: int, deadline: Deadline) -> Steps:
    """The steps that ask up to so many servers in turn for their health: whether one answers SERVING.

    Raises the last error where no server answers.
    """
    failure: errors.ForwardPassError | None = None
    has_answer = False
    for _ in range(servers):
        try:
            answer = yield Unary(call.path, call.request, sticky=False)
        except RETRYABLE as error:
            failure = deadline.last_error = error
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

    A transport keeps one sticky server. Where that server lacks a version, a model of it gets the transport of a server
    that has it: its calls by id, sessions and streams go there, and those of other models go where they went before.
    """

    def __init__(self, connect: Callable[[str | None], TransportT], addresses: Sequence[str]) -> None:
        """connect: makes a transport that prefers an address; None for any. addresses: of a target that lists them."""
        self._connect = connect
        self._addresses = addresses
        self.own = connect(None)
        self._others: list[TransportT] = []

    @property
    def all(self) -> list[TransportT]:
        """The transport of the client, then those that `keep` added: all that the client has to close."""
        return [self.own, *self._others]

    @property
    def servers(self) -> int:
        """How many attempts it takes to ask every server."""
        return max(TURNS, len(self._addresses)) if self.own.has_several_servers else 1

    def candidates(self) -> Iterator[TransportT]:
        """Transports to look a model up with: those that are open, then new ones.

        The new ones go to each address that the target lists. A name does not tell its servers: then they go to as many
        servers taken at random.
        """
        known = self.all
        yield from known
        if self._addresses:
            yield from map(self._connect, random.sample(self._addresses, len(self._addresses)))
        else:
            for _ in range(self.servers - len(known)):
                yield self._connect(None)

    def next_failure(
        self, error: errors.ForwardPassError, former: errors.ForwardPassError | None, deadline: Deadline
    ) -> errors.ForwardPassError:
        """The error that a look-up raises in the end, after another one. Raises it where no other server is asked."""
        deadline.last_error = former
        if not is_for_another(error) or self.own.is_closed or not self.own.has_several_servers:
            raise deadline.explained(error)
        return former or error

    def is_kept(self, transport: TransportT) -> bool:
        """Whether a transport stays open until the client is closed."""
        return any(transport is kept for kept in self.all)

    def keep(self, transport: TransportT) -> None:
        """Keeps a transport open until the client is closed, because a model uses it."""
        if not self.is_kept(transport):
            self._others.append(transport)
