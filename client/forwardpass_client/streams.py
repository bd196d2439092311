"""A stream that is opened again when it breaks, for threads and for asyncio; others say what travels over it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from forwardpass.wire import errors
from forwardpass_client.patience import AWAY, Patience
from forwardpass_client.transfers import Steps
from forwardpass_client.transport import AsyncTransport, Transport

# Each item's own deadline holds while the stream is being opened again.
_FIRST_PAUSE_S = 0.1


class Future(Protocol):
    """concurrent.futures.Future or asyncio.Future."""

    def done(self) -> bool: ...

    def set_result(self, result: Any, /) -> None: ...

    def set_exception(self, error: BaseException, /) -> None: ...


class Completed(NamedTuple):
    """A future, and what it is to be completed with."""

    future: Future
    result: Any
    error: BaseException | None


class InFlight(Protocol):
    """What is on its way over a stream, apart from the stream: sent, and not answered yet. For one thread at a time."""

    def __len__(self) -> int: ...

    def has_room(self, item: Any) -> bool:
        """Whether another item may be on its way."""

    def add(self, item: Any, future: Future, deadline: float | None) -> None:
        """Takes an item to be sent. deadline: by time.monotonic."""

    def has_message(self) -> bool:
        """Whether there is something to send."""

    def next_message(self) -> bytes:
        """The next message of the stream; there must be one."""

    def take(self, message: bytes) -> None:
        """Takes a response of the stream. Raises what is wrong with the stream."""

    def completed(self) -> list[Completed]:
        """What `complete` is to be told of, outside of any lock: a future's callbacks may do anything."""

    def next_event(self) -> float | None:
        """When `advance` has something to do next, by time.monotonic; None where it never will."""

    def advance(self) -> None:
        """Does what is due."""

    def resend(self) -> None:
        """Another stream has taken the place of one that broke: what is unanswered is to be sent again."""

    def broke(self, error: Exception) -> None:
        """The stream has ended with an error."""

    def recovery(self, error: Exception) -> Steps | None:
        """What to do after an error of the stream before it is opened again; None where it cannot be helped."""

    def fail_all(self, error: Exception) -> None:
        """Gives up all that is unanswered."""


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
            continue  # Cancelled between the question and the answer.


class Stream:
    """For threads, any number of which may call at once. title: what it is to its user, for messages."""

    def __init__(self, transport: Transport, path: str, flying: InFlight, title: str) -> None:
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
            # In the context of whoever opens it: a trace is one.
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(target,),
                name=f"forwardpass-{title}-{target.__name__}",
                daemon=True,
            )
            for target in (self._receive, self._keep_time)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, item: Any, timeout_s: float | None) -> concurrent.futures.Future[Any]:
        """Sends an item: a future of its answer. Where as much is on its way as may be, it waits."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        # A callback of a future must not wait for what its own thread alone can bring about.
        is_ours = threading.current_thread() in self._threads
        with self.changing():
            has_room = is_ours or self._changed.wait_for(
                lambda: self._error is not None or self._is_closing or self._flying.has_room(item), timeout_s
            )
            if self._error is not None:
                raise self._error
            if self._is_closing:
                raise errors.CallCancelled(f"the {self._title} is closed")
            if not has_room:
                raise errors.DeadlineExceeded("no other call ended in time to make room for this one")
            self._flying.add(item, future, deadline)
        return future

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Holds the lock; tells every thread of the change; completes futures afterwards, without the lock."""
        with self._changed:
            try:
                yield
            finally:
                completed = self._flying.completed()
                self._changed.notify_all()
        complete(completed)

    def _requests(self, stream: int) -> Iterator[bytes]:
        """The messages of one stream, until all is answered or another stream has taken its place."""
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
        patience = Patience(_FIRST_PAUSE_S)
        while True:
            with self._changed:
                # No stream before there is something to send. While nobody waits, no time is lost.
                if not len(self._flying):
                    patience.renew()
                self._changed.wait_for(lambda: len(self._flying) or self._is_over())
                if self._is_over():
                    return
                self._stream += 1
                stream = self._stream
                self._flying.resend()
            try:
                for message in self._transport.stream(self._path, self._requests(stream), opened=self._opened):
                    patience.renew()
                    with self.changing():
                        self._flying.take(message)
                with self._changed:
                    if self._is_over():
                        return
                error: Exception = errors.ServerUnavailable("the server ended the stream")
            except Exception as failure:
                error = failure
            try:
                pause_s = self._recover(error, patience)
            except Exception as failure:
                self._give_up(failure)
                return
            with self._changed:
                self._stream += 1
                if self._error is not None:
                    return
            time.sleep(pause_s)

    def _recover(self, error: Exception, patience: Patience) -> float:
        """Does what helps against an error of the stream: the pause before the next. Raises what cannot be helped."""
        if self._transport.is_closed:
            raise error
        with self._changed:
            self._flying.broke(error)
        if not isinstance(error, AWAY):
            steps = self._flying.recovery(error)
            if steps is None:
                raise error
            self._transport.run(steps, None)
        pause_s = patience.pause_s()
        if pause_s is None:
            raise error
        return pause_s

    def _give_up(self, error: Exception) -> None:
        with self.changing():
            self._stream += 1
            if self._error is None:
                self._error = error
                self._flying.fail_all(error)

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
                if completed or self._flying.has_message():
                    self._changed.notify_all()
            complete(completed)

    def close(self) -> None:
        """Waits for every answer, and ends the stream."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def leave(self) -> None:
        """Gives up what is unanswered, and ends the stream."""
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

    def __init__(self, transport: AsyncTransport, path: str, flying: InFlight, title: str) -> None:
        self._transport = transport
        self._path = path
        self._flying = flying
        self._title = title
        self._held_back: list[tuple[Any, asyncio.Future[Any], float | None]] = []
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._is_closing = False
        self._stream = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timed = 0.0
        self._receiving = asyncio.ensure_future(self._receive())

    def submit(self, item: Any, timeout_s: float | None) -> asyncio.Future[Any]:
        """Sends an item: a future of its answer. Where as much is on its way as may be, it is sent later."""
        self._transport.check_loop()
        if self._error is not None:
            raise self._error
        if self._is_closing:
            raise errors.CallCancelled(f"the {self._title} is closed")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._held_back and self._flying.has_room(item):
            self._flying.add(item, future, deadline)
            if deadline is not None and (self._timer is None or deadline < self._timed):
                self._set_timer()
            self._changed.set()
            return future
        waiting = (item, future, deadline)
        self._held_back.append(waiting)
        self.advance()
        if timeout_s is not None and self._held_back and self._held_back[-1] is waiting:
            loop.call_later(timeout_s, complete, [Completed(future, None, errors.DeadlineExceeded())])
        return future

    def advance(self) -> None:
        """Completes what is answered, sends what there is room for, and sets the clock."""
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
        self.advance()

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
        patience = Patience(_FIRST_PAUSE_S)
        while True:
            while not len(self._flying) and not self._is_over():
                patience.renew()
                self._changed.clear()
                await self._changed.wait()
            if self._is_over():
                return
            self._stream += 1
            self._flying.resend()
            error: Exception = errors.ServerUnavailable("the server ended the stream")
            try:
                async for message in self._transport.stream(self._path, self._requests(self._stream)):
                    patience.renew()
                    self._flying.take(message)
                    self.advance()
                if self._is_over():
                    return
            except Exception as failure:
                error = failure
            self._stream += 1
            self._changed.set()
            try:
                pause_s = await self._recover(error, patience)
            except Exception as failure:
                self._give_up(failure)
                return
            await asyncio.sleep(pause_s)

    async def _recover(self, error: Exception, patience: Patience) -> float:
        """See `Stream._recover`."""
        if self._transport.is_closed:
            raise error
        self._flying.broke(error)
        if not isinstance(error, AWAY):
            steps = self._flying.recovery(error)
            if steps is None:
                raise error
            await self._transport.run(steps, None)
        pause_s = patience.pause_s()
        if pause_s is None:
            raise error
        return pause_s

    def _give_up(self, error: Exception) -> None:
        self._error = error
        self._flying.fail_all(error)
        complete(self._flying.completed())
        complete(Completed(future, None, error) for _, future, _ in self._held_back)
        self._held_back.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._changed.set()

    async def close(self) -> None:
        """Waits for every answer, and ends the stream. Cancelled, it gives up what is unanswered."""
        self._transport.check_loop()
        self._is_closing = True
        self._changed.set()
        try:
            await asyncio.shield(self._receiving)
        except asyncio.CancelledError:
            await self.leave()
            raise
        if self._timer is not None:
            self._timer.cancel()

    async def leave(self) -> None:
        """Gives up what is unanswered, and ends the stream."""
        self._give_up(_left(self._title))
        self._receiving.cancel()
        await asyncio.wait([self._receiving])

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
    return errors.CallCancelled(f"the {title} was left before this call was answered")
