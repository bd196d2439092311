"""The calls of a pipeline, without I/O: which frames to send, which calls are unanswered, what an answer means."""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections.abc import Callable
from typing import Any

from forwardpass.wire import errors, frames
from forwardpass.wire.frames import Inbox, Outbox
from forwardpass_client.backoff import RETRYABLE, Backoff
from forwardpass_client.call import Call
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.streams import Completed, Future

MAX_CALLS = 256
"""The most calls in flight."""

MAX_BYTES = 64 * 2**20
"""The most bytes of requests in flight; a single call may have more."""


@dataclasses.dataclass(eq=False, slots=True)
class _Unanswered:
    call: Call[Any]
    future: Future
    deadline: Deadline
    # Whether its weights were put again: once is enough.
    has_put: bool = False
    # Of its further attempts; None before the first attempt fails.
    backoff: Backoff | None = None


class CallsInFlight:
    """The calls of one pipeline: see `streams.InFlight`.

    put_weights: begins to put weights that the server lacks, and calls `weights_put` at the end.
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
        """Whether another call may be in flight: a single call always may, whatever its size."""
        return not self._unanswered or (
            len(self._unanswered) < MAX_CALLS and self.size_bytes + len(call.request) <= MAX_BYTES
        )

    def add(self, call: Call[Any], future: Future, deadline: Deadline) -> None:
        """Puts a call in the outbox."""
        self._last += 1
        number = self._last
        if deadline.at is not None:
            heapq.heappush(self._deadlines, (deadline.at, number))
        self._unanswered[number] = _Unanswered(call, future, deadline)
        self.size_bytes += len(call.request)
        self._send(number)

    def release(self, is_for_another: Callable[[Call[Any]], bool]) -> list[tuple[Call[Any], Future, Deadline]]:
        """Gives up the unanswered calls that another stream is to send: each with its future and its deadline."""
        released = []
        for number, one in list(self._unanswered.items()):
            if is_for_another(one.call):
                del self._unanswered[number]
                self.size_bytes -= len(one.call.request)
                released.append((one.call, one.future, one.deadline))
        return released

    def has_message(self) -> bool:
        """Whether a call, or a part of one, is still to be sent."""
        return bool(self._outbox)

    def next_message(self) -> bytes:
        """The next PipelineRequest: parts of several calls in turn. There must be one."""
        return self._outbox.next_message()

    def _send(self, number: int) -> None:
        one = self._unanswered[number]
        timeout_s = None if one.deadline.at is None else max(one.deadline.at - time.monotonic(), 1e-3)
        method = one.call.path.rpartition("/")[2]
        request = one.call.request
        self._outbox.put(number, frames.encode_call(method, timeout_s, len(request)), request)

    def take(self, message: bytes) -> None:
        """Takes a response of the stream: completes the futures of the calls that it answers."""
        for frame in frames.decode_answers(message):
            if frame.call not in self._unanswered:
                # The call has expired or was cancelled here.
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
        if isinstance(error, RETRYABLE):
            if one.backoff is None:
                one.backoff = Backoff(one.deadline)
            try:
                pause_s = one.backoff.pause_s(error)
            except errors.ForwardPassError as last:
                self._complete(number, error=last)
            else:
                heapq.heappush(self._resends, (time.monotonic() + pause_s, number))
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
        """Sends the calls again that wait for weights; with an error of the put, fails them."""
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
        """The futures of the calls that have ended since the last time, each with its result or error."""
        completed, self._completed = self._completed, []
        return completed

    def next_event(self) -> float | None:
        """When `advance` is to be called next, by time.monotonic; None for never."""
        times = [queue[0][0] for queue in (self._deadlines, self._resends) if self._next(queue)]
        return min(times, default=None)

    def _next(self, queue: list[tuple[float, int]]) -> tuple[float, int] | None:
        while queue and queue[0][1] not in self._unanswered:
            heapq.heappop(queue)
        return queue[0] if queue else None

    def advance(self) -> None:
        """Fails the calls whose deadline has passed, and sends the calls again whose pause is over."""
        now = time.monotonic()
        while (due := self._next(self._deadlines)) is not None and due[0] <= now:
            self._complete(due[1], error=self._unanswered[due[1]].deadline.exceeded())
        while (due := self._next(self._resends)) is not None and due[0] <= now:
            heapq.heappop(self._resends)
            self._send(due[1])

    def resend(self) -> None:
        """Puts every unanswered call in the outbox again, for another stream. A call is pure, so it may run twice."""
        self._outbox.clear()
        self._inbox.clear()
        self._resends.clear()
        waiting = {number for numbers in self._waiting.values() for number in numbers}
        for number in self._unanswered:
            if number not in waiting:
                self._send(number)

    def broke(self, error: Exception) -> None:
        """Notes the error that ended the stream: a call whose deadline passes names it."""
        for one in self._unanswered.values():
            one.deadline.last_error = error

    def recovery(self, error: Exception) -> None:
        """None: an error of a call is an answer, and an error of the stream cannot be helped."""

    def fail_all(self, error: Exception) -> None:
        """Fails every unanswered call."""
        self._outbox.clear()
        self._inbox.clear()
        self._waiting.clear()
        for number in list(self._unanswered):
            self._complete(number, error=error)
