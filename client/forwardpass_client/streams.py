"""Streams that reconnect when they break, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

from forwardpass.wire import errors
from forwardpass_client.backoff import RETRYABLE, Backoff
from forwardpass_client.deadlines import Deadline
from forwardpass_client.processes import forked, process
from forwardpass_client.routes import STICKY, Route
from forwardpass_client.transfers import Steps
from forwardpass_client.transport import AsyncTransport, Transport

# How long a stream with nothing unanswered may take to end before it is cancelled: a server that stalls never ends it.
_END_S = 0.3


ResultT = TypeVar("ResultT")


class Future(Protocol):
    """concurrent.futures.Future or asyncio.Future."""

    def done(self) -> bool:
        """Whether it has a result or an error, or was cancelled."""

    def set_result(self, result: Any, /) -> None:
        """Completes it. Raises InvalidStateError of asyncio or concurrent.futures where it is done already."""

    def set_exception(self, error: BaseException, /) -> None:
        """Fails it. Raises InvalidStateError of asyncio or concurrent.futures where it is done already."""


class Completed(NamedTuple):
    """A future, and its result or error."""

    future: Future
    result: Any
    error: BaseException | None


class InFlight(Protocol):
    """The items of a stream that are sent and not answered yet, without I/O. For one thread at a time."""

    def __len__(self) -> int: ...

    def has_room(self, item: Any) -> bool:
        """Whether another item may be in flight."""

    def add(self, item: Any, future: Future, deadline: Deadline) -> None:
        """Takes an item to be sent."""

    def has_message(self) -> bool:
        """Whether there is something to send."""

    def next_message(self) -> bytes:
        """The next message of the stream; there must be one."""

    def take(self, message: bytes) -> None:
        """Takes a response of the stream. Raises an error of the stream as a whole."""

    def completed(self) -> list[Completed]:
        """The futures that are to be completed, without a lock: their callbacks may call anything."""

    def next_event(self) -> float | None:
        """When `advance` is to be called next, by time.monotonic; None for never."""

    def advance(self) -> None:
        """Does what is due. Raises DeadlineExceeded where the deadline of the stream as a whole has passed."""

    def resend(self) -> None:
        """Sends every unanswered item again, because another stream has replaced one that broke."""

    def broke(self, error: Exception) -> None:
        """The stream has ended with an error."""

    def recovery(self, error: Exception) -> Steps | None:
        """The steps to take after an error of the stream before it reconnects; None where the error is final."""

    def fail_all(self, error: Exception) -> None:
        """Fails every unanswered item."""


def complete(completed: Iterable[Completed]) -> None:
    """Completes futures that nobody has cancelled."""
    for future, result, error in completed:
        if future.done():
            continue
        try:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        except (concurrent.futures.InvalidStateError, asyncio.InvalidStateError):
            continue  # Cancelled between done() and set_result().


class CallFuture(concurrent.futures.Future[ResultT]):
    """A future that raises RuntimeError in a forked child, where the thread that would complete it is missing."""

    def __init__(self) -> None:
        super().__init__()
        self._forks = process.forks

    def result(self, timeout: float | None = None) -> ResultT:
        """The answer; see `concurrent.futures.Future`."""
        self._check_process()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error; see `concurrent.futures.Future`."""
        self._check_process()
        return super().exception(timeout)

    def _check_process(self) -> None:
        if self._forks != process.forks and not self.done():
            raise RuntimeError(forked("future"))


class _StreamThread(threading.Thread):
    """A thread of a stream."""


class Stream:
    """A stream for any number of threads.

    title: the user's word for it, in messages. deadline: of the stream as a whole; each item has a deadline of its own.
    route: of the stream, and of the steps that it takes before it reconnects.
    moves: is called after the server is gone, before the stream reconnects. It may take items out of `flying`, with
      `changing`.
    """

    def __init__(
        self,
        transport: Transport,
        path: str,
        flying: InFlight,
        title: str,
        deadline: Deadline,
        route: Route = STICKY,
        moves: Callable[[], None] = lambda: None,
    ) -> None:
        self._route = route
        self._moves = moves
        self._forks = process.forks
        self._deadline = deadline
        self._transport = transport
        self._path = path
        self._flying = flying
        self._title = title
        self._changed = threading.Condition()
        self._is_closing = False
        self._error: Exception | None = None
        self._stream = 0
        self._cancel: Callable[[], None] = lambda: None
        self._threads = [
            # In the context of the caller, which holds the current trace.
            _StreamThread(
                target=contextvars.copy_context().run,
                args=(target,),
                name=f"forwardpass-{title}-{target.__name__}",
                daemon=True,
            )
            for target in (self._receive, self._keep_time)
        ]
        for thread in self._threads:
            thread.start()

    def _check_process(self) -> None:
        """Raises RuntimeError in a forked child, where the threads of the stream are missing."""
        if self._forks != process.forks:
            raise RuntimeError(forked(self._title))

    def submit(self, item: Any, deadline: Deadline) -> concurrent.futures.Future[Any]:
        """Sends an item: a future of its answer. Waits until there is room in flight, or until the deadline.

        Raises CallCancelled on a closed stream, DeadlineExceeded where no room came in time, the error that ended the
        stream, and RuntimeError in a forked child.
        """
        self._check_process()
        future: concurrent.futures.Future[Any] = CallFuture()
        # A callback of a future runs on a thread of a stream: if it waited for room, no answer could make room.
        is_ours = isinstance(threading.current_thread(), _StreamThread)
        with self.changing():
            has_room = is_ours or self._changed.wait_for(
                lambda: self._error is not None or self._is_closing or self._flying.has_room(item),
                # The deadline of the stream as a whole may move on: `_keep_time` ends the stream.
                None if deadline is self._deadline else deadline.wait_s(),
            )
            if self._error is not None:
                raise self._error
            if self._is_closing:
                raise errors.CallCancelled(f"the {self._title} is closed")
            if not has_room:
                raise errors.DeadlineExceeded(
                    f"the {self._title} is full, and no call in progress was answered before the deadline: retry, or "
                    "raise timeout_s"
                )
            self._flying.add(item, future, deadline)
        return future

    def adopt(self, item: Any, future: Future, deadline: Deadline) -> bool:
        """Sends an item of another stream, whether there is room or not: False where this stream has ended."""
        with self.changing():
            if self._is_over():
                return False
            self._flying.add(item, future, deadline)
            return True

    @property
    def has_ended(self) -> bool:
        """Whether the stream takes no further items."""
        with self._changed:
            return self._is_over()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Holds the lock, then wakes every thread, then completes futures without the lock."""
        with self._changed:
            try:
                yield
            finally:
                completed = self._flying.completed()
                self._changed.notify_all()
        complete(completed)

    def _requests(self, stream: int) -> Iterator[bytes]:
        """The messages of one stream, until every item is answered or another stream has replaced it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._flying.has_message() or self._stream != stream or self._is_over())
                if self._stream != stream or (self._is_over() and not self._flying.has_message()):
                    return
                message = self._flying.next_message()
            yield message

    def _is_over(self) -> bool:
        return self._error is not None or (self._is_closing and not len(self._flying))

    def _receive(self) -> None:
        backoff = Backoff(self._deadline)
        while True:
            with self._changed:
                # No stream before there is something to send. While no item waits, the backoff does not count.
                if not len(self._flying):
                    backoff.reset()
                self._changed.wait_for(lambda: len(self._flying) or self._is_over())
                if self._is_over():
                    return
                self._stream += 1
                stream = self._stream
                self._flying.resend()
            try:
                messages = self._transport.stream(
                    self._path, self._requests(stream), opened=self._opened, address=self._route.address
                )
                for message in messages:
                    backoff.reset()
                    with self.changing():
                        self._flying.take(message)
                error: Exception = errors.ServerUnavailable("the server ended the stream")
            except Exception as failure:
                error = failure
            with self._changed:
                self._stream += 1
                if self._is_over():
                    return
            try:
                pause_s = self._recover(error, backoff)
            except Exception as failure:
                self._give_up(failure)
                return
            with self._changed:
                self._changed.wait_for(self._is_over, pause_s)

    def _recover(self, error: Exception, backoff: Backoff) -> float:
        """Takes the steps that help against an error of the stream: the pause before it reconnects.

        Raises an error that is final.
        """
        if self._transport.is_closed or not isinstance(error, errors.ForwardPassError):
            raise error
        self._route.failed(error)
        with self._changed:
            self._flying.broke(error)
        if isinstance(error, RETRYABLE):
            self._moves()
        else:
            steps = self._flying.recovery(error)
            if steps is None:
                raise error
            self._transport.run(steps, self._deadline, self._route)
        return backoff.pause_s(error)

    def _give_up(self, error: Exception) -> None:
        with self.changing():
            self._stream += 1
            if self._error is None:
                self._error = error
                self._flying.fail_all(error)

    def _opened(self, cancel: Callable[[], None]) -> None:
        with self._changed:
            self._cancel = cancel
            # `close` has called the function of the stream before this one, where the last item expired meanwhile.
            is_over = self._is_over()
        if is_over:
            cancel()

    def _keep_time(self) -> None:
        while True:
            expired: Exception | None = None
            with self._changed:
                if self._is_over():
                    return
                event = self._flying.next_event()
                self._changed.wait(None if event is None else max(event - time.monotonic(), 0))
                try:
                    self._flying.advance()
                except errors.DeadlineExceeded as error:
                    expired = error
                completed = self._flying.completed()
                if completed or self._flying.has_message():
                    self._changed.notify_all()
            complete(completed)
            if expired is not None:
                self._give_up(expired)
                self._cancel()

    def close(self) -> None:
        """Waits for every answer, and ends the stream."""
        self._check_process()
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            self._changed.wait_for(self._is_over)
        self._threads[0].join(_END_S)
        self._cancel()
        for thread in self._threads:
            thread.join()

    def leave(self) -> None:
        """Fails every unanswered item, and ends the stream. In a forked child it does nothing."""
        if self._forks != process.forks:
            return
        self._give_up(_left(self._title))
        self._cancel()
        self.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.leave()


class AsyncStream:
    """`Stream` for asyncio."""

    def __init__(
        self,
        transport: AsyncTransport,
        path: str,
        flying: InFlight,
        title: str,
        deadline: Deadline,
        route: Route = STICKY,
        moves: Callable[[], None] = lambda: None,
    ) -> None:
        self._route = route
        self._moves = moves
        self._deadline = deadline
        self._transport = transport
        self._path = path
        self._flying = flying
        self._title = title
        self._held_back: list[tuple[Any, asyncio.Future[Any], Deadline]] = []
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._is_closing = False
        self._stream = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timed = 0.0
        self._ending: asyncio.TimerHandle | None = None
        self._receiving = asyncio.ensure_future(self._receive())

    def submit(self, item: Any, deadline: Deadline) -> asyncio.Future[Any]:
        """Sends an item: a future of its answer. Where there is no room in flight, the item is sent later.

        Raises CallCancelled on a closed stream, the error that ended the stream, and RuntimeError on another event loop
        than that of the client.
        """
        self._transport.check_loop()
        if self._error is not None:
            raise self._error
        if self._is_closing:
            raise errors.CallCancelled(f"the {self._title} is closed")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if not self._held_back and self._flying.has_room(item):
            self._flying.add(item, future, deadline)
            if deadline.at is not None and (self._timer is None or deadline.at < self._timed):
                self._set_timer()
            self._changed.set()
            return future
        waiting = (item, future, deadline)
        self._held_back.append(waiting)
        self.advance()
        if deadline.at is not None and deadline is not self._deadline and self._held_back[-1:] == [waiting]:
            loop.call_later(deadline.wait_s() or 0, self._expire_held_back, waiting)
        return future

    def adopt(self, item: Any, future: Future, deadline: Deadline) -> bool:
        """See `Stream.adopt`."""
        if self._is_over():
            return False
        self._flying.add(item, future, deadline)
        self.advance()
        return True

    @property
    def has_ended(self) -> bool:
        """See `Stream.has_ended`."""
        return self._is_over()

    def _expire_held_back(self, waiting: tuple[Any, asyncio.Future[Any], Deadline]) -> None:
        if waiting in self._held_back:
            self._held_back.remove(waiting)
            complete([Completed(waiting[1], None, waiting[2].exceeded())])
            self._end_soon()

    def advance(self) -> None:
        """Completes what is answered, sends what there is room for, and sets the timer."""
        complete(self._flying.completed())
        sent = 0
        for item, future, deadline in self._held_back:
            if not self._flying.has_room(item):
                break
            sent += 1
            if not future.done():
                self._flying.add(item, future, deadline)
        del self._held_back[:sent]
        self._set_timer()
        self._changed.set()
        self._end_soon()

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
        try:
            self._flying.advance()
        except errors.DeadlineExceeded as error:
            self._give_up(error)
        else:
            self.advance()

    def _end_soon(self) -> None:
        """Cancels the stream where every item is answered and the server does not end it."""
        if self._ending is None and self._is_over():
            self._ending = asyncio.get_running_loop().call_later(_END_S, self._receiving.cancel)

    def _is_over(self) -> bool:
        return self._error is not None or (self._is_closing and not len(self._flying) and not self._held_back)

    async def _requests(self, stream: int) -> AsyncIterator[bytes]:
        """See `Stream._requests`."""
        while self._stream == stream:
            if self._flying.has_message():
                yield self._flying.next_message()
                continue
            if self._is_over():
                return
            self._changed.clear()
            await self._changed.wait()

    async def _receive(self) -> None:
        backoff = Backoff(self._deadline)
        while True:
            while not len(self._flying) and not self._is_over():
                backoff.reset()
                self._changed.clear()
                await self._changed.wait()
            if self._is_over():
                return
            self._stream += 1
            self._flying.resend()
            error: Exception = errors.ServerUnavailable("the server ended the stream")
            try:
                messages = self._transport.stream(self._path, self._requests(self._stream), address=self._route.address)
                async for message in messages:
                    backoff.reset()
                    self._flying.take(message)
                    self.advance()
            except Exception as failure:
                error = failure
            self._stream += 1
            self._changed.set()
            if self._is_over():
                return
            try:
                pause_s = await self._recover(error, backoff)
            except Exception as failure:
                self._give_up(failure)
                return
            await asyncio.sleep(pause_s)

    async def _recover(self, error: Exception, backoff: Backoff) -> float:
        """See `Stream._recover`."""
        if self._transport.is_closed or not isinstance(error, errors.ForwardPassError):
            raise error
        self._route.failed(error)
        self._flying.broke(error)
        if isinstance(error, RETRYABLE):
            self._moves()
        else:
            steps = self._flying.recovery(error)
            if steps is None:
                raise error
            await self._transport.run(steps, self._deadline, self._route)
        return backoff.pause_s(error)

    def _give_up(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._flying.fail_all(error)
        complete(self._flying.completed())
        complete(Completed(future, None, error) for _, future, _ in self._held_back)
        self._held_back.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._changed.set()

    async def close(self) -> None:
        """Waits for every answer, and ends the stream. Cancelled, it fails every unanswered item."""
        self._transport.check_loop()
        self._is_closing = True
        self._changed.set()
        self._end_soon()
        try:
            # Not awaited itself: it may be cancelled here, or with the task that closes.
            await asyncio.wait([self._receiving])
        except asyncio.CancelledError:
            await self.leave()
            raise
        self._stop_timers()
        if not self._receiving.cancelled():
            self._receiving.result()

    async def leave(self) -> None:
        """Fails every unanswered item, and ends the stream."""
        self._give_up(_left(self._title))
        self._receiving.cancel()
        await asyncio.wait([self._receiving])
        self._stop_timers()

    def _stop_timers(self) -> None:
        for timer in (self._timer, self._ending):
            if timer is not None:
                timer.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
        else:
            await self.leave()


def _left(title: str) -> errors.CallCancelled:
    return errors.CallCancelled(f"an error ended the block of the {title} before this call was answered")
