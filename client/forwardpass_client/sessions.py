"""Metric sessions: a metrics state that the server holds, to which each update is applied once."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from forwardpass import v1
from forwardpass.wire import errors
from forwardpass.wire.chunks import Pieces
from forwardpass_client import session_calls
from forwardpass_client.calls import Call
from forwardpass_client.patience import AWAY, Patience, deadline_exceeded
from forwardpass_client.processes import OfOneProcess
from forwardpass_client.session_calls import SessionCalls
from forwardpass_client.transfers import Pause, Steps, Unary
from forwardpass_client.transport import AsyncTransport, Transport
from forwardpass_client.weights import with_weights

ID_BYTES = 16

_FIRST_PAUSE_S = 0.2

Content = Callable[[], Call[Any]]
"""Makes the call once more, to be compared: the same request for the same update, another for any other."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Doubt:
    """An update that was sent, and of which nobody knows whether it has counted. digest: of its content."""

    identity: v1.UpdateIdentity
    digest: bytes


class _Writer:
    """Numbers the updates that one session object makes, one after another."""

    def __init__(self, session_id: bytes) -> None:
        self._session_id = session_id
        self._writer_id = secrets.token_bytes(ID_BYTES)
        self._sequence = 1
        # Of the present number. At most one of them has counted, or will.
        self._doubts: list[_Doubt] = []
        self.updates = 0

    def update(self, call: Call[Any], content: Content, timeout_s: float | None) -> Steps:
        """The steps of one update. call: without its identity."""
        is_in_doubt = bool(self._doubts)
        try:
            answer = yield from self._sent(self._identity(content), call, content, timeout_s)
        except errors.SequenceMismatch:
            if not is_in_doubt:
                raise
            # Another one of this number had counted.
            self._settle()
            answer = yield from self._sent(self._identity(content), call, content, timeout_s)
        self._settle()
        return call.read(answer)

    def _identity(self, content: Content) -> v1.UpdateIdentity:
        """That of an update that is in doubt and made again, or else of a new one."""
        if self._doubts:
            digest = _digest(content)
            for doubt in self._doubts:
                if doubt.digest == digest:
                    return doubt.identity
        return v1.UpdateIdentity(
            session_id=self._session_id,
            writer_id=self._writer_id,
            sequence=self._sequence,
            update_id=secrets.token_bytes(ID_BYTES),
        )

    def _sent(self, identity: v1.UpdateIdentity, call: Call[Any], content: Content, timeout_s: float | None) -> Steps:
        try:
            return (yield from tried(session_calls.identified(call, identity), timeout_s))
        except errors.SequenceMismatch:
            raise
        except BaseException:
            # Whatever this says: an earlier try, of ours or of gRPC's, may have counted, and its answer been lost.
            if all(doubt.identity != identity for doubt in self._doubts):
                self._doubts.append(_Doubt(identity, _digest(content)))
            raise

    def _settle(self) -> None:
        """An update of the present number has counted."""
        self._sequence += 1
        self._doubts.clear()
        self.updates += 1


def _digest(content: Content) -> bytes:
    request = content().request
    hasher = hashlib.sha256()
    for piece in request.views() if isinstance(request, Pieces) else [request]:
        hasher.update(piece)
    return hasher.digest()


def tried(call: Call[Any], timeout_s: float | None) -> Steps:
    """The steps of one call, tried again while a server is away, for half a minute at most: its answer."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    patience = Patience(_FIRST_PAUSE_S)
    reason: Exception | None = None
    while True:
        remaining_s = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
        unary = Unary(call.path, call.request, remaining_s)
        try:
            if call.held is None:
                return (yield unary)
            return (yield from with_weights(call.held, unary))
        except errors.DeadlineExceeded:
            if reason is None:
                raise
            raise deadline_exceeded(reason) from reason
        except AWAY as error:
            reason = error
            pause_s = patience.pause_s()
            if pause_s is None or (deadline is not None and time.monotonic() + pause_s > deadline):
                raise
        yield Pause(pause_s)


class MetricsSessionApi(OfOneProcess, abc.ABC):
    """A metrics state that the server holds under an id, and to which each update is applied exactly once.

    Calls that meet a server that is gone or starts anew are tried again for half a minute. Where an update raises
    ServerUnavailable or DeadlineExceeded all the same, nobody knows whether it has counted: made again with the same
    arguments, it counts once.
    Every method may raise SessionNotFound, or SessionExpired where the session was not used for as long as the server
    keeps one; and SessionStoreUnavailable.
    timeout_s: seconds until DeadlineExceeded; None for the client's own.
    """

    def __init__(self, calls: SessionCalls, session_id: bytes, timeout_s: float | None) -> None:
        self._calls = calls
        self._session_id = session_id
        self._timeout_s = timeout_s
        self._writer = _Writer(session_id)

    @property
    def id(self) -> str:
        """32 hexadecimal digits, by which `metrics_session` finds the session again, from any process."""
        return self._session_id.hex()

    @property
    def updates(self) -> int:
        """How many updates the session had counted when it was opened here, and has since been sent from here."""
        return self._writer.updates

    def note_counted(self) -> None:
        """An evaluation has counted a batch in this session."""
        self._writer.updates += 1

    def update(
        self,
        labels: Any,
        batch_output: Any,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Counts one batch. Arguments as of the model's `update_metrics_state`."""
        return self._made(self._calls.update_session(labels, batch_output, sample_weight, mask), timeout_s)

    def forward_pass(
        self,
        model_weights: Any,
        batch_input: Any,
        training: bool = False,
        sample_weight: Any = None,
        *,
        with_predictions: bool = True,
        timeout_s: float | None = None,
    ) -> Any:
        """Runs the forward pass of one batch and counts it, in one call: its BatchOutput.

        Arguments as of the model's `forward_pass`. sample_weight: for the metrics, not for the loss.
        with_predictions: False to be sent the loss and the number of examples alone; `predictions` is None then.
        """
        make = functools.partial(
            self._calls.forward_pass_in_session, model_weights, batch_input, training, sample_weight, with_predictions
        )
        # Weights that went along the first time may be named the second.
        return self._update(make(), lambda: make(names_weights=True), timeout_s)

    def merge(self, other: Any, *, timeout_s: float | None = None) -> Any:
        """Adds a state to this session's: that of another session of the same model, which stays as it is, or a value.

        Raises FunctionNotAvailable for a model whose states are no sums: `description.unmergeable_reason` says why.
        """
        if isinstance(other, MetricsSessionApi):
            session_id, state = other._session_id, None
        else:
            session_id, state = b"", other
        return self._made(self._calls.merge_into_session(session_id, state), timeout_s)

    def result(self, *, timeout_s: float | None = None) -> Any:
        """The metrics so far, in the model's order. The session goes on."""
        return self._run(self._calls.session_result(self._session_id), timeout_s)

    def state(self, *, timeout_s: float | None = None) -> Any:
        """The metrics state so far: a value, for `update_metrics_state`, or for `metrics_session` on any server."""
        return self._run(self._calls.session_state(self._session_id), timeout_s)

    def close(self, *, timeout_s: float | None = None) -> Any:
        """Ends the session. That it is not there any more is no error."""
        return self._run(session_calls.close_session(self._session_id), timeout_s)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def _made(self, call: Call[Any], timeout_s: float | None) -> Any:
        """`_update` with a request that is the same whenever it is made."""
        return self._update(call, lambda: call, timeout_s)

    @abc.abstractmethod
    def _update(self, call: Call[Any], content: Content, timeout_s: float | None) -> Any:
        """Makes an update, after those that are being made: returns its result, or what to await for it."""

    @abc.abstractmethod
    def _run(self, call: Call[Any], timeout_s: float | None) -> Any:
        """Makes a call: returns its result, or what to await for it."""

    def _open(self, resume: bool, initial_state: Any) -> Call[int]:
        return self._calls.open_session(self._session_id, resume, initial_state)

    def _deadline(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s


class MetricsSession(MetricsSessionApi):
    """See MetricsSessionApi. Any number of threads may call at once; updates are made one after another.

    A context manager: leaving it closes the session. An error leaves it open, so that it can be resumed.
    """

    def __init__(self, calls: SessionCalls, session_id: bytes, timeout_s: float | None, transport: Transport) -> None:
        super().__init__(calls, session_id, timeout_s)
        self._transport = transport
        self._updating = threading.Lock()

    def open(self, resume: bool, initial_state: Any) -> MetricsSession:
        """For `RemoteFunctionalModel.metrics_session`."""
        self._writer.updates = self._run(self._open(resume, initial_state), None)
        return self

    def _update(self, call: Call[Any], content: Content, timeout_s: float | None) -> Any:
        with self._updating, contextlib.closing(self._writer.update(call, content, self._deadline(timeout_s))) as steps:
            # Interrupted, the update is in doubt, and must know it before the next: closing tells it.
            return self._transport.run(steps, None)

    def _run(self, call: Call[Any], timeout_s: float | None) -> Any:
        return call.read(self._transport.run(tried(call, self._deadline(timeout_s)), None))

    def __enter__(self) -> MetricsSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()


class AsyncMetricsSession(MetricsSessionApi):
    """`MetricsSession` for asyncio: the same methods, whose results are to be awaited."""

    def __init__(
        self, calls: SessionCalls, session_id: bytes, timeout_s: float | None, transport: AsyncTransport
    ) -> None:
        super().__init__(calls, session_id, timeout_s)
        self._transport = transport
        self._updating = asyncio.Lock()

    async def open(self, resume: bool, initial_state: Any) -> AsyncMetricsSession:
        """For `AsyncRemoteFunctionalModel.metrics_session`."""
        self._writer.updates = await self._run(self._open(resume, initial_state), None)
        return self

    def _update(self, call: Call[Any], content: Content, timeout_s: float | None) -> Any:
        # Now: until it is awaited, its arrays may be changed.
        return self._update_joined(call.joined(), content, self._deadline(timeout_s))

    async def _update_joined(self, call: Call[Any], content: Content, timeout_s: float | None) -> Any:
        async with self._updating:
            with contextlib.closing(self._writer.update(call, content, timeout_s)) as steps:
                return await self._transport.run(steps, None)

    async def _run(self, call: Call[Any], timeout_s: float | None) -> Any:
        return call.read(await self._transport.run(tried(call, self._deadline(timeout_s)), None))

    async def __aenter__(self) -> AsyncMetricsSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
