"""Calls by weights id where replicas share weights: which replica is asked, and which one after it."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import threading
import time
from collections.abc import Collection, Sequence
from typing import Final

from forwardpass.wire import errors
from forwardpass_client import retries
from forwardpass_client.backoff import RETRYABLE, Backoff
from forwardpass_client.call import Call
from forwardpass_client.deadlines import Deadline
from forwardpass_client.health import check_health
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.replicas import LACKING, LACKING_ROUNDS, is_for_another
from forwardpass_client.transfers import Pause, Resolve, Steps, Unary

# Answers of a replica that is not there, drains or has not loaded the model yet.
_GONE = (errors.ServerUnavailable, errors.CallCancelled, errors.ModelLoading)

# A replica that is gone is asked for its health so often, while calls are made.
_PROBE_S = 0.5
_PROBE_TIMEOUT_S = 2.0

# A name is looked up so often while calls are made, and at most once a second after failures.
_RESOLVE_S = 10.0
_RESOLVE_AGAIN_S = 1.0

# How many replicas are asked for weights before they are put again. One replica may have read the shared tier before
# the weights were there.
_LOOKS = 3

# An overloaded replica is replaced by the next in rank only: more attempts would load all replicas.
_OVERLOADS = 2

# Ranks that are kept, counted in addresses: about 10 MB.
_KEPT = 2**17


@dataclasses.dataclass(slots=True)
class _Replica:
    """is_up: whether calls are sent to it. probe_at: when to ask for its health, by time.monotonic."""

    is_up: bool = True
    probe_at: float = 0.0


class Routes:
    """The replicas of a target that share weights, and whether they are up. Any thread may use it.

    addresses: of a target that lists several. name: (host, port) of a target that is one name for all replicas.
    Without both, and before `begin`, routing is off: calls by weights id go to the sticky server.

    For each set of weights, the replicas have an order: by the hash of the weights id with the address (rendezvous
    hashing). All clients compute the same order. A replica that is added or removed changes the first place of only as
    many sets as it has, or had.
    """

    def __init__(self, addresses: Sequence[str], name: tuple[str, int] | None) -> None:
        self._listed = addresses
        self._name = name
        self._lock = threading.Lock()
        self._replicas: dict[str, _Replica] = {}
        self._ranks: collections.OrderedDict[bytes, tuple[str, ...]] = collections.OrderedDict()
        self._resolve_at = 0.0
        self._turn = 0
        self._is_maintained = False
        self.is_on = False

    @property
    def addresses(self) -> Collection[str]:
        """The replicas that the target stands for now."""
        return self._replicas.keys()

    def begin(self) -> Steps:
        """The steps that turn routing on. Where the name cannot be looked up, routing stays off."""
        if self.is_on or not (self._listed or self._name):
            return
        addresses = self._listed
        if self._name:
            try:
                addresses = yield Resolve(*self._name)
            except errors.ServerUnavailable:
                return
        with self._lock:
            self._replicas = {address: _Replica() for address in addresses}
            self._ranks.clear()
            self._resolve_at = time.monotonic() + _RESOLVE_S
            self.is_on = bool(addresses)

    def end(self) -> None:
        """Turns routing off, because a server does not share weights."""
        self.is_on = False

    def rank(self, weights_id: bytes) -> tuple[str, ...]:
        """All replicas in the order in which they are asked for these weights."""
        rank = self._ranks.get(weights_id)
        if rank is None:
            with self._lock:
                rank = tuple(sorted(self._replicas, key=lambda address: _weight(weights_id, address), reverse=True))
                self._ranks[weights_id] = rank
                while len(self._ranks) * (len(rank) or 1) > _KEPT:
                    self._ranks.popitem(last=False)
        return rank

    def pick(self, weights_id: bytes, asked: Collection[str] = ()) -> str | None:
        """The replica to ask: the first in rank that is up, or the first that is not, without those in `asked`.

        None where routing is off, and where all replicas were asked.
        """
        if not self.is_on:
            return None
        others = (
            [address for address in self.rank(weights_id) if address not in asked] if asked else self.rank(weights_id)
        )
        for address in others:
            replica = self._replicas.get(address)
            if replica is not None and replica.is_up:
                return address
        return others[0] if others else None

    def next_in_turn(self) -> str | None:
        """The replica for a call that any of them can answer equally well; None where routing is off."""
        if not self.is_on:
            return None
        with self._lock:
            self._turn += 1
            up = [address for address, replica in self._replicas.items() if replica.is_up] or list(self._replicas)
            return up[self._turn % len(up)]

    def failed(self, address: str | None, error: Exception) -> None:
        """Notes an error of a replica: one that is gone gets no further calls until it is healthy again."""
        if isinstance(error, _GONE):
            self._note(address, is_up=False)

    def _note(self, address: str | None, *, is_up: bool) -> None:
        with self._lock:
            replica = self._replicas.get(address or "")
            if replica is None:
                return
            now = time.monotonic()
            if not is_up:
                self._resolve_at = min(self._resolve_at, now + _RESOLVE_AGAIN_S)
            replica.is_up, replica.probe_at = is_up, now + _PROBE_S

    def must_maintain(self) -> bool:
        """Whether the caller is to carry out `maintain`. Only one caller is told so at a time."""
        if not self.is_on or self._is_maintained:
            return False
        now = time.monotonic()
        if not (self._must_resolve(now) or self._unhealthy(now)):
            return False
        with self._lock:
            is_first, self._is_maintained = not self._is_maintained, True
        return is_first

    def _must_resolve(self, now: float) -> bool:
        return self._name is not None and now >= self._resolve_at

    def _unhealthy(self, now: float) -> list[str]:
        replicas = list(self._replicas.items())
        return [address for address, replica in replicas if not replica.is_up and now >= replica.probe_at]

    def maintain(self) -> Steps:
        """The steps that look the name up again where it is time, and ask replicas that were gone for their health.

        Each step has a deadline of its own.
        """
        try:
            if self._name is not None and self._must_resolve(time.monotonic()):
                self._resolve_at = time.monotonic() + _RESOLVE_S
                try:
                    self._update((yield Resolve(*self._name)))
                except errors.ServerUnavailable:
                    self._resolve_at = time.monotonic() + _RESOLVE_AGAIN_S
            health = check_health()
            for address in self._unhealthy(time.monotonic()):
                try:
                    answer = yield Unary(health.path, health.request, address=address, timeout_s=_PROBE_TIMEOUT_S)
                    self._note(address, is_up=health.read(answer))
                except errors.ForwardPassError:
                    self._note(address, is_up=False)
        finally:
            self._is_maintained = False

    def _update(self, addresses: Sequence[str]) -> None:
        with self._lock:
            if not addresses or set(addresses) == set(self._replicas):
                return
            # A replica that is new gets calls once it is healthy.
            self._replicas = {one: self._replicas.get(one) or _Replica(is_up=False) for one in addresses}
            self._ranks.clear()


def _weight(weights_id: bytes, address: str) -> bytes:
    return hashlib.blake2b(weights_id + address.encode(), digest_size=8).digest()


class Route:
    """The replica of one piece of work, such as a stream or a transfer: one replica, until it is gone.

    weights_id: None for the next replica in turn. fixed: the only replica; None for one that is chosen.
    """

    def __init__(self, routes: Routes | None, weights_id: bytes | None, fixed: str | None = None) -> None:
        self._routes = routes
        self._weights_id = weights_id
        self._fixed = self._address = fixed

    @property
    def address(self) -> str | None:
        """The replica that is asked now; None for the sticky server."""
        if self._address is None and self._routes is not None:
            by_id, routes = self._weights_id, self._routes
            self._address = routes.next_in_turn() if by_id is None else routes.pick(by_id)
        return self._address

    def failed(self, error: Exception) -> None:
        """Notes an error of the replica: after one that another replica may not have, that one is asked."""
        if self._address is not None and self._routes is not None and isinstance(error, RETRYABLE):
            self._routes.failed(self._address, error)
            self._address = self._fixed

    def along(self, steps: Steps) -> Steps:
        """The same steps, each sent to the replica of this route."""
        result: object = None
        error: errors.ForwardPassError | None = None
        while True:
            try:
                step = steps.send(result) if error is None else steps.throw(error)
            except StopIteration as stop:
                return stop.value
            result = error = None
            address = self.address
            if address is not None and not isinstance(step, (Pause, Resolve)):
                step = dataclasses.replace(step, address=address)
            try:
                result = yield step
            except errors.ForwardPassError as failure:
                self.failed(failure)
                error = failure


STICKY: Final = Route(None, None)
"""The route of calls that go to the sticky server."""


def ask_others(
    call: Call[object],
    held: HeldWeights,
    address: str,
    error: errors.ForwardPassError,
    deadline: Deadline,
    routes: Routes,
) -> Steps:
    """The steps of a call by weights id after the replica at `address` failed with `error`: the result in the end.

    The next replica in rank is asked at once. After each has failed, there is a pause, for half a minute in all.
    Weights that several replicas lack are put again, once between two pauses.
    Raises the last error, an error of a version that is missing after some seconds, and DeadlineExceeded, which names
    the last error.
    """
    backoff, lacking_rounds = Backoff(deadline), LACKING_ROUNDS
    asked, lacking = {address}, 0
    overloads, has_put = 0, False
    while True:
        deadline.last_error = error
        routes.failed(address, error)
        following = routes.pick(held.weights_id, asked)
        if isinstance(error, errors.WeightsNotFound):
            lacking += 1
            if following is None or lacking >= _LOOKS:
                if has_put:
                    raise error
                route = Route(routes, held.weights_id)
                yield from route.along(held.put(deadline))
                has_put, lacking, asked, following = True, 0, set(), route.address
        elif isinstance(error, errors.ServerOverloaded) and not retries.is_retryable(error, call.request):
            overloads += 1
            if overloads >= _OVERLOADS or following is None:
                raise error
        elif not is_for_another(error, call.request):
            raise error
        if following is None:
            lacking_rounds -= isinstance(error, LACKING)
            if not lacking_rounds:
                raise error
            yield Pause(backoff.pause_s(error))
            asked, lacking, has_put = set(), 0, False
            following = routes.pick(held.weights_id)
        if following is None:
            # Routing was turned off meanwhile.
            raise error
        address = following
        asked.add(address)
        try:
            return call.read((yield Unary(call.path, call.request, address=address)))
        except errors.ForwardPassError as failure:
            error = failure
