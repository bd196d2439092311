"""Many calls over one stream: sent without waiting for the answers of those before."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from forwardpass.wire.description import BatchOutput
from forwardpass.wire.methods import METHODS
from forwardpass_client.call import Call
from forwardpass_client.calls import ModelCalls
from forwardpass_client.calls_in_flight import CallsInFlight
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.processes import Connected
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
    """Calls over one stream that name their weights each, answered as they finish, in any order.

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


class _ThreadStream(_Calling):
    """The stream of a pipeline for threads."""

    def __init__(
        self, transport: Transport, calls: ModelCalls, timeout_s: float | None, max_message_bytes: int
    ) -> None:
        super().__init__(calls, timeout_s)
        self._transport = transport
        self._flying = CallsInFlight(max_message_bytes, self._put_weights)
        self._stream = Stream(transport, _PATH, self._flying, _TITLE, Deadline(None))

    def _handle(self, held: HeldWeights) -> WeightsHandle:
        return WeightsHandle(held, self._transport, self._timeout_s)

    def _submit(self, call: Call[Any], deadline: Deadline) -> concurrent.futures.Future[Any]:
        return self._stream.submit(call, deadline)

    def _put_weights(self, held: HeldWeights) -> None:
        def put() -> None:
            error: Exception | None = None
            try:
                deadline = Deadline(self._timeout_s, is_renewable=True)
                self._transport.run(held.put(deadline), deadline)
            except Exception as failure:
                error = failure
            with self._stream.changing():
                self._flying.weights_put(held, error)

        threading.Thread(target=put, name="forwardpass-pipeline-put", daemon=True).start()

    def close(self) -> None:
        """Waits for every answer, and ends the stream. Raises RuntimeError in a forked child."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.__exit__(kind, error, trace)


class Pipeline(_ThreadStream, PipelineApi):
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
        super().__init__(transport, calls, timeout_s, max_message_bytes)
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


class MultiWeightsPipeline(_ThreadStream, MultiWeightsPipelineApi):
    """Calls over one stream that name their weights each: see `MultiWeightsPipelineApi`. Used like `Pipeline`."""

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


class _AsyncStreamOfCalls(_Calling):
    """The stream of a pipeline for asyncio."""

    def __init__(
        self, transport: AsyncTransport, calls: ModelCalls, timeout_s: float | None, max_message_bytes: int
    ) -> None:
        super().__init__(calls, timeout_s)
        self._transport = transport
        self._flying = CallsInFlight(max_message_bytes, self._put_weights)
        self._stream = AsyncStream(transport, _PATH, self._flying, _TITLE, Deadline(None))
        self._tasks: set[asyncio.Task[None]] = set()

    def _handle(self, held: HeldWeights) -> AsyncWeightsHandle:
        return AsyncWeightsHandle(held, self._transport, self._timeout_s)

    def _submit(self, call: Call[Any], deadline: Deadline) -> asyncio.Future[Any]:
        return self._stream.submit(call, deadline)

    def _put_weights(self, held: HeldWeights) -> None:
        async def put() -> None:
            error: Exception | None = None
            try:
                deadline = Deadline(self._timeout_s, is_renewable=True)
                await self._transport.run(held.put(deadline), deadline)
            except Exception as failure:
                error = failure
            self._flying.weights_put(held, error)
            self._stream.advance()

        task = asyncio.ensure_future(put())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Waits for every answer, and ends the stream. Cancelled, it fails every unanswered call.

        Raises RuntimeError in a forked child.
        """
        self._deadline()
        await self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
        elif not self._is_in_forked_child:
            await self._stream.leave()


class AsyncPipeline(_AsyncStreamOfCalls, PipelineApi):
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
        super().__init__(transport, calls, timeout_s, max_message_bytes)
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


class AsyncMultiWeightsPipeline(_AsyncStreamOfCalls, MultiWeightsPipelineApi):
    """`MultiWeightsPipeline` for asyncio. Used like `AsyncPipeline`."""

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
