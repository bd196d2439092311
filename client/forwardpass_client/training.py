"""Trainings over streams: for threads, and for asyncio."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.routes import Route
from forwardpass_client.streams import AsyncStream, Stream
from forwardpass_client.training_batches import BatchSource
from forwardpass_client.training_calls import TrainingCalls, UpdateOptions, is_weighted
from forwardpass_client.transport import AsyncTransport, Transport
from forwardpass_client.updates_in_flight import (
    MAX_BATCHES,
    PATH,
    TITLE,
    Answer,
    Batch,
    Begin,
    Finish,
    Rewound,
    UpdatesInFlight,
)

TrainingProgress = Callable[[int], None]
"""Is called with the number of batches that an update was trained on, possibly from another thread. After a break the
number may be lower than before."""


class TrainingStream:
    """A stream of client updates, one after another. A context manager. For one thread at a time.

    deadline: of all its updates; see `UpdatesInFlight`. route: of the stream.
    """

    def __init__(self, transport: Transport, calls: TrainingCalls, deadline: Deadline, route: Route) -> None:
        self._calls = calls
        self._deadline = deadline
        self._flying = UpdatesInFlight(calls, deadline)
        self.stream = Stream(transport, PATH, self._flying, TITLE, deadline, route)

    def run(
        self, options: UpdateOptions, weights: HeldWeights, source: BatchSource, progress: TrainingProgress | None
    ) -> Answer:
        """Runs one update. weights: those at the start."""
        stream, deadline = self.stream, self._deadline
        batches = source.read()
        first = list(itertools.islice(batches, 1))
        weighted = bool(first) and is_weighted(first[0])
        stream.submit(Begin(options, weights, weighted, source.is_repeatable, progress), deadline)
        batches = itertools.chain(first, batches)
        attempt, _ = self._flying.place
        while True:
            futures: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
            try:
                for batch in batches:
                    item = Batch(attempt, self._calls.training_batch(batch, weighted))
                    futures.append(stream.submit(item, deadline))
                    while futures and futures[0].done():
                        futures.popleft().result()
                futures.append(stream.submit(Finish(attempt), deadline))
                while len(futures) > 1:
                    futures.popleft().result()
                answer: Answer = futures.popleft().result()
            except Rewound:
                attempt, position = self._flying.place
                batches = source.read(position)
            else:
                return answer


class AsyncTrainingStream:
    """`TrainingStream` for asyncio."""

    def __init__(self, transport: AsyncTransport, calls: TrainingCalls, deadline: Deadline, route: Route) -> None:
        self._calls = calls
        self._deadline = deadline
        self._flying = UpdatesInFlight(calls, deadline)
        self.stream = AsyncStream(transport, PATH, self._flying, TITLE, deadline, route)

    async def run(
        self, options: UpdateOptions, weights: HeldWeights, source: BatchSource, progress: TrainingProgress | None
    ) -> Answer:
        """See `TrainingStream.run`."""
        stream, deadline = self.stream, self._deadline
        batches = source.read_async()
        first = [batch async for batch in _first(batches)]
        weighted = bool(first) and is_weighted(first[0])
        await stream.submit(Begin(options, weights, weighted, source.is_repeatable, progress), deadline)
        attempt, _ = self._flying.place
        while True:
            futures: collections.deque[asyncio.Future[Any]] = collections.deque()
            with abandoning(futures):
                try:
                    async for batch in _chained(first, batches):
                        item = Batch(attempt, self._calls.training_batch(batch, weighted))
                        futures.append(stream.submit(item, deadline))
                        while len(futures) >= MAX_BATCHES or (futures and futures[0].done()):
                            await futures.popleft()
                    futures.append(stream.submit(Finish(attempt), deadline))
                    while len(futures) > 1:
                        await futures.popleft()
                    answer: Answer = await futures.popleft()
                except Rewound:
                    attempt, position = self._flying.place
                    first, batches = [], source.read_async(position)
                else:
                    return answer


async def _first(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for item in items:
        yield item
        return


async def _chained(first: Iterable[Any], items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    for item in first:
        yield item
    async for item in items:
        yield item


@contextlib.contextmanager
def abandoning(futures: Iterable[asyncio.Future[Any]]) -> Iterator[None]:
    """At the end, futures that are left have no reader: asyncio must not log their errors."""
    try:
        yield
    finally:
        for future in futures:
            if not future.cancel() and not future.cancelled():
                future.exception()
