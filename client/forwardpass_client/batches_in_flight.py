"""The batches of an evaluation, without I/O: which to send, and which have not counted yet."""

from __future__ import annotations

import collections
import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forwardpass import v1
from forwardpass.wire import errors, fields, frames
from forwardpass.wire.frames import Outbox
from forwardpass.wire.methods import METHODS
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.metrics_sessions import ID_BYTES, MetricsSessionApi
from forwardpass_client.session_calls import SessionCalls
from forwardpass_client.streams import Completed, Future
from forwardpass_client.training_batches import split
from forwardpass_client.transfers import Steps
from forwardpass_client.weights_handles import WeightsHandleApi

PATH = METHODS["Evaluate"].path
TITLE = "evaluation"

MAX_BATCHES = 32
"""The most batches in flight: as many as the server accepts from one stream."""

_MAX_BYTES = 64 * 2**20

BatchProgress = Callable[[int], None]
"""Is called with the number of batches that have counted, possibly from another thread."""


@dataclasses.dataclass(eq=False, slots=True)
class _Uncounted:
    request: bytes
    future: Future


class BatchesInFlight:
    """The batches of one evaluation: see `streams.InFlight`. The future of a batch is done when the batch has counted.

    pairs: sessions, each with the weights whose metrics it counts.
    deadline: of the evaluation. A renewable one is renewed when a batch has counted, and while no batch is in flight.
    """

    def __init__(
        self,
        calls: SessionCalls,
        pairs: Sequence[tuple[MetricsSessionApi, WeightsHandleApi]],
        training: bool,
        allow_rounding: bool,
        progress: BatchProgress | None,
        deadline: Deadline,
    ) -> None:
        self._calls = calls
        self._pairs = pairs
        self._deadline = deadline
        self._progress = progress
        targets = [
            v1.EvaluationTarget(session_id=bytes.fromhex(session.id), weights_id=handle.held.weights_id)
            for session, handle in pairs
        ]
        start = v1.EvaluationStart(
            writer_id=secrets.token_bytes(ID_BYTES), training=training, targets=targets, allow_rounding=allow_rounding
        )
        self._start = v1.EvaluateRequest(start=start).SerializeToString()
        self._has_started = False
        # Whether weights were put again since the last batch counted: a server that drops them each time makes no
        # progress, so only the first put renews the deadline.
        self._has_put = False
        # The server takes batches only in the order of their numbers.
        self._outbox = Outbox(answers=False, in_order=True)
        # By number, in ascending order.
        self._uncounted: collections.OrderedDict[int, _Uncounted] = collections.OrderedDict()
        self._completed: list[Completed] = []
        self._last = 0
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._uncounted)

    def has_room(self, request: bytes) -> bool:
        """Whether another batch may be in flight: a single batch always may, whatever its size."""
        return not self._uncounted or (
            len(self._uncounted) < MAX_BATCHES and self._size_bytes + len(request) <= _MAX_BYTES
        )

    def add(self, request: bytes, future: Future, deadline: Deadline) -> None:
        """Takes an encoded EvaluationBatch. deadline: that of the evaluation."""
        if not self._uncounted:
            self._deadline.renew()
        self._last += 1
        self._uncounted[self._last] = _Uncounted(request, future)
        self._size_bytes += len(request)
        self._send(self._last, request)

    def _send(self, number: int, request: bytes) -> None:
        self._outbox.put(number, frames.encode_call("", None, len(request)), request)

    def has_message(self) -> bool:
        """Whether the start of the evaluation, or a part of a batch, is still to be sent."""
        return not self._has_started or bool(self._outbox)

    def next_message(self) -> bytes:
        """The next EvaluateRequest. The first one of each stream names the sessions and their weights."""
        if self._has_started:
            return self._outbox.next_message()
        self._has_started = True
        return self._start

    def take(self, message: bytes) -> None:
        """Takes a response of the stream, which says up to which number all batches have counted."""
        response = fields.parse(v1.EvaluateResponse, message)
        if response.HasField("position"):
            self._calls.check_position(response.position)
            self._count(response.position.sequence)
        for frame in response.frames:
            self._count(frame.call)

    def _count(self, number: int) -> None:
        while self._uncounted and next(iter(self._uncounted)) <= number:
            _, counted = self._uncounted.popitem(last=False)
            self._size_bytes -= len(counted.request)
            self._completed.append(Completed(counted.future, None, None))
            for session, _ in self._pairs:
                session.note_counted()
            self._deadline.renew()
            self._has_put = False
        if self._progress is not None:
            self._progress(self._last - len(self._uncounted))

    def completed(self) -> list[Completed]:
        """The futures of the batches that have counted or failed since the last time. Their results are None."""
        completed, self._completed = self._completed, []
        return completed

    def next_event(self) -> float | None:
        """The deadline, while a batch is in flight."""
        return self._deadline.at if self._uncounted else None

    def advance(self) -> None:
        """Raises DeadlineExceeded once the deadline has passed while a batch is in flight."""
        if self._uncounted:
            self._deadline.remaining_s()

    def resend(self) -> None:
        """Puts every uncounted batch in the outbox again, for another stream: the server skips those that counted."""
        self._has_started = False
        self._outbox.clear()
        for number, uncounted in self._uncounted.items():
            self._send(number, uncounted.request)

    def broke(self, error: Exception) -> None:
        """Notes the error that ended the stream: DeadlineExceeded names it."""
        self._deadline.last_error = error

    def recovery(self, error: Exception) -> Steps | None:
        """The steps that put weights again which the server has dropped; None for another error."""
        return self._put_all() if isinstance(error, errors.WeightsNotFound) else None

    def _put_all(self) -> Steps:
        held: Mapping[bytes, HeldWeights] = {handle.held.weights_id: handle.held for _, handle in self._pairs}
        for one in held.values():
            yield from one.put(self._deadline.fixed() if self._has_put else self._deadline)
        self._has_put = True

    def fail_all(self, error: Exception) -> None:
        """Fails every batch that has not counted."""
        self._outbox.clear()
        for uncounted in self._uncounted.values():
            self._completed.append(Completed(uncounted.future, None, error))
        self._uncounted.clear()


def encode(calls: SessionCalls, batch: Any) -> bytes:
    """A batch as an EvaluationBatch. batch: (x, y), (x, y, sample_weight), or a mapping with these keys."""
    batch_input, sample_weight = split(batch)
    return calls.evaluation_batch(batch_input, sample_weight, secrets.token_bytes(ID_BYTES))
