"""Many calls over one stream: sent without waiting for the answers of those before."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import threading
from types import TracebackType
from typing import Any

from forwardpass.wire.methods import METHODS
from forwardpass_client.calls import Call, ModelCalls
from forwardpass_client.calls_in_flight import CallsInFlight
from forwardpass_client.streams import AsyncStream, Stream
from forwardpass_client.transport import AsyncTransport, Transport
from forwardpass_client.weights import HeldWeights

_PATH = METHODS["Pipeline"].path
_TITLE = "pipeline"


class PipelineApi(abc.ABC):
    """Calls with the same weights over one stream, answered as they finish, in any order.

    Each method takes what the model's method of the same name takes but for the weights, and returns a future.
    Errors about arguments are raised at once. On a broken stream it connects again, for half a minute at most, and
    sends what is unanswered.
    """

    def __init__(self, calls: ModelCalls, model_weights: Any, timeout_s: float | None) -> None:
        self._calls = calls
        self._weights = model_weights
        self._timeout_s = timeout_s

    def predict_on_batch(self, x: Any, training: bool = True, *, timeout_s: float | None = None) -> Any:
        """A future of the predictions for one batch."""
        call = self._calls.predict_on_batch(self._weights, x, training)
        return self._submit(call.joined(), self._deadline(timeout_s))

    def forward_pass(self, batch_input: Any, training: bool = True, *, timeout_s: float | None = None) -> Any:
        """A future of the BatchOutput of one batch."""
        call = self._calls.forward_pass(self._weights, batch_input, training)
        return self._submit(call.joined(), self._deadline(timeout_s))

    def _deadline(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s

    @abc.abstractmethod
    def _submit(self, call: Call[Any], timeout_s: float | None) -> Any:
        """Sends a call: returns its future."""


class Pipeline(PipelineApi):
    """See PipelineApi. A context manager: leaving it waits for every answer. Any number of threads may call at once.

    Its futures are concurrent.futures.Future. Where as many calls are in flight as may be, a call waits.
    """

    def __init__(
        self,
        transport: Transport,
        calls: ModelCalls,
        model_weights: Any,
        timeout_s: float | None,
        max_message_bytes: int,
    ) -> None:
        super().__init__(calls, model_weights, timeout_s)
        self._transport = transport
        self._flying = CallsInFlight(max_message_bytes, self._put_weights)
        self._stream = Stream(transport, _PATH, self._flying, _TITLE)

    def _submit(self, call: Call[Any], timeout_s: float | None) -> concurrent.futures.Future[Any]:
        return self._stream.submit(call, timeout_s)

    def _put_weights(self, held: HeldWeights) -> None:
        def put() -> None:
            error: Exception | None = None
            try:
                self._transport.run(held.put(), self._timeout_s)
            except Exception as failure:
                error = failure
            with self._stream.changing():
                self._flying.weights_put(held, error)

        threading.Thread(target=put, name="forwardpass-pipeline-put", daemon=True).start()

    def close(self) -> None:
        """Waits for every answer, and ends the stream."""
        self._stream.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.__exit__(kind, error, trace)


class AsyncPipeline(PipelineApi):
    """`Pipeline` for asyncio, as an asynchronous context manager. Its futures are asyncio's.

    A call that finds as many in flight as may be is sent later: its future is there at once.
    """

    def __init__(
        self,
        transport: AsyncTransport,
        calls: ModelCalls,
        model_weights: Any,
        timeout_s: float | None,
        max_message_bytes: int,
    ) -> None:
        super().__init__(calls, model_weights, timeout_s)
        self._transport = transport
        self._flying = CallsInFlight(max_message_bytes, self._put_weights)
        self._stream = AsyncStream(transport, _PATH, self._flying, _TITLE)
        self._tasks: set[asyncio.Task[None]] = set()

    def _submit(self, call: Call[Any], timeout_s: float | None) -> asyncio.Future[Any]:
        return self._stream.submit(call, timeout_s)

    def _put_weights(self, held: HeldWeights) -> None:
        async def put() -> None:
            error: Exception | None = None
            try:
                await self._transport.run(held.put(), self._timeout_s)
            except Exception as failure:
                error = failure
            self._flying.weights_put(held, error)
            self._stream.advance()

        task = asyncio.ensure_future(put())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Waits for every answer, and ends the stream. Cancelled, it gives up what is unanswered."""
        await self._stream.close()

    async def __aenter__(self) -> AsyncPipeline:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stream.__aexit__(kind, error, trace)
