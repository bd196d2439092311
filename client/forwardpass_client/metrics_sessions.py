"""Metric sessions: metrics states that the server holds, and to which each update is applied exactly once."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any

from forwardpass import v1
from forwardpass.wire import errors
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.description import BatchOutput
from forwardpass_client import retries, session_calls
from forwardpass_client.backoff import RESTART_S
from forwardpass_client.call import Call
from forwardpass_client.calls import Metrics
from forwardpass_client.deadlines import Deadline, locked
from forwardpass_client.processes import Connected
from forwardpass_client.routes import STICKY, Route
from forwardpass_client.session_calls import SessionCalls
from forwardpass_client.transfers import Steps, Unary
from forwardpass_client.transport import AsyncTransport, Transport

ID_BYTES = 16

Content = Callable[[], Call[Any]]
"""Makes the request of an update once more. Equal requests are the same update."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Doubt:
    """An update that was sent, and may have counted or not. digest: of its content."""

    identity: v1.UpdateIdentity
    digest: bytes


class _Writer:
    """Numbers the updates of one session object, which are sent one after another."""

    def __init__(self, session_id: bytes) -> None:
        self._session_id = session_id
        self._writer_id = secrets.token_bytes(ID_BYTES)
        self._sequence = 1
        # Updates in doubt, all with the current number. The server counts at most one of them.
        self._doubts: list[_Doubt] = []
        self.updates = 0

    def update(self, call: Call[Any], content: Content, deadline: Deadline) -> Steps:
        """The steps of one update. call: without the identity of the update."""
        is_in_doubt = bool(self._doubts)
        try:
            answer = yield from self._sent(self._identity(content), call, content, deadline)
        except errors.SequenceMismatch:
            if not is_in_doubt:
                raise
            # Another update with this number had counted.
            self._settle()
            answer = yield from self._sent(self._identity(content), call, content, deadline)
        self._settle()
        return call.read(answer)

    def _identity(self, content: Content) -> v1.UpdateIdentity:
        """The identity of an equal update in doubt, or else a new identity."""
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

    def _sent(self, identity: v1.UpdateIdentity, call: Call[Any], content: Content, deadline: Deadline) -> Steps:
        try:
            return (yield from attempts(session_calls.identified(call, identity), deadline))
        except errors.SequenceMismatch:
            raise
        except BaseException:
            # Whatever the error is, an earlier attempt may have counted while its answer was lost.
            if all(doubt.identity != identity for doubt in self._doubts):
                self._doubts.append(_Doubt(identity, _digest(content)))
            raise

    def _settle(self) -> None:
        """An update with the current number has counted."""
        self._sequence += 1
        self._doubts.clear()
        self.updates += 1


def _digest(content: Content) -> bytes:
    request = content().request
    hasher = hashlib.sha256()
    for piece in request.views() if isinstance(request, Pieces) else [request]:
        hasher.update(piece)
    return hasher.digest()


def attempts(call: Call[Any], deadline: Deadline) -> Steps:
    """The steps of one call of a session, which outlives the restart of a server: its answer."""
    return retries.attempts(Unary(call.path, call.request), call.held, deadline, limit_s=RESTART_S)


class MetricsSessionApi(Connected, abc.ABC):
    """A metrics state that the server holds under an id, and to which each update is applied exactly once.

    Calls that find the server away or restarting are made again until their deadline, for half a minute at most. Where
    an update raises ServerUnavailable or DeadlineExceeded, it may have counted or not: made again with the same
    arguments, it counts once.
    Every method may raise SessionNotFound, SessionExpired where the session was idle for longer than the server keeps
    one, SessionStoreUnavailable, ServerUnavailable and DeadlineExceeded.
    timeout_s: seconds until DeadlineExceeded; None for the client's own.
    """

    def __init__(self, calls: SessionCalls, session_id: bytes, timeout_s: float | None, route: Route) -> None:
        super().__init__(timeout_s)
        self.route = route
        self._calls = calls
        self._session_id = session_id
        self._writer = _Writer(session_id)

    @property
    def id(self) -> str:
        """32 hexadecimal digits, by which `metrics_session` finds the session again, from any process."""
        return self._session_id.hex()

    @property
    def updates(self) -> int:
        """How many updates the session had counted when it was opened here, plus those that counted from here since."""
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
        """Counts one batch.

        labels: like y of the model's `input_spec`, leaves of shape [B, ...].
        batch_output: a `BatchOutput` of `forward_pass`, or any object with its fields: predictions of shape [B, ...];
          fields that the model's metrics do not read may be None.
        sample_weight: one weight for each example, float32[B] unless the model says otherwise; None for no weights.
        mask: for a model whose predictions have a Keras mask, as of the model's `loss`.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, before anything is sent; then
        ModelRefusedInput, SessionNotFound, SessionExpired, ServerUnavailable or DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._made(self._calls.update_session(labels, batch_output, sample_weight, mask), deadline)

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

        model_weights: (trainable, non_trainable) like `initial_weights`, or a handle of `put_weights`.
        batch_input: (x, y), or a mapping with keys x and y, leaves of shape [B, ...].
        training: whether layers such as dropout act as in training.
        sample_weight: for the metrics, not for the loss: float32[B] unless the model says otherwise.
        with_predictions: False to get only the loss and the number of examples; `predictions` is None then.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, before anything is sent; then
        WeightsNotFound, ModelRefusedInput, SessionNotFound, SessionExpired, ServerUnavailable or DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        make = functools.partial(
            self._calls.forward_pass_in_session, model_weights, batch_input, training, sample_weight, with_predictions
        )
        # Weights that were sent by value the first time may be named by id the second time.
        return self._update(make(), lambda: make(names_weights=True), deadline)

    def merge(self, other: Any, *, timeout_s: float | None = None) -> Any:
        """Adds a state to this session's.

        other: another session of the same model, which keeps its state; or a state, as `state()` returns it.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises FunctionNotAvailable for a model whose states are no sums (`description.unmergeable_reason` says why),
        StructureMismatch, DTypeMismatch, ShapeMismatch, SessionNotFound, ServerUnavailable, DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        if isinstance(other, MetricsSessionApi):
            session_id, state = other._session_id, None
        elif isinstance(other, (str, bytes)):
            raise TypeError(
                f"other: expected a session or a state, got {other!r}: for the id of a session, pass "
                "model.metrics_session(id)"
            )
        else:
            session_id, state = b"", other
        return self._made(self._calls.merge_into_session(session_id, state), deadline)

    def result(self, *, timeout_s: float | None = None) -> Any:
        """The metrics so far, in the model's containers and order. The session stays open.

        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises SessionNotFound, SessionExpired, ServerUnavailable, DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(self._calls.session_result(self._session_id), deadline)

    def state(self, *, timeout_s: float | None = None) -> Any:
        """The metrics state so far: a value for `update_metrics_state`, or for `metrics_session` on any server.

        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises SessionNotFound, SessionExpired, ServerUnavailable, DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(self._calls.session_state(self._session_id), deadline)

    def close(self, *, timeout_s: float | None = None) -> Any:
        """Ends the session. A session that does not exist any more is no error.

        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises ServerUnavailable, DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(session_calls.close_session(self._session_id), deadline)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def _made(self, call: Call[Any], deadline: Deadline) -> Any:
        """`_update` with a request that is the same whenever it is made."""
        return self._update(call, lambda: call, deadline)

    @abc.abstractmethod
    def _update(self, call: Call[Any], content: Content, deadline: Deadline) -> Any:
        """Makes an update, after those that are being made: returns its result, or an awaitable of it."""

    @abc.abstractmethod
    def _run(self, call: Call[Any], deadline: Deadline) -> Any:
        """Makes a call: returns its result, or an awaitable of it."""

    def _open(self, resume: bool, initial_state: Any) -> Call[int]:
        return self._calls.open_session(self._session_id, resume, initial_state)


class MetricsSession(MetricsSessionApi):
    """A metrics state on the server, to which each update is applied exactly once: see `MetricsSessionApi`.

    Any number of threads may call at once; updates are made one after another.
    A context manager: leaving it closes the session. An error leaves it open, so that it can be resumed.
    """

    def __init__(
        self,
        calls: SessionCalls,
        session_id: bytes,
        timeout_s: float | None,
        transport: Transport,
        route: Route = STICKY,
    ) -> None:
        super().__init__(calls, session_id, timeout_s, route)
        self._transport = transport
        self._updating = threading.Lock()

    if TYPE_CHECKING:

        def update(
            self,
            labels: Any,
            batch_output: Any,
            sample_weight: Any = None,
            *,
            mask: Any = None,
            timeout_s: float | None = None,
        ) -> None: ...

        def forward_pass(
            self,
            model_weights: Any,
            batch_input: Any,
            training: bool = False,
            sample_weight: Any = None,
            *,
            with_predictions: bool = True,
            timeout_s: float | None = None,
        ) -> BatchOutput: ...

        def merge(self, other: Any, *, timeout_s: float | None = None) -> None: ...

        def result(self, *, timeout_s: float | None = None) -> Metrics: ...

        def close(self, *, timeout_s: float | None = None) -> None: ...

    def open(self, resume: bool, initial_state: Any, deadline: Deadline) -> MetricsSession:
        """Opens the session on the server; `RemoteFunctionalModel.metrics_session` calls it.

        initial_state: leaves of the shapes in `description.spec.metrics_state`; None for the state before the first
          batch.
        """
        self._writer.updates = self._run(self._open(resume, initial_state), deadline)
        return self

    def _update(self, call: Call[Any], content: Content, deadline: Deadline) -> Any:
        with (
            locked(self._updating, deadline),
            contextlib.closing(self._writer.update(call, content, deadline)) as steps,
        ):
            # An interrupted update is in doubt. Closing the steps notes that, before the next update begins.
            return self._transport.run(steps, deadline, self.route)

    def _run(self, call: Call[Any], deadline: Deadline) -> Any:
        return call.read(self._transport.run(attempts(call, deadline), deadline, self.route))

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
        self,
        calls: SessionCalls,
        session_id: bytes,
        timeout_s: float | None,
        transport: AsyncTransport,
        route: Route = STICKY,
    ) -> None:
        super().__init__(calls, session_id, timeout_s, route)
        self._transport = transport
        self._updating = asyncio.Lock()
        # Updates that are being made or wait for it. wait_for costs a task: an update that is alone goes without.
        self._present = 0

    if TYPE_CHECKING:

        def update(
            self,
            labels: Any,
            batch_output: Any,
            sample_weight: Any = None,
            *,
            mask: Any = None,
            timeout_s: float | None = None,
        ) -> Coroutine[Any, Any, None]: ...

        def forward_pass(
            self,
            model_weights: Any,
            batch_input: Any,
            training: bool = False,
            sample_weight: Any = None,
            *,
            with_predictions: bool = True,
            timeout_s: float | None = None,
        ) -> Coroutine[Any, Any, BatchOutput]: ...

        def merge(self, other: Any, *, timeout_s: float | None = None) -> Coroutine[Any, Any, None]: ...

        def result(self, *, timeout_s: float | None = None) -> Coroutine[Any, Any, Metrics]: ...

        def state(self, *, timeout_s: float | None = None) -> Coroutine[Any, Any, Any]: ...

        def close(self, *, timeout_s: float | None = None) -> Coroutine[Any, Any, None]: ...

    async def open(self, resume: bool, initial_state: Any, deadline: Deadline) -> AsyncMetricsSession:
        """Opens the session on the server; `AsyncRemoteFunctionalModel.metrics_session` calls it.

        initial_state: leaves of the shapes in `description.spec.metrics_state`; None for the state before the first
          batch.
        """
        self._writer.updates = await self._run(self._open(resume, initial_state), deadline)
        return self

    @contextlib.asynccontextmanager
    async def _turn(self, deadline: Deadline) -> AsyncIterator[None]:
        """Waits until no other update is being made. Raises DeadlineExceeded."""
        self._present += 1
        try:
            if self._present == 1:
                await self._updating.acquire()
            else:
                try:
                    await asyncio.wait_for(self._updating.acquire(), deadline.wait_s())
                except asyncio.TimeoutError:
                    raise deadline.exceeded() from None
            try:
                yield
            finally:
                self._updating.release()
        finally:
            self._present -= 1

    def _update(self, call: Call[Any], content: Content, deadline: Deadline) -> Any:
        # Joined now: its arrays may be changed before it is awaited.
        return self._update_joined(call.joined(), content, deadline)

    async def _update_joined(self, call: Call[Any], content: Content, deadline: Deadline) -> Any:
        deadline.restart()
        async with self._turn(deadline):
            with contextlib.closing(self._writer.update(call, content, deadline)) as steps:
                return await self._transport.run(steps, deadline, self.route)

    async def _run(self, call: Call[Any], deadline: Deadline) -> Any:
        deadline.restart()
        return call.read(await self._transport.run(attempts(call, deadline), deadline, self.route))

    async def __aenter__(self) -> AsyncMetricsSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
