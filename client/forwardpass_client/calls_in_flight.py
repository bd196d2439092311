"""Calls on a stream, apart from the stream: what is to be sent, what is unanswered, what an answer means."""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections.abc import Callable
from typing import Any

from forwardpass.wire import errors, frames
from forwardpass.wire.frames import Inbox, Outbox
from forwardpass_client.calls import Call
from forwardpass_client.patience import deadline_exceeded
from forwardpass_client.streams import Completed, Future
from forwardpass_client.weights import HeldWeights

# As for unary calls: a server that is loading the model, or stopping, is worth another try.
_RETRYABLE = ("UNAVAILABLE", "CANCELLED")
_PAUSES_S = (0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0)


MAX_CALLS = 256
"""In flight at once."""

MAX_BYTES = 64 * 2**20
"""In flight at once, unless one call alone has more."""


@dataclasses.dataclass(eq=False, slots=True)
class _Unanswered:
    call: Call[Any]
    future: Future
    deadline: float | None
    # Weights were sent again for it: once is enough.
    has_put: bool = False
    # How often it was sent again because a server was not there for it, and why the last time.
    retries: int = 0
    reason: Exception | None = None


class CallsInFlight:
    """The calls of one pipeline: see `streams.InFlight`.

    put_weights: begins to send weights that the server lacks; `weights_put` is to be told what came of it.
    """

    def __init__(self, max_message_bytes: int, put_weights: Callable[[HeldWeights], None]) -> None:
        self._outbox = Outbox(answers=False)
        self._inbox = Inbox(max_message_bytes, 2**62)
        self._put_weights = put_weights
        self._unanswered: dict[int, _Unanswered] = {}
        self._waiting: dict[bytes, list[int]] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._resends: list[tuple[float, int]] = []
        self._completed: list[Completed] = []
        self._last = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._unanswered)

    def has_room(self, call: Call[Any]) -> bool:
        """Whether another call may be in flight: one alone always may."""
        return not self._unanswered or (
            len(self._unanswered) < MAX_CALLS and self.size_bytes + len(call.request) <= MAX_BYTES
        )

    def add(self, call: Call[Any], future: Future, deadline: float | None) -> None:
        """Puts a call in the outbox. deadline: by time.monotonic."""
        self._last += 1
        number = self._last
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, number))
        self._unanswered[number] = _Unanswered(call, future, deadline)
        self.size_bytes += len(call.request)
        self._send(number)

    def has_message(self) -> bool:
        return bool(self._outbox)

    def next_message(self) -> bytes:
        return self._outbox.next_message()

    def _send(self, number: int) -> None:
        one = self._unanswered[number]
        timeout_s = None if one.deadline is None else max(one.deadline - time.monotonic(), 1e-3)
        method = one.call.path.rpartition("/")[2]
        request = one.call.request
        self._outbox.put(number, frames.encode_call(method, timeout_s, len(request)), request)

    def take(self, message: bytes) -> None:
        """Takes a response of the stream: completes the futures of the calls that it answers."""
        for frame in frames.decode_answers(message):
            if frame.call not in self._unanswered:
                # Given up, or expired here first.
                self._inbox.drop(frame.call)
                continue
            try:
                frames.check(frame)
            except errors.ForwardPassError as error:
                self._fail(frame.call, error)
                continue
            try:
                whole = self._inbox.take(frame)
                if whole is not None:
                    _, data = whole
                    self._succeed(frame.call, data)
            except errors.ForwardPassError as error:
                self._complete(frame.call, error=error)

    def _succeed(self, number: int, data: Any) -> None:
        try:
            result = self._unanswered[number].call.read(data)
        except Exception as error:
            self._complete(number, error=error)
        else:
            self._complete(number, result=result)

    def _fail(self, number: int, error: errors.ForwardPassError) -> None:
        one = self._unanswered[number]
        held = one.call.held
        if error.status in _RETRYABLE and one.retries < len(_PAUSES_S):
            heapq.heappush(self._resends, (time.monotonic() + _PAUSES_S[one.retries], number))
            one.retries += 1
            one.reason = error
            return
        if not isinstance(error, errors.WeightsNotFound) or held is None or one.has_put:
            self._complete(number, error=error)
            return
        one.has_put = True
        waiting = self._waiting.get(held.weights_id)
        if waiting is not None:
            waiting.append(number)
            return
        self._waiting[held.weights_id] = [number]
        self._put_weights(held)

    def weights_put(self, held: HeldWeights, error: Exception | None) -> None:
        """Sends the calls again that wait for weights, or fails them."""
        for number in self._waiting.pop(held.weights_id, ()):
            if number not in self._unanswered:
                continue
            if error is None:
                self._send(number)
            else:
                self._complete(number, error=error)

    def _complete(self, number: int, *, result: Any = None, error: BaseException | None = None) -> None:
        one = self._unanswered.pop(number)
        self.size_bytes -= len(one.call.request)
        self._completed.append(Completed(one.future, result, error))

    def completed(self) -> list[Completed]:
        completed, self._completed = self._completed, []
        return completed

    def next_event(self) -> float | None:
        """When `advance` has something to do next, by time.monotonic; None where it never will."""
        times = [queue[0][0] for queue in (self._deadlines, self._resends) if self._next(queue)]
        return min(times, default=None)

    def _next(self, queue: list[tuple[float, int]]) -> tuple[float, int] | None:
        while queue and queue[0][1] not in self._unanswered:
            heapq.heappop(queue)
        return queue[0] if queue else None

    def advance(self) -> None:
        """Fails the calls whose time is over, and sends those again whose pause is."""
        now = time.monotonic()
        while (due := self._next(self._deadlines)) is not None and due[0] <= now:
            self._complete(due[1], error=deadline_exceeded(self._unanswered[due[1]].reason))
        while (due := self._next(self._resends)) is not None and due[0] <= now:
            heapq.heappop(self._resends)
            self._send(due[1])

    def resend(self) -> None:
        """Puts every unanswered call in the outbox again, for another stream: they are pure."""
        self._outbox.clear()
        self._inbox.clear()
        self._resends.clear()
        waiting = {number for numbers in self._waiting.values() for number in numbers}
        for number in self._unanswered:
            if number not in waiting:
                self._send(number)

    def broke(self, error: Exception) -> None:
        """The stream has ended with an error, for which deadlines may pass."""
        for one in self._unanswered.values():
            one.reason = error

    def recovery(self, error: Exception) -> None:
        """None: what is wrong with a call is answered, what is wrong with the stream comes again."""

    def fail_all(self, error: Exception) -> None:
        """Gives up every unanswered call."""
        self._outbox.clear()
        self._inbox.clear()
        self._waiting.clear()
        for number in list(self._unanswered):
            self._complete(number, error=error)
