"""Evaluations over arrays that can be interrupted and resumed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from forwardpass_client.cli.slices import Slices
from forwardpass_client.metrics_sessions import MetricsSession
from forwardpass_client.model import RemoteFunctionalModel
from forwardpass_client.weights_handles import WeightsHandle


class Evaluation:
    """Counts slices of arrays in sessions, one for each weights. Each session resumes after its last counted slice.

    slices: of (x, y) or (x, y, sample_weight). Raises ValueError where a session has counted more than there are.
    """

    def __init__(
        self,
        model: RemoteFunctionalModel,
        handles: Sequence[WeightsHandle],
        sessions: Sequence[MetricsSession],
        slices: Slices,
    ) -> None:
        self._model = model
        self._handles = handles
        self._sessions = sessions
        self._slices = slices
        self._is_interrupted = False
        for session in sessions:
            if session.updates > len(slices):
                raise ValueError(
                    f"session {session.id} has counted {session.updates} batches, but the data have {len(slices)}: "
                    "resume it with the same data and --batch-size"
                )

    @property
    def counted(self) -> int:
        """How many slices have counted in every session."""
        return min(session.updates for session in self._sessions)

    @property
    def is_complete(self) -> bool:
        """Whether every slice has counted in every session."""
        return self.counted == len(self._slices)

    def run(self, progress: Callable[[int], None]) -> None:
        """Counts until the end or Ctrl-C. progress: called with `counted`, from another thread.

        After Ctrl-C, batches in flight still count. A second Ctrl-C raises KeyboardInterrupt at once.
        """
        with self._interruptible():
            while not self.is_complete and not self._is_interrupted:
                self._advance(progress)

    def _advance(self, progress: Callable[[int], None]) -> None:
        """Counts in the sessions that have counted least, until they reach the next session or the end."""
        first = self.counted
        pairs = list(zip(self._handles, self._sessions, strict=True))
        behind = [pair for pair in pairs if pair[1].updates == first]
        end = min((session.updates for _, session in pairs if session.updates > first), default=len(self._slices))
        self._model.evaluate_many(
            [handle for handle, _ in behind],
            self._until_interrupted(first, end),
            sessions=[session for _, session in behind],
            progress=lambda count: progress(first + count),
        )

    def _until_interrupted(self, first: int, end: int) -> Iterator[Any]:
        for index in range(first, end):
            if self._is_interrupted:
                return
            yield self._slices[index]

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        def interrupt(*_: object) -> None:
            self._is_interrupted = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
