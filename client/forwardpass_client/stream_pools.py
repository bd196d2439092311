"""Many trainings over few streams: for threads, and for asyncio."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextvars
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from forwardpass.wire import errors
from forwardpass_client.item_errors import naming
from forwardpass_client.training import AsyncTrainingStream, TrainingProgress, TrainingStream, abandoning
from forwardpass_client.updates_in_flight import Answer

StreamT = TypeVar("StreamT", TrainingStream, AsyncTrainingStream)
ResultT = TypeVar("ResultT", concurrent.futures.Future[Answer], "asyncio.Task[Answer]")

MAX_STREAMS = 64
"""The most streams of one pool."""


class _Pool(Generic[StreamT, ResultT]):
    """What both pools keep: streams, results in the order of the trainings, and the number of trainings.

    count: how many trainings were submitted.
    """

    def __init__(self, open_stream: Callable[[], StreamT], max_streams: int, progress: TrainingProgress | None) -> None:
        self._open_stream: Callable[[], StreamT] = open_stream
        self._max_streams = max_streams
        self._progress = progress
        self._results: collections.deque[ResultT] = collections.deque()
        self._streams: list[StreamT] = []
        self._free: list[StreamT] = []
        self._ended = 0
        self.count = 0

    @property
    def is_full(self) -> bool:
        """Whether a result must be read before another training is submitted."""
        return len(self._results) >= 2 * self._max_streams

    @property
    def has_results(self) -> bool:
        """Whether there are results to be read."""
        return bool(self._results)

    def _free_stream(self) -> StreamT:
        """Takes a free stream, or opens another one."""
        if not self._free:
            self._free.append(self._open_stream())
            self._streams += self._free
        return self._free.pop()

    def _note_end(self) -> None:
        """Counts a training that has ended, and reports the progress."""
        self._ended += 1
        if self._progress is not None:
            self._progress(self._ended)

    def _running(self) -> list[ResultT]:
        return [result for result in self._results if not result.done()]

    def _raise_first_error(self) -> None:
        """Raises the error of the first training that has failed, if one has."""
        for result in self._results:
            if result.done():
                result.result()


class StreamPool(_Pool[TrainingStream, concurrent.futures.Future[Answer]]):
    """Runs trainings on threads, each over a stream that is free. Results come in the order of the trainings.

    A context manager: leaving it after an error, or before all results were read, ends all trainings.
    open_stream: opens another stream. max_streams: how many there are at most.
    progress: called with the number of trainings that have ended, one call after the other.
    """

    def __init__(
        self, open_stream: Callable[[], TrainingStream], max_streams: int, progress: TrainingProgress | None
    ) -> None:
        super().__init__(open_stream, max_streams, progress)
        self._threads = concurrent.futures.ThreadPoolExecutor(max_streams, "forwardpass-training")
        self._changing = threading.Lock()
        self._is_closed = False
        # A lock of its own, so that a slow callback does not block other trainings, which need `_changing`.
        self._telling = threading.Lock()

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
                raise errors.CallCancelled("another training has failed, or the caller has stopped reading results")
            stream = self._free_stream()
        with naming(f"clients[{number}]"):
            answer = run(stream, batches, weights)
        with self._changing:
            self._free.append(stream)
        with self._telling:
            self._note_end()
        return answer

    def next_result(self) -> Answer:
        """The result of the next training, in order. Raises the first error of any training."""
        while not self._results[0].done():
            concurrent.futures.wait(self._running(), return_when=concurrent.futures.FIRST_COMPLETED)
            self._raise_first_error()
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


class AsyncStreamPool(_Pool[AsyncTrainingStream, "asyncio.Task[Answer]"]):
    """`StreamPool` for asyncio: trainings are tasks."""

    def __init__(
        self, open_stream: Callable[[], AsyncTrainingStream], max_streams: int, progress: TrainingProgress | None
    ) -> None:
        super().__init__(open_stream, max_streams, progress)
        self._places = asyncio.Semaphore(max_streams)

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
            stream = self._free_stream()
            with naming(f"clients[{number}]"):
                answer = await run(stream, batches, weights)
            self._free.append(stream)
            self._note_end()
            return answer

    async def next_result(self) -> Answer:
        """The result of the next training, in order. Raises the first error of any training."""
        while not self._results[0].done():
            await asyncio.wait(self._running(), return_when=asyncio.FIRST_COMPLETED)
            self._raise_first_error()
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
