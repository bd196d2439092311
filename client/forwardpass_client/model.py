"""A functional model on a server, for threads."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import secrets
import threading
from collections.abc import (
    Iterable,
    Iterator,
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
from forwardpass_client.deadlines import Deadline, locked
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.item_errors import naming
from forwardpass_client.metrics_sessions import ID_BYTES, MetricsSession, MetricsSessionApi
from forwardpass_client.model_api import EACH_CALL, FunctionalModelApi, closing_deadline
from forwardpass_client.options import Options
from forwardpass_client.pipeline import MultiWeightsPipeline, Pipeline
from forwardpass_client.routes import STICKY, Route
from forwardpass_client.stream_pools import StreamPool
from forwardpass_client.streams import Stream
from forwardpass_client.training import TrainingProgress, TrainingStream
from forwardpass_client.training_batches import BatchSource
from forwardpass_client.training_calls import TrainingResult, UpdateOptions
from forwardpass_client.transfers import Progress, Steps
from forwardpass_client.transport import Transport
from forwardpass_client.updates_in_flight import Answer
from forwardpass_client.weights_handles import WeightsHandle, WeightsHandleApi


def _in_order(
    futures: Iterable[concurrent.futures.Future[Any]],
) -> Iterator[concurrent.futures.Future[Any]]:
    """Yields futures in their order, each as soon as it is done, and reads at most 256 ahead."""
    waiting: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
    for future in futures:
        waiting.append(future)
        while waiting and (len(waiting) >= MAX_CALLS or waiting[0].done()):
            yield waiting.popleft()
    yield from waiting


class RemoteFunctionalModel(FunctionalModelApi):
    """A functional model on a server, called as if it were local. Any number of threads may call at once."""

    def __init__(self, transport: Transport, found: FoundModel, options: Options) -> None:
        super().__init__(found, options)
        self._transport = transport
        self._initial_weights: ModelWeights | None = None
        self._fetching = threading.Lock()

    if TYPE_CHECKING:

        def forward_pass(
            self,
            model_weights: Any,
            batch_input: Any,
            training: bool = True,
            *,
            exact: bool = True,
            timeout_s: float | None = None,
        ) -> BatchOutput: ...

        def forward_backward(
            self,
            model_weights: Any,
            batch_input: Any,
            training: bool = True,
            *,
            sample_weight: Any = None,
            keep: bool = False,
            timeout_s: float | None = None,
        ) -> tuple[BatchOutput, Any]: ...

        def vjp(
            self, model_weights: Any, x: Any, cotangents: Any, training: bool = True, *, timeout_s: float | None = None
        ) -> tuple[Any, Any]: ...

        def put_weights(
            self, model_weights: Any, *, progress: Progress | None = None, timeout_s: float | None = None
        ) -> WeightsHandle: ...

        def weights_handle(self, weights_id: str) -> WeightsHandle: ...

        def get_weights(
            self, handle: WeightsHandleApi, *, progress: Progress | None = None, timeout_s: float | None = None
        ) -> ModelWeights: ...

        def average(self, results: Iterable[Any], *, timeout_s: float | None = None) -> WeightsHandle: ...

        def finalize_metrics(self, state: Any, *, timeout_s: float | None = None) -> Metrics: ...

        def metrics_session(
            self, session_id: str | None = None, *, initial_state: Any = None, timeout_s: float | None = None
        ) -> MetricsSession: ...

    @property
    def initial_weights(self) -> ModelWeights:
        """(trainable, non_trainable) that the model was saved with: read-only arrays, fetched once.

        Raises ModelChanged, ServerUnavailable, DeadlineExceeded after the client's timeout.
        """
        weights = self._initial_weights
        if weights is None:
            deadline = self._deadline()
            with locked(self._fetching, deadline):
                weights = self._initial_weights
                if weights is None:
                    weights = self._run(self._calls.initial_weights(), deadline)
                self._initial_weights = weights
        return weights

    def _run(self, call: Call[ResultT], deadline: Deadline) -> ResultT:
        return self._transport.ask(call, deadline)

    @overload
    def pipeline(self) -> MultiWeightsPipeline: ...

    @overload
    def pipeline(self, model_weights: Any) -> Pipeline: ...

    def pipeline(self, model_weights: Any = EACH_CALL) -> Pipeline | MultiWeightsPipeline:
        """Calls over one stream: each returns a future, and many are in flight at once.

        model_weights: of all calls: a handle of `put_weights`, or (trainable, non_trainable) in the shapes of
          `initial_weights`, which is put first. Without it, each call names its weights:
          `pipeline.predict_on_batch(handle, x)`.
        Returns a context manager: leaving it waits for every answer.
        Raises what `put_weights` raises.
        """
        deadline = self._deadline(is_renewable=True)
        limit = self._options.max_message_bytes
        if model_weights is EACH_CALL:
            return MultiWeightsPipeline(self._transport, self._calls, self._timeout_s, limit)
        handle = self._put_at_start(model_weights, deadline)
        return Pipeline(self._transport, self._calls, handle, self._timeout_s, limit)

    def predict_many(
        self,
        model_weights: Any,
        batches: Iterable[Any],
        training: bool = True,
        *,
        exact: bool = True,
        timeout_s: float | None = None,
    ) -> Iterator[Any]:
        """Yields the predictions for each batch, in order, with many batches in flight at once.

        model_weights: a handle of `put_weights`, or (trainable, non_trainable), which is put first.
        batches: an iterable of x like x of `input_spec` (no labels), leaves of shape [B, ...]. It is read as answers
          come.
        training: whether layers such as dropout act as in training.
        exact: as of `forward_pass`.
        timeout_s: seconds until DeadlineExceeded for each batch; None for the client's own.
        Yields predictions, leaves of shape [B, ...]. Raises what `put_weights` and `predict_on_batch` raise.
        """
        with self.pipeline(model_weights) as pipeline:
            sent = (pipeline.predict_on_batch(x, training, exact=exact, timeout_s=timeout_s) for x in batches)
            for future in _in_order(sent):
                yield future.result()

    def predict_each(
        self,
        pairs: Iterable[tuple[Any, Any]],
        training: bool = True,
        *,
        exact: bool = True,
        timeout_s: float | None = None,
    ) -> Iterator[Any]:
        """Yields the predictions for each of many pairs of weights and a batch, in order, with many in flight at once.

        For models whose weights differ from user to user: the calls share one stream, and the server may compute calls
        of different weights together.
        pairs: an iterable of tuples (weights, x). weights: a handle of `put_weights`, or (trainable,
          non_trainable), which is sent with the call. x: like x of `input_spec`, leaves of shape [B, ...]; B may differ
          from pair to pair. The iterable is read as answers come.
        training: whether layers such as dropout act as in training.
        exact: as of `forward_pass`.
        timeout_s: seconds until DeadlineExceeded for each pair; None for the client's own.
        Yields predictions, leaves of shape [B, ...]. Raises what `predict_on_batch` raises, after the predictions for
        the pairs before. The message and the place of the error name the pair: `pairs[3].x`. Raises TypeError for an
        item that is no such pair.
        """
        with self.pipeline() as pipeline:

            def sent() -> Iterator[concurrent.futures.Future[Any]]:
                for number, pair in enumerate(pairs):
                    try:
                        weights, x = self._pair(number, pair)
                        future = pipeline.predict_on_batch(weights, x, training, exact=exact, timeout_s=timeout_s)
                    except Exception as error:
                        # Raised in its turn, after the results of the pairs before.
                        future = concurrent.futures.Future()
                        future.set_exception(error)
                        yield future
                        return
                    yield future

            for number, future in enumerate(_in_order(sent())):
                with naming(f"pairs[{number}]"):
                    result = future.result()
                yield result

    def evaluate(
        self,
        model_weights: Any,
        batches: Iterable[Any],
        *,
        training: bool = False,
        exact: bool = True,
        session: MetricsSessionApi | None = None,
        progress: BatchProgress | None = None,
        timeout_s: float | None = None,
    ) -> Metrics:
        sessions = None if session is None else [session]
        (metrics,) = self.evaluate_many(
            [model_weights],
            batches,
            training=training,
            exact=exact,
            sessions=sessions,
            progress=progress,
            timeout_s=timeout_s,
        )
        return metrics

    def evaluate_many(
        self,
        model_weights: Sequence[Any],
        batches: Iterable[Any],
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
            return self._evaluate(sessions, handles, putting, batches, training, rounds, progress, deadline)
        own: list[MetricsSession] = []
        failure: BaseException | None = None
        try:
            # All at the replica that has the first weights.
            route = self._transport.route(handles[0].held) if handles else STICKY
            for _ in handles:
                # One by one: those that were opened before one is refused are closed.
                session = self._session(secrets.token_bytes(ID_BYTES), route)
                own.append(session.open(False, None, self._deadline(deadline.part_s())))
            return self._evaluate(own, handles, putting, batches, training, rounds, progress, deadline)
        except BaseException as error:
            failure = error
            raise
        finally:
            with contextlib.suppress(errors.ForwardPassError):
                closing = closing_deadline(deadline, failure)
                for session in own:
                    session.close(timeout_s=closing.remaining_s())

    def _evaluate(
        self,
        sessions: Sequence[MetricsSessionApi],
        handles: Sequence[WeightsHandleApi],
        putting: Sequence[bool],
        batches: Iterable[Any],
        training: bool,
        rounds: bool,
        progress: BatchProgress | None,
        deadline: Deadline,
    ) -> list[Metrics]:
        """Counts batches in sessions, one for each of several weights: the metrics of each.

        putting: which of the weights are to be put first.
        """
        for handle, must_put in zip(handles, putting, strict=True):
            if must_put:
                self._put(handle.held, None, self._deadline(deadline.part_s(), is_renewable=True))
        pairs = list(zip(sessions, handles, strict=True))
        if not pairs:
            return []
        deadline.renew()
        flying = BatchesInFlight(self._calls, pairs, training, rounds, progress, deadline)
        route = sessions[0].route
        with Stream(
            self._transport, batches_in_flight.PATH, flying, batches_in_flight.TITLE, deadline, route
        ) as stream:
            futures: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
            for batch in batches:
                futures.append(stream.submit(batches_in_flight.encode(self._calls, batch), deadline))
                while futures and futures[0].done():
                    futures.popleft().result()
            while futures:
                futures.popleft().result()
        return [session.result(timeout_s=deadline.part_s()) for session in sessions]

    def train(
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
        source = BatchSource(batches, epochs)
        options = self._calls.update_options(
            optimizer=optimizer,
            learning_rate=learning_rate,
            proximal=proximal,
            trainable=trainable,
            checkpoint_steps=checkpoint_steps,
            optimizer_state=optimizer_state,
            keep_optimizer_state=keep_optimizer_state,
        )
        handle = self._put_at_start(model_weights, deadline)
        training = TrainingStream(self._transport, self._calls, deadline, self._transport.route(handle.held))
        with training.stream:
            answer = training.run(options, handle.held, source, progress)
        return self._answered(answer)

    def train_many(
        self,
        clients: Iterable[tuple[Any, Any]],
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
    ) -> Iterator[TrainingResult]:
        deadline = self._deadline(timeout_s, is_renewable=True)
        options = self._many_options(
            max_streams,
            optimizer=optimizer,
            learning_rate=learning_rate,
            proximal=proximal,
            trainable=trainable,
            checkpoint_steps=checkpoint_steps,
        )
        return self._train_many(clients, weights, options, epochs, max_streams, progress, deadline)

    def _train_many(
        self,
        clients: Iterable[tuple[Any, Any]],
        weights: Any,
        options: UpdateOptions,
        epochs: int,
        max_streams: int,
        progress: TrainingProgress | None,
        deadline: Deadline,
    ) -> Iterator[TrainingResult]:
        default = None if weights is None else self._put_at_start(weights, deadline)

        def run(training: TrainingStream, batches: Any, own: Any) -> Answer:
            held = self._put_at_start(own, deadline).held
            return training.run(options, held, BatchSource(batches, epochs), None)

        def open_stream() -> TrainingStream:
            # Each has its own progress.
            own = Deadline(self._timeout_s, is_renewable=True) if deadline.is_renewable else deadline
            return TrainingStream(self._transport, self._calls, own, self._transport.route(None))

        with StreamPool(open_stream, max_streams, progress) as pool:
            for client in clients:
                pool.submit(run, *self._client(pool.count, client, default))
                while pool.is_full:
                    yield self._answered(pool.next_result())
            while pool.has_results:
                yield self._answered(pool.next_result())

    def _put_at_start(self, model_weights: Any, deadline: Deadline) -> WeightsHandle:
        """The handle of weights at the start of a training, which are put first where they are arrays."""
        if isinstance(model_weights, WeightsHandleApi):
            return cast(WeightsHandle, model_weights)
        return self.put_weights(model_weights, timeout_s=deadline.part_s())

    @property
    def _session_type(self) -> type[MetricsSession]:
        return MetricsSession

    def _session(self, session_id: bytes, route: Route = STICKY) -> MetricsSession:
        return MetricsSession(self._calls, session_id, self._timeout_s, self._transport, route)

    def _run_steps(self, steps: Steps, held: HeldWeights, deadline: Deadline) -> Any:
        return self._transport.run(steps, deadline, self._transport.route(held))

    def _handle(self, held: HeldWeights) -> WeightsHandle:
        return WeightsHandle(held, self._transport, self._timeout_s)

    def _put(self, held: HeldWeights, progress: Progress | None, deadline: Deadline) -> WeightsHandle:
        self._transport.run(held.put(deadline, progress), deadline, self._transport.route(held))
        return self._handle(held)
