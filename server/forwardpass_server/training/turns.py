"""The order of optimizer steps: calls come first, and principals and streams share what is left."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.calls.model import Leaf
from forwardpass_server.calls.scheduling import Estimates, Scheduler

ResultT = TypeVar("ResultT")

# A step waits while calls wait for a thread. Where calls wait without a pause, one step runs each 0.1 s, so that a
# training does not stop altogether.
_LONGEST_WAIT_S = 0.1

# A call takes some turns of the event loop from its announcement to its computation. A client may announce a call and
# never send it, so steps wait for this number of turns at most.
_TURNS_FOR_ARRIVALS = 16

# A stream asks for its next step a few turns of the event loop after its last step has ended. The next principal is
# chosen only then. Otherwise a principal with one stream would never wait when the choice is made.
_TURNS_TO_RETURN = 3


@dataclasses.dataclass(eq=False, slots=True)
class _Principal:
    """The waiting steps of one principal, and the seconds that its steps have taken."""

    used_s: float = 0.0
    waiting: collections.deque[asyncio.Future[None]] = dataclasses.field(default_factory=collections.deque)
    running: int = 0


class Turns:
    """Runs optimizer steps through a scheduler. Used on one event loop only.

    - A step waits while a call waits for a thread, and while an announced call arrives.
    - Steps leave one thread of the pool to calls.
    - At most one step begins in each turn of the event loop: a step of 300 us may run on it.
    - The next step is one of the principal whose steps have taken the least time; of several streams of a principal,
      the one that has waited longest.

    longest_wait_s: after this time a step runs although calls wait.
    """

    def __init__(self, scheduler: Scheduler, arrivals: Arrivals, longest_wait_s: float = _LONGEST_WAIT_S) -> None:
        self._scheduler = scheduler
        self._arrivals = arrivals
        self._longest_wait_s = longest_wait_s
        self._most = max(scheduler.threads - 1, 1)
        self._running = 0
        self._principals: dict[str, _Principal] = {}
        # The time of the principal that ran last: a new principal starts with it.
        self._least_s = 0.0
        # Whether `_next` is about to run: in the next turn of the event loop.
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None
        # Since when steps wait for calls, by time.monotonic; None while they do not.
        self._waiting_since: float | None = None
        self._turns_for_arrivals = 0
        scheduler.on_end = self._wake

    async def run(
        self,
        principal: str,
        compute: Callable[[Sequence[Leaf]], ResultT],
        leaves: Sequence[Leaf],
        estimates: Estimates,
        size_bytes: int,
    ) -> ResultT:
        """The result of compute(leaves), one step of a stream of this principal, when its turn has come.

        estimates, size_bytes: see `Scheduler.run`. A cancellation does not stop a running computation.
        """
        own = self._principals.setdefault(principal, _Principal())
        # A principal that returns gets no credit for the time in which it had nothing to run.
        own.used_s = max(own.used_s, self._least_s)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        own.waiting.append(turn)
        self._wake()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._end(own, 0.0)
            raise
        began = time.perf_counter()
        if estimates.is_short(size_bytes.bit_length()):
            # Inline: it cannot be cancelled.
            try:
                return await self._scheduler.run(compute, leaves, estimates, size_bytes)
            finally:
                self._end(own, time.perf_counter() - began)
        running = asyncio.ensure_future(self._scheduler.run(compute, leaves, estimates, size_bytes))
        running.add_done_callback(lambda done: self._ended(done, own, began))
        return await asyncio.shield(running)

    def _ended(self, done: asyncio.Future[ResultT], own: _Principal, began: float) -> None:
        if not done.cancelled():
            # Marks the error as read. Otherwise asyncio logs it after a cancellation.
            done.exception()
        self._end(own, time.perf_counter() - began)

    def _end(self, own: _Principal, seconds: float) -> None:
        own.used_s += seconds
        own.running -= 1
        self._running -= 1
        self._wake()

    def _wake(self) -> None:
        """Lets the next step begin in the next turn of the event loop, if it may."""
        if not self._is_due and self._principals and self._running < self._most:
            self._is_due = True
            # A single principal has no others to wait for.
            self._later(_TURNS_TO_RETURN if len(self._principals) > 1 else 0)

    def _later(self, turns: int) -> None:
        loop = asyncio.get_running_loop()
        if turns:
            loop.call_soon(self._later, turns - 1)
        else:
            loop.call_soon(self._next)

    def _next(self) -> None:
        self._is_due = False
        own = self._least_served()
        if own is None or self._running >= self._most or self._calls_come_first():
            return
        self._least_s = own.used_s
        own.running += 1
        self._running += 1
        own.waiting.popleft().set_result(None)
        self._wake()

    def _least_served(self) -> _Principal | None:
        """The waiting principal whose steps have taken the least time. Forgets those whose time does not matter."""
        for name, one in list(self._principals.items()):
            while one.waiting and one.waiting[0].done():
                # Cancelled.
                one.waiting.popleft()
            if not one.waiting and not one.running and one.used_s <= self._least_s:
                del self._principals[name]
        waiting = (one for one in self._principals.values() if one.waiting)
        return min(waiting, key=lambda one: one.used_s, default=None)

    def _calls_come_first(self) -> bool:
        """Whether no step may begin now. It is then tried again, later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._arrivals.count and self._turns_for_arrivals < _TURNS_FOR_ARRIVALS:
            self._turns_for_arrivals += 1
            self._wake()
            return True
        self._turns_for_arrivals = 0
        if not self._scheduler.has_waiting:
            self._waiting_since = None
            return False
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        remaining_s = self._waiting_since + self._longest_wait_s - now
        if remaining_s <= 0:
            self._waiting_since = now
            return False
        # The end of a computation on a thread wakes it earlier.
        self._timer = asyncio.get_running_loop().call_later(remaining_s, self._wake)
        return True
