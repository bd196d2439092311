"""Many trainings over few streams: for threads, and for asyncio."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import contextvars
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any

from forwardpass.wire import errors
from forwardpass_client.training import AsyncTrainingStream, TrainingProgress, TrainingStream, abandoning
from forwardpass_client.updates_in_flight import Answer

MAX_STREAMS = 64
"""The most streams of one pool."""


@contextlib.contextmanager
def _naming(number: int) -> Iterator[None]:
    """Adds the client to the message and to the place of an error. number: of the client, from 0."""
    try:
        yield
    except errors.ForwardPassError as error:
        client = f"clients[{number}]"
        error.args = (f"{client}: {error}",)
        error.place = f"{client}.{error.place}" if error.place else client
        raise


class StreamPool:
    """Runs trainings on threads, each over a stream that is free. Results come in the order of the trainings.

    A context manager: leaving it after an error, or before all results were read, ends all trainings.
    open_stream: opens another stream. max_streams: how many there are at most.
    progress: called with the number of trainings that have ended, one call after the other.
    """

    def __init__(
        self, open_stream: Callable[[], TrainingStream], max_streams: int, progress: TrainingProgress | None
    ) -> None:
        self._open_stream = open_stream
        self._max_streams = max_streams
        self._threads = concurrent.futures.ThreadPoolExecutor(max_streams, "forwardpass-training")
        self._results: collections.deque[concurrent.futures.Future[Answer]] = collections.deque()
        self._streams: list[TrainingStream] = []
        self._free: list[TrainingStream] = []
        self._changing = threading.Lock()
        self._is_closed = False
        self._progress = progress
        self._ended = 0
        # Apart from `_changing`: a callback that takes long must not keep other trainings from their streams.
        self._telling = threading.Lock()
        # How many trainings were submitted.
        self.count = 0

    def submit(self, run: Callable[[TrainingStream, Any, Any], Answer], batches: Any, weights: Any) -> None:
        """Runs run(stream, batches, weights) when a thread is free."""
        context = contextvars.copy_context()
        self._results.append(self._threads.submit(context.run, self._run, self.count, run, batches, weights))
        self.count += 1

    def _run(
        self, number: int, run: Callable[[TrainingStream, Any, Any], Answer], batches: Any, weights: Any
    ) -> Answer:
        with self._changing:
            if self._is_closed:
                raise errors.CallCancelled("another training has failed, or the results are not read any more")
            if not self._free:
                self._free.append(self._open_stream())
                self._streams += self._free
            stream = self._free.pop()
        with _naming(number):
            answer = run(stream, batches, weights)
        with self._changing:
            self._free.append(stream)
        with self._telling:
            self._ended += 1
            if self._progress is not None:
                self._progress(self._ended)
        return answer

    @property
    def is_full(self) -> bool:
        """Whether a result must be read before another training is submitted."""
        return len(self._results) >= 2 * self._max_streams

    @property
    def has_results(self) -> bool:
        """Whether there are results to be read."""
        return bool(self._results)

    def next_result(self) -> Answer:
        """The result of the next training, in order. Raises the first error of any training."""
        while not self._results[0].done():
            concurrent.futures.wait(
                [result for result in self._results if not result.done()],
                return_when=concurrent.futures.FIRST_COMPLETED,
            )
            for result in self._results:
                if result.done():
                    result.result()
        return self._results.popleft().result()

    def __enter__(self) -> StreamPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changing:
            self._is_closed = True
        for result in self._results:
            result.cancel()
        for stream in self._streams:
            if error is None and not self._results:
                stream.stream.close()
            else:
                stream.stream.leave()
        self._threads.shutdown()


class AsyncStreamPool:
    """`StreamPool` for asyncio: trainings are tasks."""

    def __init__(
        self, open_stream: Callable[[], AsyncTrainingStream], max_streams: int, progress: TrainingProgress | None
    ) -> None:
        self._open_stream = open_stream
        self._max_streams = max_streams
        self._places = asyncio.Semaphore(max_streams)
        self._progress = progress
        self._ended = 0
        self._results: collections.deque[asyncio.Task[Answer]] = collections.deque()
        self._streams: list[AsyncTrainingStream] = []
        self._free: list[AsyncTrainingStream] = []
        # How many trainings were submitted.
        self.count = 0

    def submit(
        self, run: Callable[[AsyncTrainingStream, Any, Any], Awaitable[Answer]], batches: Any, weights: Any
    ) -> None:
        """Runs run(stream, batches, weights) when a stream is free."""
        self._results.append(asyncio.ensure_future(self._run(self.count, run, batches, weights)))
        self.count += 1

    async def _run(
        self, number: int, run: Callable[[AsyncTrainingStream, Any, Any], Awaitable[Answer]], batches: Any, weights: Any
    ) -> Answer:
        async with self._places:
            if not self._free:
                self._free.append(self._open_stream())
                self._streams += self._free
            stream = self._free.pop()
            with _naming(number):
                answer = await run(stream, batches, weights)
            self._free.append(stream)
            self._ended += 1
            if self._progress is not None:
                self._progress(self._ended)
            return answer

    @property
    def is_full(self) -> bool:
        """Whether a result must be read before another training is submitted."""
        return len(self._results) >= 2 * self._max_streams

    @property
    def has_results(self) -> bool:
        """Whether there are results to be read."""
        return bool(self._results)

    async def next_result(self) -> Answer:
        """The result of the next training, in order. Raises the first error of any training."""
        while not self._results[0].done():
            await asyncio.wait(
                [result for result in self._results if not result.done()], return_when=asyncio.FIRST_COMPLETED
            )
            for result in self._results:
                if result.done():
                    result.result()
        return self._results.popleft().result()

    async def __aenter__(self) -> AsyncStreamPool:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_over = error is None and not self._results
        with abandoning(self._results):
            for result in self._results:
                result.cancel()
            await asyncio.gather(*self._results, return_exceptions=True)
        for stream in self._streams:
            await (stream.stream.close() if is_over else stream.stream.leave())
