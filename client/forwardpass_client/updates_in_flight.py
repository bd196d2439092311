"""The client updates of one training stream, without I/O: what to send, and where an update continues after a break."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from forwardpass import v1
from forwardpass.wire import errors, frames
from forwardpass.wire.frames import Outbox
from forwardpass.wire.methods import METHODS
from forwardpass_client.backoff import RETRYABLE
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.streams import Completed, Future
from forwardpass_client.training_calls import TrainingCalls, UpdateOptions
from forwardpass_client.transfers import Steps

PATH = METHODS["Train"].path
TITLE = "training"

MAX_BATCHES = 32
"""The most batches in flight: as many as the server accepts from one stream."""

_MAX_BYTES = 64 * 2**20


class Rewound(Exception):
    """The batches of an update must be read again, from `UpdatesInFlight.place` on."""


class Place(NamedTuple):
    """Where to read the batches of an update. attempt: the number of the reading. position: the batches to skip."""

    attempt: int
    position: int


@dataclasses.dataclass(frozen=True, slots=True)
class Begin:
    """The beginning of an update. It is sent after the one before has ended.

    weights: those at the start. weighted: whether the batches have sample weights. can_rewind: whether they can be read
    again. progress: called with the number of batches that were trained on.
    """

    options: UpdateOptions
    weights: HeldWeights
    weighted: bool
    can_rewind: bool
    progress: Callable[[int], None] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A batch. attempt: of its reading. request: an encoded TrainingBatch."""

    attempt: int
    request: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Finish:
    """The end of an update. Its future gets the answer."""

    attempt: int


class Answer(NamedTuple):
    """The result of an update, and its metrics."""

    result: v1.TrainingResult
    metrics: Any


@dataclasses.dataclass(eq=False, slots=True)
class _Untrained:
    request: bytes
    future: Future


class UpdatesInFlight:
    """The updates of one stream, one after another: see `streams.InFlight`.

    The future of a batch is done when it was trained on, or fails with `Rewound`.
    deadline: of the stream. A renewable one is renewed by progress.
    """

    def __init__(self, calls: TrainingCalls, deadline: Deadline) -> None:
        self._calls = calls
        self._deadline = deadline
        self._update: Begin | None = None
        self._checkpoint: v1.TrainingCheckpoint | None = None
        self._has_put = False
        self._must_start = False
        self._finish: Future | None = None
        self._must_finish = False
        # The server takes batches only in the order of their numbers.
        self._outbox = Outbox(answers=False, in_order=True)
        # By number, in ascending order.
        self._untrained: collections.OrderedDict[int, _Untrained] = collections.OrderedDict()
        self._completed: list[Completed] = []
        self._last = 0
        self._size_bytes = 0
        self.place = Place(0, 0)

    def __len__(self) -> int:
        return self._update is not None

    def has_room(self, item: Begin | Batch | Finish) -> bool:
        """Whether another item may be in flight: a single batch always may, whatever its size."""
        return (
            not isinstance(item, Batch)
            or not self._untrained
            or (len(self._untrained) < MAX_BATCHES and self._size_bytes + len(item.request) <= _MAX_BYTES)
        )

    def add(self, item: Begin | Batch | Finish, future: Future, deadline: Deadline) -> None:
        """Takes an item. deadline: that of the stream."""
        if not self._is_waiting():
            self._deadline.renew()
        if isinstance(item, Begin):
            self._update, self._checkpoint, self._has_put = item, None, False
            self._must_start, self._last = True, 0
            self.place = Place(self.place.attempt + 1, 0)
            self._completed.append(Completed(future, None, None))
        elif item.attempt != self.place.attempt:
            self._completed.append(Completed(future, None, Rewound()))
        elif isinstance(item, Batch):
            self._last += 1
            self._untrained[self._last] = _Untrained(item.request, future)
            self._size_bytes += len(item.request)
            self._send(self._last, item.request)
        else:
            self._finish, self._must_finish = future, True

    def _is_waiting(self) -> bool:
        """Whether the server has something to do."""
        return bool(self._must_start or self._untrained or self._finish)

    def _send(self, number: int, request: bytes) -> None:
        self._outbox.put(number, frames.encode_call("", None, len(request)), request)

    def has_message(self) -> bool:
        """Whether a part of the update is still to be sent."""
        return self._must_start or bool(self._outbox) or self._must_finish

    def next_message(self) -> bytes:
        """The next TrainRequest; there must be one."""
        if self._must_start:
            self._must_start = False
            return v1.TrainRequest(start=self._start()).SerializeToString()
        if self._outbox:
            return self._outbox.next_message()
        self._must_finish = False
        return v1.TrainRequest(finish=True).SerializeToString()

    def _start(self) -> v1.TrainingStart:
        update, checkpoint = self._update, self._checkpoint
        assert update is not None
        start = self._calls.training_start(update.options, update.weights.weights_id, update.weighted)
        if checkpoint is not None:
            start.start_weights_id = start.weights_id
            start.weights_id = checkpoint.weights_id
            start.optimizer_state_id = checkpoint.optimizer_state_id
            start.checkpoint_sequence = checkpoint.sequence
        return start

    def take(self, message: bytes) -> None:
        """Takes a response of the stream."""
        response, metrics = self._calls.read_training(message)
        if response.HasField("position"):
            self._deadline.renew()
        if response.HasField("checkpoint"):
            self._checkpoint = response.checkpoint
        for frame in response.frames:
            self._count(frame.call)
        if response.HasField("result") and self._finish is not None:
            self._completed.append(Completed(self._finish, Answer(response.result, metrics), None))
            self._update = self._finish = None

    def _complete_until(self, number: int) -> None:
        while self._untrained and next(iter(self._untrained)) <= number:
            _, trained = self._untrained.popitem(last=False)
            self._size_bytes -= len(trained.request)
            self._completed.append(Completed(trained.future, None, None))

    def _count(self, number: int) -> None:
        self._complete_until(number)
        self._deadline.renew()
        self._has_put = False
        if self._update is not None and self._update.progress is not None:
            self._update.progress(number)

    def completed(self) -> list[Completed]:
        """The futures that are done since the last time."""
        completed, self._completed = self._completed, []
        return completed

    def next_event(self) -> float | None:
        """The deadline, while the server has something to do."""
        return self._deadline.at if self._is_waiting() else None

    def advance(self) -> None:
        """Raises DeadlineExceeded once the deadline has passed while the server has something to do."""
        if self._is_waiting():
            self._deadline.remaining_s()

    def resend(self) -> None:
        """Begins the update again, at the last checkpoint or at its start, because another stream replaces one."""
        self._outbox.clear()
        if self._update is None:
            return
        self._must_start = True
        position = self._position
        # A checkpoint tells that its batches were trained on.
        self._complete_until(position)
        if self._must_rewind:
            self._fail_unfinished(Rewound())
            self.place = Place(self.place.attempt + 1, position)
            self._last = position
            return
        for number, untrained in self._untrained.items():
            self._send(number, untrained.request)
        self._must_finish = self._finish is not None

    @property
    def _position(self) -> int:
        """Where the update continues."""
        return 0 if self._checkpoint is None else self._checkpoint.sequence

    @property
    def _must_rewind(self) -> bool:
        """Whether batches after the position were dropped from memory."""
        return next(iter(self._untrained), self._last + 1) > self._position + 1

    def broke(self, error: Exception) -> None:
        """Notes the error that ended the stream. Raises ServerUnavailable where the update cannot continue."""
        self._deadline.last_error = error
        if isinstance(error, RETRYABLE):
            self._check_rewind(error)

    def _check_rewind(self, error: Exception) -> None:
        if self._update is not None and self._must_rewind and not self._update.can_rewind:
            raise errors.ServerUnavailable(
                f"the training was interrupted ({type(error).__name__}: {error}) and cannot continue, because its "
                "batches are an iterator, which can be read once: pass a sequence, a dataset, or a function that "
                "returns an iterator"
            ) from error

    def recovery(self, error: Exception) -> Steps | None:
        """The steps after which the update may continue; None for an error that is final.

        Raises ServerUnavailable where its batches cannot be read again.
        """
        if self._update is None:
            return None
        if isinstance(error, errors.ServerOverloaded):
            self._check_rewind(error)
            return _none()
        if not isinstance(error, errors.WeightsNotFound):
            return None
        if self._checkpoint is not None:
            # The server has lost the checkpoint: begin at the start.
            self._checkpoint = None
            self._check_rewind(error)
            return _none()
        if self._has_put:
            return None
        self._has_put = True
        self._check_rewind(error)
        return self._update.weights.put(self._deadline)

    def _fail_unfinished(self, error: Exception) -> None:
        for untrained in self._untrained.values():
            self._completed.append(Completed(untrained.future, None, error))
        self._untrained.clear()
        self._size_bytes = 0
        if self._finish is not None:
            self._completed.append(Completed(self._finish, None, error))
        self._finish, self._must_finish = None, False

    def fail_all(self, error: Exception) -> None:
        """Fails every future."""
        self._outbox.clear()
        self._fail_unfinished(error)
        self._update, self._must_start = None, False


def _none() -> Steps:
    """No steps."""
    yield from ()
