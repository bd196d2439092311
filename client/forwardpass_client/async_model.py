"""A functional model on a server, for asyncio."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import secrets
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Coroutine,
    Iterable,
    Sequence,
)
from typing import TYPE_CHECKING, Any, cast, overload

from forwardpass.wire import errors
from forwardpass.wire.description import BatchOutput
from forwardpass_client import batches_in_flight
from forwardpass_client.batches_in_flight import BatchesInFlight, BatchProgress
from forwardpass_client.call import Call
from forwardpass_client.calls import (
    FoundModel,
    Metrics,
    ModelWeights,
    ResultT,
    allows_rounding,
)
from forwardpass_client.calls_in_flight import MAX_CALLS
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.item_errors import naming
from forwardpass_client.metrics_sessions import ID_BYTES, AsyncMetricsSession, MetricsSessionApi
from forwardpass_client.model_api import EACH_CALL, FunctionalModelApi, closing_deadline
from forwardpass_client.openings import Opening
from forwardpass_client.options import Options
from forwardpass_client.pipeline import AsyncMultiWeightsPipeline, AsyncPipeline
from forwardpass_client.routes import STICKY, Route
from forwardpass_client.stream_pools import AsyncStreamPool
from forwardpass_client.streams import AsyncStream
from forwardpass_client.training import AsyncTrainingStream, TrainingProgress, abandoning
from forwardpass_client.training_batches import BatchSource, each
from forwardpass_client.training_calls import TrainingResult
from forwardpass_client.transfers import Progress, Steps
from forwardpass_client.transport import AsyncTransport
from forwardpass_client.updates_in_flight import Answer
from forwardpass_client.weights_handles import AsyncWeightsHandle, WeightsHandleApi


async def _in_order(futures: AsyncIterator[asyncio.Future[Any]]) -> AsyncGenerator[asyncio.Future[Any], None]:
    """Yields futures in their order, each as soon as it is done, and reads at most 256 ahead."""
    waiting: collections.deque[asyncio.Future[Any]] = collections.deque()
    with abandoning(waiting):
        async for future in futures:
            waiting.append(future)
            while waiting and (len(waiting) >= MAX_CALLS or waiting[0].done()):
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


class AsyncRemoteFunctionalModel(FunctionalModelApi):
    """`RemoteFunctionalModel` for asyncio: the same methods, whose results are to be awaited.

    Errors about arguments are raised by the call itself, before anything is awaited. The timeout of a call counts from
    the moment at which it is awaited. `weights_handle` needs no await.
    """

    def __init__(self, transport: AsyncTransport, found: FoundModel, options: Options) -> None:
        super().__init__(found, options)
        self._transport = transport
        self._initial_weights: ModelWeights | None = None

    if TYPE_CHECKING:

        def forward_pass(
            self,
            model_weights: Any,
            batch_input: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> Coroutine[Any, Any, BatchOutput]: ...

        def predict_on_batch(
            self,
            model_weights: Any,
            x: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> Coroutine[Any, Any, Any]: ...

        def forward_backward(
            self,
            model_weights: Any,
            batch_input: Any,
            training: bool = True,
            *,
            sample_weight: Any = None,
            keep: bool = False,
            timeout_s: float | None = None,
        ) -> Coroutine[Any, Any, tuple[BatchOutput, Any]]: ...

        def vjp(
            self, model_weights: Any, x: Any, cotangents: Any, training: bool = True, *, timeout_s: float | None = None
        ) -> Coroutine[Any, Any, tuple[Any, Any]]: ...

        def loss(
            self,
            output: Any,
            label: Any,
            sample_weight: Any = None,
            *,
            mask: Any = None,
            timeout_s: float | None = None,
        ) -> Coroutine[Any, Any, Any]: ...

        def initialize_metrics_state(self, *, timeout_s: float | None = None) -> Coroutine[Any, Any, Any]: ...

        def update_metrics_state(
            self,
            state: Any,
            labels: Any,
            batch_output: Any,
            sample_weight: Any = None,
            *,
            mask: Any = None,
            timeout_s: float | None = None,
        ) -> Coroutine[Any, Any, Any]: ...

        def finalize_metrics(self, state: Any, *, timeout_s: float | None = None) -> Coroutine[Any, Any, Metrics]: ...

        def put_weights(
            self, model_weights: Any, *, progress: Progress | None = None, timeout_s: float | None = None
        ) -> Coroutine[Any, Any, AsyncWeightsHandle]: ...

        def weights_handle(self, weights_id: str) -> AsyncWeightsHandle: ...

        def get_weights(
            self, handle: WeightsHandleApi, *, progress: Progress | None = None, timeout_s: float | None = None
        ) -> Coroutine[Any, Any, ModelWeights]: ...

        def average(
            self, results: Iterable[Any], *, timeout_s: float | None = None
        ) -> Coroutine[Any, Any, AsyncWeightsHandle]: ...

    @property
    async def initial_weights(self) -> ModelWeights:
        """(trainable, non_trainable) that the model was saved with: read-only arrays, fetched once.

        Raises ModelChanged, ServerUnavailable, DeadlineExceeded after the client's timeout.
        """
        weights = self._initial_weights
        if weights is None:
            weights = await self._run(self._calls.initial_weights(), self._deadline())
            self._initial_weights = weights
        return weights

    def _run(self, call: Call[ResultT], deadline: Deadline) -> Coroutine[Any, Any, ResultT]:
        # Joined now: its arrays may be changed before it is awaited.
        return self._run_joined(call.joined(), deadline)

    async def _run_joined(self, call: Call[ResultT], deadline: Deadline) -> ResultT:
        deadline.restart()
        return await self._transport.ask(call, deadline)

    @overload
    def pipeline(self) -> Opening[AsyncMultiWeightsPipeline]: ...

    @overload
    def pipeline(self, model_weights: Any) -> Opening[AsyncPipeline]: ...

    def pipeline(self, model_weights: Any = EACH_CALL) -> Opening[AsyncPipeline] | Opening[AsyncMultiWeightsPipeline]:
        """Calls over one stream: each returns a future, and many are in flight at once.

        model_weights: of all calls: a handle of `put_weights`, or (trainable, non_trainable) in the shapes of
          `initial_weights`, which is put first. Without it, each call names its weights:
          `pipeline.predict_on_batch(handle, x)`.
        Returns an asynchronous context manager, `async with model.pipeline(weights) as pipeline`: leaving it waits for
        every answer. It may be awaited, too, for the pipeline itself.
        Raises what `put_weights` raises.
        """
        deadline = self._deadline(is_renewable=True)
        if model_weights is EACH_CALL:
            return Opening(self._open_multi_weights_pipeline())
        return Opening(self._open_pipeline(model_weights, deadline))

    async def _open_pipeline(self, model_weights: Any, deadline: Deadline) -> AsyncPipeline:
        deadline.restart()
        handle = await self._put_at_start(model_weights, deadline)
        return AsyncPipeline(self._transport, self._calls, handle, self._timeout_s, self._options.max_message_bytes)

    async def _open_multi_weights_pipeline(self) -> AsyncMultiWeightsPipeline:
        return AsyncMultiWeightsPipeline(self._transport, self._calls, self._timeout_s, self._options.max_message_bytes)

    async def predict_many(
        self,
        model_weights: Any,
        batches: Iterable[Any] | AsyncIterable[Any],
        training: bool = True,
        *,
        exact: bool = True,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Any]:
        """Yields the predictions for each batch, in order, with many batches in flight at once.

        model_weights: a handle of `put_weights`, or (trainable, non_trainable), which is put first.
        batches: an iterable of x like x of `input_spec` (no labels), leaves of shape [B, ...]; an asynchronous iterable
          too. It is read as answers come.
        training: whether layers such as dropout act as in training.
        exact: as of `forward_pass`.
        timeout_s: seconds until DeadlineExceeded for each batch; None for the client's own.
        Yields predictions, leaves of shape [B, ...]. Raises what `put_weights` and `predict_on_batch` raise.
        """
        async with self.pipeline(model_weights) as pipeline:

            async def sent() -> AsyncIterator[asyncio.Future[Any]]:
                async for x in each(batches):
                    yield pipeline.predict_on_batch(x, training, exact=exact, timeout_s=timeout_s)

            async with contextlib.aclosing(_in_order(sent())) as futures:
                async for future in futures:
                    yield await future

    async def predict_each(
        self,
        pairs: Iterable[tuple[Any, Any]] | AsyncIterable[tuple[Any, Any]],
        training: bool = True,
        *,
        exact: bool = True,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Any]:
        """Yields the predictions for each of many pairs of weights and a batch, in order, with many in flight at once.

        For models whose weights differ from user to user: the calls share one stream, and the server may compute calls
        of different weights together.
        pairs: an iterable of tuples (weights, x); an asynchronous iterable too. weights: a handle of `put_weights`, or
          (trainable, non_trainable), which is sent with the call. x: like x of `input_spec`, leaves of shape [B, ...];
          B may differ from pair to pair. The iterable is read as answers come.
        training: whether layers such as dropout act as in training.
        exact: as of `forward_pass`.
        timeout_s: seconds until DeadlineExceeded for each pair; None for the client's own.
        Yields predictions, leaves of shape [B, ...]. Raises what `predict_on_batch` raises, after the predictions for
        the pairs before. The message and the place of the error name the pair: `pairs[3].x`. Raises TypeError for an
        item that is no such pair.
        """
        async with self.pipeline() as pipeline:

            async def sent() -> AsyncIterator[asyncio.Future[Any]]:
                number = 0
                async for pair in each(pairs):
                    try:
                        weights, x = self._pair(number, pair)
                        future = pipeline.predict_on_batch(weights, x, training, exact=exact, timeout_s=timeout_s)
                    except Exception as error:
                        # Raised in its turn, after the results of the pairs before.
                        future = asyncio.get_running_loop().create_future()
                        future.set_exception(error)
                        yield future
                        return
                    yield future
                    number += 1

            number = 0
            async with contextlib.aclosing(_in_order(sent())) as futures:
                async for future in futures:
                    with naming(f"pairs[{number}]"):
                        result = await future
                    yield result
                    number += 1

    def metrics_session(
        self, session_id: str | None = None, *, initial_state: Any = None, timeout_s: float | None = None
    ) -> Opening[AsyncMetricsSession]:
        return Opening(super().metrics_session(session_id, initial_state=initial_state, timeout_s=timeout_s))

    @property
    def _session_type(self) -> type[AsyncMetricsSession]:
        return AsyncMetricsSession

    def _session(self, session_id: bytes, route: Route = STICKY) -> AsyncMetricsSession:
        return AsyncMetricsSession(self._calls, session_id, self._timeout_s, self._transport, route)

    async def evaluate(
        self,
        model_weights: Any,
        batches: Iterable[Any] | AsyncIterable[Any],
        *,
        training: bool = False,
        exact: bool = True,
        session: MetricsSessionApi | None = None,
        progress: BatchProgress | None = None,
        timeout_s: float | None = None,
    ) -> Metrics:
        sessions = None if session is None else [session]
        (metrics,) = await self.evaluate_many(
            [model_weights],
            batches,
            training=training,
            exact=exact,
            sessions=sessions,
            progress=progress,
            timeout_s=timeout_s,
        )
        return metrics

    async def evaluate_many(
        self,
        model_weights: Sequence[Any],
        batches: Iterable[Any] | AsyncIterable[Any],
        *,
        training: bool = False,
        exact: bool = True,
        sessions: Sequence[MetricsSessionApi] | None = None,
        progress: BatchProgress | None = None,
        timeout_s: float | None = None,
    ) -> list[Metrics]:
        deadline = self._deadline(timeout_s, is_renewable=True)
        training = self._check_many(model_weights, sessions, training)
        rounds = allows_rounding(exact)
        # Nothing is sent yet.
        handles = [
            one if isinstance(one, WeightsHandleApi) else self._handle(self._calls.hold(one)) for one in model_weights
        ]
        putting = [not isinstance(one, WeightsHandleApi) for one in model_weights]
        if sessions is not None:
            return await self._evaluate(sessions, handles, putting, batches, training, rounds, progress, deadline)
        own: list[AsyncMetricsSession] = []
        failure: BaseException | None = None
        try:
            # All at the replica that has the first weights.
            route = self._transport.route(handles[0].held) if handles else STICKY
            for _ in handles:
                # One by one: those that were opened before one is refused are closed.
                session = self._session(secrets.token_bytes(ID_BYTES), route)
                own.append(await session.open(False, None, self._deadline(deadline.part_s())))
            return await self._evaluate(own, handles, putting, batches, training, rounds, progress, deadline)
        except BaseException as error:
            failure = error
            raise
        finally:
            with contextlib.suppress(errors.ForwardPassError):
                closing = closing_deadline(deadline, failure)
                for session in own:
                    await session.close(timeout_s=closing.remaining_s())

    async def _evaluate(
        self,
        sessions: Sequence[MetricsSessionApi],
        handles: Sequence[WeightsHandleApi],
        putting: Sequence[bool],
        batches: Iterable[Any] | AsyncIterable[Any],
        training: bool,
        rounds: bool,
        progress: BatchProgress | None,
        deadline: Deadline,
    ) -> list[Metrics]:
        """See `RemoteFunctionalModel._evaluate`."""
        for handle, must_put in zip(handles, putting, strict=True):
            if must_put:
                await self._put(handle.held, None, self._deadline(deadline.part_s(), is_renewable=True))
        pairs = list(zip(sessions, handles, strict=True))
        if not pairs:
            return []
        deadline.renew()
        flying = BatchesInFlight(self._calls, pairs, training, rounds, progress, deadline)
        async with AsyncStream(
            self._transport, batches_in_flight.PATH, flying, batches_in_flight.TITLE, deadline, sessions[0].route
        ) as stream:
            futures: collections.deque[asyncio.Future[Any]] = collections.deque()
            with abandoning(futures):
                async for batch in each(batches):
                    futures.append(stream.submit(batches_in_flight.encode(self._calls, batch), deadline))
                    while len(futures) >= batches_in_flight.MAX_BATCHES or (futures and futures[0].done()):
                        await futures.popleft()
                while futures:
                    await futures.popleft()
        return [await session.result(timeout_s=deadline.part_s()) for session in sessions]

    async def train(
        self,
        model_weights: Any,
        batches: Any,
        *,
        optimizer: Any = "sgd",
        learning_rate: float | None = None,
        epochs: int = 1,
        proximal: float = 0.0,
        trainable: Any = None,
        checkpoint_steps: int | None = None,
        optimizer_state: WeightsHandleApi | None = None,
        keep_optimizer_state: bool = False,
        progress: TrainingProgress | None = None,
        timeout_s: float | None = None,
    ) -> TrainingResult:
        deadline = self._deadline(timeout_s, is_renewable=True)
        source = BatchSource(batches, epochs, is_async=True)
        options = self._calls.update_options(
            optimizer=optimizer,
            learning_rate=learning_rate,
            proximal=proximal,
            trainable=trainable,
            checkpoint_steps=checkpoint_steps,
            optimizer_state=optimizer_state,
            keep_optimizer_state=keep_optimizer_state,
        )
        handle = await self._put_at_start(model_weights, deadline)
        training = AsyncTrainingStream(self._transport, self._calls, deadline, self._transport.route(handle.held))
        async with training.stream:
            answer = await training.run(options, handle.held, source, progress)
        return self._answered(answer)

    async def train_many(
        self,
        clients: Iterable[tuple[Any, Any]] | AsyncIterable[tuple[Any, Any]],
        *,
        weights: Any = None,
        optimizer: Any = "sgd",
        learning_rate: float | None = None,
        epochs: int = 1,
        proximal: float = 0.0,
        trainable: Any = None,
        checkpoint_steps: int | None = None,
        max_streams: int = 4,
        progress: TrainingProgress | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[TrainingResult]:
        deadline = self._deadline(timeout_s, is_renewable=True)
        options = self._many_options(
            max_streams,
            optimizer=optimizer,
            learning_rate=learning_rate,
            proximal=proximal,
            trainable=trainable,
            checkpoint_steps=checkpoint_steps,
        )
        default = None if weights is None else await self._put_at_start(weights, deadline)

        async def run(training: AsyncTrainingStream, batches: Any, own: Any) -> Answer:
            handle = await self._put_at_start(own, deadline)
            return await training.run(options, handle.held, BatchSource(batches, epochs, is_async=True), None)

        def open_stream() -> AsyncTrainingStream:
            own = Deadline(self._timeout_s, is_renewable=True) if deadline.is_renewable else deadline
            return AsyncTrainingStream(self._transport, self._calls, own, self._transport.route(None))

        async with AsyncStreamPool(open_stream, max_streams, progress) as pool:
            async for client in each(clients):
                pool.submit(run, *self._client(pool.count, client, default))
                while pool.is_full:
                    yield self._answered(await pool.next_result())
            while pool.has_results:
                yield self._answered(await pool.next_result())

    async def _put_at_start(self, model_weights: Any, deadline: Deadline) -> AsyncWeightsHandle:
        """See `RemoteFunctionalModel._put_at_start`."""
        if isinstance(model_weights, WeightsHandleApi):
            return cast(AsyncWeightsHandle, model_weights)
        return await self.put_weights(model_weights, timeout_s=deadline.part_s())

    async def _run_steps(self, steps: Steps, held: HeldWeights, deadline: Deadline) -> Any:
        deadline.restart()
        return await self._transport.run(steps, deadline, self._transport.route(held))

    def _handle(self, held: HeldWeights) -> AsyncWeightsHandle:
        return AsyncWeightsHandle(held, self._transport, self._timeout_s)

    async def _put(self, held: HeldWeights, progress: Progress | None, deadline: Deadline) -> AsyncWeightsHandle:
        deadline.restart()
        await self._transport.run(held.put(deadline, progress), deadline, self._transport.route(held))
        return self._handle(held)
