"""Many calls over one stream: sent without waiting for the answers of those before."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any

from forwardpass.wire import errors
from forwardpass.wire.methods import METHODS
from forwardpass_client.calls import Call, ModelCalls
from forwardpass_client.calls_in_flight import CallsInFlight, complete
from forwardpass_client.patience import Patience
from forwardpass_client.transport import AsyncTransport, Transport
from forwardpass_client.weights import HeldWeights

_LEFT = "the pipeline was left before this call was answered"

_PATH = METHODS["Pipeline"].path

# A stream that breaks is opened again. Each call's own deadline holds meanwhile.
_FIRST_PAUSE_S = 0.1

# What a broken connection looks like: every other error would come again.
_BROKEN = (errors.ServerUnavailable, errors.CallCancelled)


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
        self._changed = threading.Condition()
        self._flying = CallsInFlight(max_message_bytes, self._put_weights)
        self._is_closing = False
        self._error: Exception | None = None
        self._stream = 0
        self._cancel: Callable[[], None] = lambda: None
        self._threads = [
            threading.Thread(target=target, name=f"forwardpass-pipeline-{target.__name__}", daemon=True)
            for target in (self._receive, self._keep_time)
        ]
        for thread in self._threads:
            thread.start()

    def _submit(self, call: Call[Any], timeout_s: float | None) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        # A callback of a future must not wait for what its own thread alone can bring about.
        is_ours = threading.current_thread() in self._threads
        with self._changing():
            has_room = is_ours or self._changed.wait_for(
                lambda: self._error is not None or self._is_closing or self._flying.has_room(call), timeout_s
            )
            if self._error is not None:
                raise self._error
            if self._is_closing:
                raise errors.CallCancelled("the pipeline is closed")
            if not has_room:
                raise errors.DeadlineExceeded("no other call ended in time to make room for this one")
            self._flying.add(call, future, deadline)
        return future

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock; tells every thread of the change; completes futures afterwards, without the lock."""
        with self._changed:
            try:
                yield
            finally:
                completed = self._flying.completed()
                self._changed.notify_all()
        complete(completed)

    def _requests(self, stream: int) -> Iterator[bytes]:
        """The messages of one stream, until the pipeline is closed or another stream has taken its place."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._flying.outbox or self._stream != stream or self._is_over())
                if self._stream != stream or (self._is_over() and not self._flying.outbox):
                    return
                message = self._flying.outbox.next_message()
            yield message

    def _is_over(self) -> bool:
        return self._error is not None or (self._is_closing and not len(self._flying))

    def _receive(self) -> None:
        patience = Patience(_FIRST_PAUSE_S)
        while True:
            with self._changed:
                # No stream before there is something to send.
                self._changed.wait_for(lambda: len(self._flying) or self._is_over())
                if self._is_over():
                    return
                self._stream += 1
                stream = self._stream
                self._flying.resend()
            try:
                for message in self._transport.stream(_PATH, self._requests(stream), opened=self._opened):
                    patience.renew()
                    with self._changing():
                        self._flying.take(message)
                with self._changed:
                    if self._is_over():
                        return
                error: Exception = errors.ServerUnavailable("the server ended the stream")
            except Exception as failure:
                error = failure
            pause_s = patience.pause_s() if isinstance(error, _BROKEN) else None
            with self._changing():
                if pause_s is None and self._error is None:
                    self._error = error
                    self._flying.fail_all(error)
                self._stream += 1
                if self._error is not None:
                    return
            time.sleep(pause_s or 0)

    def _opened(self, cancel: Callable[[], None]) -> None:
        with self._changed:
            self._cancel = cancel
            is_given_up = self._error is not None
        if is_given_up:
            cancel()

    def _keep_time(self) -> None:
        while True:
            with self._changed:
                if self._is_over():
                    return
                event = self._flying.next_event()
                self._changed.wait(None if event is None else max(event - time.monotonic(), 0))
                self._flying.advance()
                completed = self._flying.completed()
                if completed or self._flying.outbox:
                    self._changed.notify_all()
            complete(completed)

    def _put_weights(self, held: HeldWeights) -> None:
        def put() -> None:
            error: Exception | None = None
            try:
                self._transport.run(held.put(), self._timeout_s)
            except Exception as failure:
                error = failure
            with self._changing():
                self._flying.weights_put(held, error)

        threading.Thread(target=put, name="forwardpass-pipeline-put", daemon=True).start()

    def close(self) -> None:
        """Waits for every answer, and ends the stream."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with self._changing():
                self._error = errors.CallCancelled(_LEFT)
                self._flying.fail_all(self._error)
            self._cancel()
        self.close()


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
        self._held_back: list[tuple[Call[Any], asyncio.Future[Any], float | None]] = []
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._is_closing = False
        self._stream = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timed = 0.0
        self._receiving = asyncio.ensure_future(self._receive())

    def _submit(self, call: Call[Any], timeout_s: float | None) -> asyncio.Future[Any]:
        if self._error is not None:
            raise self._error
        if self._is_closing:
            raise errors.CallCancelled("the pipeline is closed")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._held_back and self._flying.has_room(call):
            self._flying.add(call, future, deadline)
            if deadline is not None and (self._timer is None or deadline < self._timed):
                self._set_timer()
            self._changed.set()
            return future
        waiting = (call, future, deadline)
        self._held_back.append(waiting)
        self._advance()
        if timeout_s is not None and self._held_back and self._held_back[-1] is waiting:
            loop.call_later(timeout_s, complete, [(future, None, errors.DeadlineExceeded())])
        return future

    def _advance(self) -> None:
        """Completes what is answered, sends what there is room for, and sets the clock."""
        complete(self._flying.completed())
        sent = 0
        for call, future, deadline in self._held_back:
            if not self._flying.has_room(call):
                break
            sent += 1
            if not future.done():
                self._flying.add(call, future, deadline)
        del self._held_back[:sent]
        self._set_timer()
        self._changed.set()

    def _set_timer(self) -> None:
        event = self._flying.next_event()
        if event is not None and (self._timer is None or event < self._timed):
            if self._timer is not None:
                self._timer.cancel()
            self._timed = event
            wait_s = max(event - time.monotonic(), 0)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._keep_time)

    def _keep_time(self) -> None:
        self._timer = None
        self._flying.advance()
        self._advance()

    def _is_over(self) -> bool:
        return self._error is not None or (self._is_closing and not len(self._flying) and not self._held_back)

    async def _requests(self, stream: int) -> AsyncIterator[bytes]:
        """The messages of one stream, until the pipeline is closed or another stream has taken its place."""
        while self._stream == stream:
            if self._flying.outbox:
                yield self._flying.outbox.next_message()
                continue
            if self._is_over():
                return
            self._changed.clear()
            await self._changed.wait()

    async def _receive(self) -> None:
        patience = Patience(_FIRST_PAUSE_S)
        while True:
            while not len(self._flying) and not self._is_over():
                self._changed.clear()
                await self._changed.wait()
            if self._is_over():
                return
            self._stream += 1
            self._flying.resend()
            error: Exception = errors.ServerUnavailable("the server ended the stream")
            try:
                async for message in self._transport.stream(_PATH, self._requests(self._stream)):
                    patience.renew()
                    self._flying.take(message)
                    self._advance()
                if self._is_over():
                    return
            except Exception as failure:
                error = failure
            self._stream += 1
            self._changed.set()
            pause_s = patience.pause_s() if isinstance(error, _BROKEN) else None
            if pause_s is None:
                self._give_up(error)
                return
            await asyncio.sleep(pause_s)

    def _give_up(self, error: Exception) -> None:
        self._error = error
        self._flying.fail_all(error)
        complete(self._flying.completed())
        complete((future, None, error) for _, future, _ in self._held_back)
        self._held_back.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._changed.set()

    def _put_weights(self, held: HeldWeights) -> None:
        async def put() -> None:
            error: Exception | None = None
            try:
                await self._transport.run(held.put(), self._timeout_s)
            except Exception as failure:
                error = failure
            self._flying.weights_put(held, error)
            self._advance()

        task = asyncio.ensure_future(put())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Waits for every answer, and ends the stream. Cancelled, it gives up what is unanswered."""
        self._is_closing = True
        self._changed.set()
        try:
            await asyncio.shield(self._receiving)
        except asyncio.CancelledError:
            await self._leave()
            raise
        if self._timer is not None:
            self._timer.cancel()

    async def _leave(self) -> None:
        self._give_up(errors.CallCancelled(_LEFT))
        self._receiving.cancel()
        await asyncio.wait([self._receiving])

    async def __aenter__(self) -> AsyncPipeline:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
        else:
            await self._leave()
