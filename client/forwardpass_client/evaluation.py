"""Batches on their way to sessions, apart from the stream: what is to be sent, and what has not counted yet."""

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
from forwardpass_client.session_calls import SessionCalls
from forwardpass_client.sessions import ID_BYTES, MetricsSessionApi
from forwardpass_client.streams import Completed, Future
from forwardpass_client.transfers import Steps
from forwardpass_client.weights import HeldWeights, WeightsHandleApi

PATH = METHODS["Evaluate"].path
TITLE = "evaluation"

MAX_BATCHES = 32
"""On their way at once: as many as the server takes of one stream."""

_MAX_BYTES = 64 * 2**20

BatchProgress = Callable[[int], None]
"""Is told how many batches have counted, possibly from another thread."""


@dataclasses.dataclass(eq=False, slots=True)
class _Uncounted:
    request: bytes
    future: Future


class BatchesInFlight:
    """The batches of one evaluation: see `streams.InFlight`. The future of one is done when it has counted.

    pairs: sessions, and the weights whose batches each counts.
    """

    def __init__(
        self,
        calls: SessionCalls,
        pairs: Sequence[tuple[MetricsSessionApi, WeightsHandleApi]],
        training: bool,
        progress: BatchProgress | None,
    ) -> None:
        self._calls = calls
        self._pairs = pairs
        self._progress = progress
        targets = [
            v1.EvaluationTarget(session_id=bytes.fromhex(session.id), weights_id=handle.held.weights_id)
            for session, handle in pairs
        ]
        start = v1.EvaluationStart(writer_id=secrets.token_bytes(ID_BYTES), training=bool(training), targets=targets)
        self._start = v1.EvaluateRequest(start=start).SerializeToString()
        self._has_started = False
        # The server takes batches in the order of their numbers alone.
        self._outbox = Outbox(answers=False, in_order=True)
        # In the order of their numbers.
        self._uncounted: collections.OrderedDict[int, _Uncounted] = collections.OrderedDict()
        self._completed: list[Completed] = []
        self._last = 0
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._uncounted)

    def has_room(self, request: bytes) -> bool:
        """Whether another batch may be on its way: one alone always may."""
        return not self._uncounted or (
            len(self._uncounted) < MAX_BATCHES and self._size_bytes + len(request) <= _MAX_BYTES
        )

    def add(self, request: bytes, future: Future, deadline: float | None) -> None:
        """Takes an encoded EvaluationBatch. deadline: has no meaning; a batch counts, or the evaluation fails."""
        self._last += 1
        self._uncounted[self._last] = _Uncounted(request, future)
        self._size_bytes += len(request)
        self._send(self._last, request)

    def _send(self, number: int, request: bytes) -> None:
        self._outbox.put(number, frames.encode_call("", None, len(request)), request)

    def has_message(self) -> bool:
        return not self._has_started or bool(self._outbox)

    def next_message(self) -> bytes:
        if self._has_started:
            return self._outbox.next_message()
        self._has_started = True
        return self._start

    def take(self, message: bytes) -> None:
        """Takes a response of the stream: all batches up to a number have counted."""
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
        if self._progress is not None:
            self._progress(self._last - len(self._uncounted))

    def completed(self) -> list[Completed]:
        completed, self._completed = self._completed, []
        return completed

    def next_event(self) -> None:
        """None: batches have no deadlines."""

    def advance(self) -> None:
        """Nothing is ever due."""

    def resend(self) -> None:
        """For another stream: those that have counted there are passed over by the server."""
        self._has_started = False
        self._outbox.clear()
        for number, uncounted in self._uncounted.items():
            self._send(number, uncounted.request)

    def broke(self, error: Exception) -> None:
        """Batches have no deadlines that could be exceeded for this reason."""

    def recovery(self, error: Exception) -> Steps | None:
        """Puts weights that the server has dropped, where this side has them."""
        return self._put_all() if isinstance(error, errors.WeightsNotFound) else None

    def _put_all(self) -> Steps:
        held: Mapping[bytes, HeldWeights] = {handle.held.weights_id: handle.held for _, handle in self._pairs}
        for one in held.values():
            yield from one.put()

    def fail_all(self, error: Exception) -> None:
        self._outbox.clear()
        for uncounted in self._uncounted.values():
            self._completed.append(Completed(uncounted.future, None, error))
        self._uncounted.clear()


def encode(calls: SessionCalls, batch: Any) -> bytes:
    """A batch as an EvaluationBatch. batch: (x, y), (x, y, sample_weight), or a mapping with these keys."""
    sample_weight = None
    if isinstance(batch, Mapping) and "sample_weight" in batch:
        sample_weight = batch["sample_weight"]
        batch = {name: value for name, value in batch.items() if name != "sample_weight"}
    elif isinstance(batch, (tuple, list)) and len(batch) == 3:
        *batch, sample_weight = batch
    return calls.evaluation_batch(batch, sample_weight, secrets.token_bytes(ID_BYTES))
