"""Many calls over one stream: sent without waiting for the answers of those before."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from forwardpass.wire import errors
from forwardpass.wire.description import BatchOutput
from forwardpass.wire.methods import METHODS
from forwardpass_client.call import Call
from forwardpass_client.calls import ModelCalls
from forwardpass_client.calls_in_flight import CallsInFlight
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.processes import Connected
from forwardpass_client.routes import Route
from forwardpass_client.streams import AsyncStream, Stream
from forwardpass_client.transport import AsyncTransport, Transport
from forwardpass_client.weights_handles import AsyncWeightsHandle, WeightsHandle, WeightsHandleApi

if TYPE_CHECKING:
    from typing_extensions import Self

_PATH = METHODS["Pipeline"].path
_TITLE = "pipeline"


class _Calling(Connected, abc.ABC):
    """Calls over a stream, each a future."""

    def __init__(self, calls: ModelCalls, timeout_s: float | None) -> None:
        super().__init__(timeout_s)
        self._calls = calls

    def _predict_on_batch(self, weights: Any, x: Any, training: bool, exact: bool, timeout_s: float | None) -> Any:
        deadline = self._deadline(timeout_s)
        return self._submit(self._calls.predict_on_batch(weights, x, training, exact).joined(), deadline)

    def _forward_pass(self, weights: Any, batch: Any, training: bool, exact: bool, timeout_s: float | None) -> Any:
        deadline = self._deadline(timeout_s)
        return self._submit(self._calls.forward_pass(weights, batch, training, exact).joined(), deadline)

    def _forward_backward(
        self, weights: Any, batch: Any, training: bool, sample_weight: Any, keep: bool, timeout_s: float | None
    ) -> Any:
        deadline = self._deadline(timeout_s)
        handle = self._handle if keep else None
        call = self._calls.forward_backward(weights, batch, training, sample_weight, handle)
        return self._submit(call.joined(), deadline)

    def _vjp(self, weights: Any, x: Any, cotangents: Any, training: bool, timeout_s: float | None) -> Any:
        deadline = self._deadline(timeout_s)
        return self._submit(self._calls.vjp(weights, x, cotangents, training).joined(), deadline)

    @abc.abstractmethod
    def _handle(self, held: HeldWeights) -> Any:
        """The handle of weights on the server."""

    @abc.abstractmethod
    def _submit(self, call: Call[Any], deadline: Deadline) -> Any:
        """Sends a call: returns its future."""


class PipelineApi(_Calling):
    """Calls with the same weights over one stream, answered as they finish, in any order.

    Each method takes what the model's method of the same name takes but for the weights, and returns a future.
    Errors about arguments are raised at once. When the stream breaks, the pipeline reconnects and sends every
    unanswered call again, for half a minute at most.
    """

    _weights: WeightsHandleApi

    def predict_on_batch(
        self, x: Any, training: bool = True, *, exact: bool = True, timeout_s: float | None = None
    ) -> Any:
        """A future of the predictions for one batch: leaves of shape [B, ...].

        x: like x of the model's `input_spec`, leaves of shape [B, ...]; B may differ from call to call.
        training: whether layers such as dropout act as in training.
        exact: as of the model's `forward_pass`.
        timeout_s: seconds until the future raises DeadlineExceeded; None for the client's own.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, and CallCancelled on a closed
        pipeline. The future raises ModelRefusedInput, WeightsNotFound, ServerUnavailable, DeadlineExceeded.
        """
        return self._predict_on_batch(self._weights, x, training, exact, timeout_s)

    def forward_pass(
        self, batch_input: Any, training: bool = True, *, exact: bool = True, timeout_s: float | None = None
    ) -> Any:
        """A future of the BatchOutput of one batch.

        batch_input: (x, y), or a mapping with keys x and y, like the model's `input_spec`, leaves of shape [B, ...].
        training, exact, timeout_s, errors: as of `predict_on_batch`.
        """
        return self._forward_pass(self._weights, batch_input, training, exact, timeout_s)

    def forward_backward(
        self,
        batch_input: Any,
        training: bool = True,
        *,
        sample_weight: Any = None,
        keep: bool = False,
        timeout_s: float | None = None,
    ) -> Any:
        """A future of (BatchOutput, gradients) of one batch: see `forward_backward` of the model.

        batch_input: (x, y), or a mapping with keys x and y, like the model's `input_spec`, leaves of shape [B, ...].
        sample_weight: float32[B] unless the model says otherwise; None for no weights. keep: whether the gradients stay
        on the server, so that the future gives a handle of them.
        training, timeout_s, errors: as of `predict_on_batch`.
        """
        return self._forward_backward(self._weights, batch_input, training, sample_weight, keep, timeout_s)

    def vjp(self, x: Any, cotangents: Any, training: bool = True, *, timeout_s: float | None = None) -> Any:
        """A future of (weights_cotangents, x_cotangents) of one batch: see `vjp` of the model.

        x, cotangents: leaves of shape [B, ...]. training, timeout_s, errors: as of `predict_on_batch`.
        """
        return self._vjp(self._weights, x, cotangents, training, timeout_s)


class MultiWeightsPipelineApi(_Calling):
    """Calls that name their weights each, answered as they finish, in any order.

    They share one stream. Where replicas share weights, there is one stream for each replica.
    Each method takes what the model's method of the same name takes, and returns a future. Errors about arguments are
    raised at once. When the stream breaks, the pipeline reconnects and sends every unanswered call again, for half a
    minute at most.
    """

    def predict_on_batch(
        self, model_weights: Any, x: Any, training: bool = True, *, exact: bool = True, timeout_s: float | None = None
    ) -> Any:
        """A future of the predictions for one batch under these weights: leaves of shape [B, ...].

        model_weights: a handle of `put_weights`, or (trainable, non_trainable), which is sent with the call.
        x: like x of the model's `input_spec`, leaves of shape [B, ...]; B may differ from call to call.
        training: whether layers such as dropout act as in training.
        exact: as of the model's `forward_pass`.
        timeout_s: seconds until the future raises DeadlineExceeded; None for the client's own.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, and CallCancelled on a closed
        pipeline. The future raises ModelRefusedInput, WeightsNotFound, ServerUnavailable, DeadlineExceeded.
        """
        return self._predict_on_batch(model_weights, x, training, exact, timeout_s)

    def forward_pass(
        self,
        model_weights: Any,
        batch_input: Any,
        training: bool = True,
        *,
        exact: bool = True,
        timeout_s: float | None = None,
    ) -> Any:
        """A future of the BatchOutput of one batch under these weights.

        batch_input: (x, y), or a mapping with keys x and y, like the model's `input_spec`, leaves of shape [B, ...].
        model_weights, training, exact, timeout_s, errors: as of `predict_on_batch`.
        """
        return self._forward_pass(model_weights, batch_input, training, exact, timeout_s)

    def forward_backward(
        self,
        model_weights: Any,
        batch_input: Any,
        training: bool = True,
        *,
        sample_weight: Any = None,
        keep: bool = False,
        timeout_s: float | None = None,
    ) -> Any:
        """A future of (BatchOutput, gradients) of one batch under these weights: see `forward_backward` of the model.

        batch_input: (x, y), or a mapping with keys x and y, like the model's `input_spec`, leaves of shape [B, ...].
        sample_weight: float32[B] unless the model says otherwise; None for no weights. keep: whether the gradients stay
        on the server, so that the future gives a handle of them.
        model_weights, training, timeout_s, errors: as of `predict_on_batch`.
        """
        return self._forward_backward(model_weights, batch_input, training, sample_weight, keep, timeout_s)

    def vjp(
        self, model_weights: Any, x: Any, cotangents: Any, training: bool = True, *, timeout_s: float | None = None
    ) -> Any:
        """A future of (weights_cotangents, x_cotangents) of one batch under these weights: see `vjp` of the model.

        x, cotangents: leaves of shape [B, ...]. model_weights, training, timeout_s, errors: as of `predict_on_batch`.
        """
        return self._vjp(model_weights, x, cotangents, training, timeout_s)


class _Lane:
    """One stream of a pipeline for threads, and the calls on it.

    address: of its replica; None for no certain one. moves: see `Stream`.
    """

    def __init__(
        self,
        transport: Transport,
        timeout_s: float | None,
        max_message_bytes: int,
        address: str | None,
        route: Route,
        moves: Callable[[_Lane], None],
    ) -> None:
        self.address = address
        self._transport = transport
        self._timeout_s = timeout_s
        self.flying = CallsInFlight(max_message_bytes, self._put_weights)
        self.stream = Stream(transport, _PATH, self.flying, _TITLE, Deadline(None), route, lambda: moves(self))

    def _put_weights(self, held: HeldWeights) -> None:
        def put() -> None:
            error: Exception | None = None
            try:
                deadline = Deadline(self._timeout_s, is_renewable=True)
                self._transport.run(held.put(deadline), deadline, self._transport.route(held))
            except Exception as failure:
                error = failure
            with self.stream.changing():
                self.flying.weights_put(held, error)

        threading.Thread(target=put, name="forwardpass-pipeline-put", daemon=True).start()


class _ThreadCalling(_Calling):
    """The streams of a pipeline for threads.

    route: of the only stream. None for one stream for each replica: a call goes to the replica of its weights.
    """

    def __init__(
        self,
        transport: Transport,
        calls: ModelCalls,
        timeout_s: float | None,
        max_message_bytes: int,
        route: Route | None,
    ) -> None:
        super().__init__(calls, timeout_s)
        self._transport = transport
        self._max_message_bytes = max_message_bytes
        self._is_spread = route is None
        self._lock = threading.Lock()
        self._is_closing = False
        # Those that are not closed yet, also those to replicas that are gone.
        self._opened: list[_Lane] = []
        self._lanes: dict[str | None, _Lane] = {}
        if route is not None:
            self._open(None, route)

    def _open(self, address: str | None, route: Route) -> _Lane:
        lane = _Lane(self._transport, self._timeout_s, self._max_message_bytes, address, route, self._move)
        self._opened.append(lane)
        self._lanes[address] = lane
        return lane

    def _lane_of(self, call: Call[Any]) -> _Lane:
        if not self._is_spread:
            return self._lanes[None]
        address = self._transport.pick(call)
        with self._lock:
            lane = self._lanes.get(address)
            if lane is not None and not lane.stream.has_ended:
                return lane
            for former in self._lanes.keys() - {None, *self._transport.routes.addresses}:
                retired = self._lanes.pop(former)
                threading.Thread(target=self._retire, args=(retired,), daemon=True).start()
            return self._open(address, Route(self._transport.routes, None, address))

    def _retire(self, lane: _Lane) -> None:
        lane.stream.close()
        self._forget(lane)

    def _forget(self, lane: _Lane) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._opened.remove(lane)

    def _move(self, lane: _Lane) -> None:
        """Moves the calls of a stream whose replica is gone to the streams of other replicas."""
        if not self._is_spread:
            return
        with lane.stream.changing():
            released = lane.flying.release(lambda call: self._transport.pick(call) != lane.address)
        for call, future, deadline in released:
            while not self._lane_of(call).stream.adopt(call, future, deadline):
                pass

    def _handle(self, held: HeldWeights) -> WeightsHandle:
        return WeightsHandle(held, self._transport, self._timeout_s)

    def _submit(self, call: Call[Any], deadline: Deadline) -> concurrent.futures.Future[Any]:
        if self._is_closing:
            raise errors.CallCancelled("the pipeline is closed")
        return self._lane_of(call).stream.submit(call, deadline)

    def close(self) -> None:
        """Waits for every answer, and ends the stream. Raises RuntimeError in a forked child."""
        self._deadline()
        self._is_closing = True
        # A stream whose replica is gone may open another one, until it has ended itself.
        while self._opened:
            lane = self._opened[-1]
            lane.stream.close()
            self._forget(lane)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self._is_in_forked_child:
            self._is_closing = True
            for lane in list(self._opened):
                lane.stream.leave()


class Pipeline(_ThreadCalling, PipelineApi):
    """Calls with the same weights over one stream, each a `concurrent.futures.Future`: see `PipelineApi`.

    A context manager: leaving it waits for every answer. Any number of threads may call at once. A call waits for room
    where 256 calls, or 64 MiB of them, are in flight.
    """

    def __init__(
        self,
        transport: Transport,
        calls: ModelCalls,
        model_weights: WeightsHandleApi,
        timeout_s: float | None,
        max_message_bytes: int,
    ) -> None:
        super().__init__(transport, calls, timeout_s, max_message_bytes, transport.route(model_weights.held))
        self._weights = model_weights

    if TYPE_CHECKING:

        def predict_on_batch(
            self,
            x: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> concurrent.futures.Future[Any]: ...

        def forward_pass(
            self,
            batch_input: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> concurrent.futures.Future[BatchOutput]: ...

        def forward_backward(
            self,
            batch_input: Any,
            training: bool = True,
            *,
            sample_weight: Any = None,
            keep: bool = False,
            timeout_s: float | None = None,
        ) -> concurrent.futures.Future[tuple[BatchOutput, Any]]: ...

        def vjp(
            self,
            x: Any,
            cotangents: Any,
            training: bool = True,
            *,
            timeout_s: float | None = None,
        ) -> concurrent.futures.Future[tuple[Any, Any]]: ...


class MultiWeightsPipeline(_ThreadCalling, MultiWeightsPipelineApi):
    """Calls that name their weights each: see `MultiWeightsPipelineApi`. Used like `Pipeline`."""

    def __init__(
        self, transport: Transport, calls: ModelCalls, timeout_s: float | None, max_message_bytes: int
    ) -> None:
        super().__init__(transport, calls, timeout_s, max_message_bytes, None)

    if TYPE_CHECKING:

        def predict_on_batch(
            self,
            model_weights: Any,
            x: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> concurrent.futures.Future[Any]: ...

        def forward_pass(
            self,
            model_weights: Any,
            batch_input: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> concurrent.futures.Future[BatchOutput]: ...

        def forward_backward(
            self,
            model_weights: Any,
            batch_input: Any,
            training: bool = True,
            *,
            sample_weight: Any = None,
            keep: bool = False,
            timeout_s: float | None = None,
        ) -> concurrent.futures.Future[tuple[BatchOutput, Any]]: ...

        def vjp(
            self,
            model_weights: Any,
            x: Any,
            cotangents: Any,
            training: bool = True,
            *,
            timeout_s: float | None = None,
        ) -> concurrent.futures.Future[tuple[Any, Any]]: ...


class _AsyncLane:
    """`_Lane` for asyncio."""

    def __init__(
        self,
        transport: AsyncTransport,
        timeout_s: float | None,
        max_message_bytes: int,
        address: str | None,
        route: Route,
        moves: Callable[[_AsyncLane], None],
    ) -> None:
        self.address = address
        self._transport = transport
        self._timeout_s = timeout_s
        self._tasks: set[asyncio.Task[None]] = set()
        self.flying = CallsInFlight(max_message_bytes, self._put_weights)
        self.stream = AsyncStream(transport, _PATH, self.flying, _TITLE, Deadline(None), route, lambda: moves(self))

    def _put_weights(self, held: HeldWeights) -> None:
        async def put() -> None:
            error: Exception | None = None
            try:
                deadline = Deadline(self._timeout_s, is_renewable=True)
                await self._transport.run(held.put(deadline), deadline, self._transport.route(held))
            except Exception as failure:
                error = failure
            self.flying.weights_put(held, error)
            self.stream.advance()

        task = asyncio.ensure_future(put())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _AsyncCalling(_Calling):
    """`_ThreadCalling` for asyncio."""

    def __init__(
        self,
        transport: AsyncTransport,
        calls: ModelCalls,
        timeout_s: float | None,
        max_message_bytes: int,
        route: Route | None,
    ) -> None:
        super().__init__(calls, timeout_s)
        self._transport = transport
        self._max_message_bytes = max_message_bytes
        self._is_spread = route is None
        self._is_closing = False
        self._opened: list[_AsyncLane] = []
        self._lanes: dict[str | None, _AsyncLane] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        if route is not None:
            self._open(None, route)

    def _open(self, address: str | None, route: Route) -> _AsyncLane:
        lane = _AsyncLane(self._transport, self._timeout_s, self._max_message_bytes, address, route, self._move)
        self._opened.append(lane)
        self._lanes[address] = lane
        return lane

    def _lane_of(self, call: Call[Any]) -> _AsyncLane:
        if not self._is_spread:
            return self._lanes[None]
        self._transport.check_loop()
        address = self._transport.pick(call)
        lane = self._lanes.get(address)
        if lane is not None and not lane.stream.has_ended:
            return lane
        for former in self._lanes.keys() - {None, *self._transport.routes.addresses}:
            task = asyncio.ensure_future(self._retire(self._lanes.pop(former)))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        return self._open(address, Route(self._transport.routes, None, address))

    async def _retire(self, lane: _AsyncLane) -> None:
        await lane.stream.close()
        self._forget(lane)

    def _forget(self, lane: _AsyncLane) -> None:
        with contextlib.suppress(ValueError):
            self._opened.remove(lane)

    def _move(self, lane: _AsyncLane) -> None:
        """See `_ThreadCalling._move`."""
        if not self._is_spread:
            return
        released = lane.flying.release(lambda call: self._transport.pick(call) != lane.address)
        for call, future, deadline in released:
            while not self._lane_of(call).stream.adopt(call, future, deadline):
                pass

    def _handle(self, held: HeldWeights) -> AsyncWeightsHandle:
        return AsyncWeightsHandle(held, self._transport, self._timeout_s)

    def _submit(self, call: Call[Any], deadline: Deadline) -> asyncio.Future[Any]:
        if self._is_closing:
            self._transport.check_loop()
            raise errors.CallCancelled("the pipeline is closed")
        return self._lane_of(call).stream.submit(call, deadline)

    async def close(self) -> None:
        """Waits for every answer, and ends the stream. Cancelled, it fails every unanswered call.

        Raises RuntimeError in a forked child.
        """
        self._deadline()
        self._transport.check_loop()
        self._is_closing = True
        # A stream whose replica is gone may open another one, until it has ended itself.
        while self._opened:
            lane = self._opened[-1]
            try:
                await lane.stream.close()
            except asyncio.CancelledError:
                await self._leave()
                raise
            self._forget(lane)

    async def _leave(self) -> None:
        self._is_closing = True
        for lane in list(self._opened):
            await lane.stream.leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
        elif not self._is_in_forked_child:
            await self._leave()


class AsyncPipeline(_AsyncCalling, PipelineApi):
    """`Pipeline` for asyncio: an asynchronous context manager whose futures are `asyncio.Future`.

    A call that finds no room in flight is sent later; its future is returned at once.
    """

    def __init__(
        self,
        transport: AsyncTransport,
        calls: ModelCalls,
        model_weights: WeightsHandleApi,
        timeout_s: float | None,
        max_message_bytes: int,
    ) -> None:
        super().__init__(transport, calls, timeout_s, max_message_bytes, transport.route(model_weights.held))
        self._weights = model_weights

    if TYPE_CHECKING:

        def predict_on_batch(
            self,
            x: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> asyncio.Future[Any]: ...

        def forward_pass(
            self,
            batch_input: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> asyncio.Future[BatchOutput]: ...

        def forward_backward(
            self,
            batch_input: Any,
            training: bool = True,
            *,
            sample_weight: Any = None,
            keep: bool = False,
            timeout_s: float | None = None,
        ) -> asyncio.Future[tuple[BatchOutput, Any]]: ...

        def vjp(
            self,
            x: Any,
            cotangents: Any,
            training: bool = True,
            *,
            timeout_s: float | None = None,
        ) -> asyncio.Future[tuple[Any, Any]]: ...


class AsyncMultiWeightsPipeline(_AsyncCalling, MultiWeightsPipelineApi):
    """`MultiWeightsPipeline` for asyncio. Used like `AsyncPipeline`."""

    def __init__(
        self, transport: AsyncTransport, calls: ModelCalls, timeout_s: float | None, max_message_bytes: int
    ) -> None:
        super().__init__(transport, calls, timeout_s, max_message_bytes, None)

    if TYPE_CHECKING:

        def predict_on_batch(
            self,
            model_weights: Any,
            x: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> asyncio.Future[Any]: ...

        def forward_pass(
            self,
            model_weights: Any,
            batch_input: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> asyncio.Future[BatchOutput]: ...

        def forward_backward(
            self,
            model_weights: Any,
            batch_input: Any,
            training: bool = True,
            *,
            sample_weight: Any = None,
            keep: bool = False,
            timeout_s: float | None = None,
        ) -> asyncio.Future[tuple[BatchOutput, Any]]: ...

        def vjp(
            self,
            model_weights: Any,
            x: Any,
            cotangents: Any,
            training: bool = True,
            *,
            timeout_s: float | None = None,
        ) -> asyncio.Future[tuple[Any, Any]]: ...
