"""A functional model that runs on a server, with the face of the local one."""

from __future__ import annotations

import abc
import asyncio
import collections
import concurrent.futures
import contextlib
import secrets
import threading
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from typing import Any

from forwardpass.wire import errors
from forwardpass.wire.description import ModelDescription
from forwardpass.wire.manifests import DIGEST_BYTES
from forwardpass_client import evaluation, ids, transfers
from forwardpass_client.calls import Call, FoundModel, ModelVersion, ResultT
from forwardpass_client.calls_in_flight import MAX_CALLS
from forwardpass_client.evaluation import BatchesInFlight, BatchProgress
from forwardpass_client.options import Options
from forwardpass_client.pipeline import AsyncPipeline, Pipeline
from forwardpass_client.processes import OfOneProcess
from forwardpass_client.reuse import Reuse
from forwardpass_client.session_calls import SessionCalls
from forwardpass_client.sessions import ID_BYTES, AsyncMetricsSession, MetricsSession, MetricsSessionApi
from forwardpass_client.streams import AsyncStream, Stream
from forwardpass_client.transfers import Progress, Steps, Unary
from forwardpass_client.transport import AsyncTransport, Transport
from forwardpass_client.weights import (
    AsyncWeightsHandle,
    HeldWeights,
    WeightsHandle,
    WeightsHandleApi,
    after_put,
)

# Of each session that an evaluation had for itself, when it is over.
_CLOSE_S = 2.0


class FunctionalModelApi(OfOneProcess, abc.ABC):
    """The methods of a functional model on a server, for whoever makes the call.

    Arguments: nested tuples, lists, dicts and named tuples as the model was written for, with numpy arrays, Python
    numbers and lists, or whatever has `__array__` as leaves; dtypes are cast where numpy calls that "same kind" and
    every integer fits. Results: the model's own containers with read-only numpy arrays.

    Every method may raise, before anything is sent, StructureMismatch, DTypeMismatch or ShapeMismatch (naming the
    leaf), FunctionNotAvailable or MessageTooLarge; and afterwards ModelRefusedInput, DeadlineExceeded,
    ServerUnavailable, or another error of `forwardpass_client.errors`.
    timeout_s: seconds until DeadlineExceeded; None for the client's own.
    Source: tff.learning.models.FunctionalModel.
    """

    def __init__(self, found: FoundModel, options: Options) -> None:
        self._found = found
        self._calls = SessionCalls(
            found.description,
            min(found.max_request_bytes, options.max_message_bytes),
            Reuse() if options.reuse_weights else None,
        )
        self._options = options
        self._timeout_s = options.timeout_s
        self._input_spec = found.description.spec.input.nested()

    @property
    def name(self) -> str:
        return self._found.description.identity.name

    @property
    def version(self) -> int:
        """The version that answers: the one asked for; or the highest, or what the label stood for, at the look-up.

        It stays the same, and with it specs and weights, when a label moves or a higher version comes.
        """
        return self._found.description.identity.version

    @property
    def content_hash(self) -> str:
        """SHA-256 of what the model was loaded from, in hex. An answer of another content raises ModelChanged."""
        return self._found.description.identity.content_hash.hex()

    @property
    def versions(self) -> tuple[ModelVersion, ...]:
        """Every version of the model that the server had when it was looked up, the highest last."""
        return self._found.versions

    @property
    def description(self) -> ModelDescription:
        """The model's specs, and which functions it has."""
        return self._found.description

    @property
    def input_spec(self) -> Any:
        """(x, y) in the model's containers, with leaves that have `.shape` (None where it may vary) and `.dtype`.

        Source: tff.learning.models.FunctionalModel.input_spec.
        """
        return self._input_spec

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.description.identity} {self.content_hash[:12]}>"

    @property
    def initial_weights(self) -> Any:
        """(trainable, non_trainable) that the model was saved with: fetched once."""
        return self._run(self._calls.initial_weights(), None)

    def forward_pass(
        self, model_weights: Any, batch_input: Any, training: bool = True, *, timeout_s: float | None = None
    ) -> Any:
        """BatchOutput: loss, predictions and number of examples of one batch under these weights.

        model_weights: (trainable, non_trainable) like `initial_weights`, or a handle of `put_weights`.
        batch_input: (x, y), or a mapping with keys x and y, like `input_spec`, leaves of shape [B, ...]; B may differ
          from call to call.
        training: whether layers such as dropout and batch normalisation act as in training.
        """
        return self._run(self._calls.forward_pass(model_weights, batch_input, training), timeout_s)

    def predict_on_batch(
        self, model_weights: Any, x: Any, training: bool = True, *, timeout_s: float | None = None
    ) -> Any:
        """Predictions for one batch under these weights, leaves of shape [B, ...]. Arguments as of `forward_pass`."""
        return self._run(self._calls.predict_on_batch(model_weights, x, training), timeout_s)

    def loss(
        self,
        output: Any,
        label: Any,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        timeout_s: float | None = None,
    ) -> Any:
        """The loss of predictions against labels.

        output: what `predict_on_batch` returns. label: like y of `input_spec`.
        sample_weight: one weight for each example, float32[B] unless the model says otherwise.
        mask: for a model whose predictions have a Keras mask (`description.spec.prediction_mask`), which positions
          count, like that spec. None for the mask that `output` carries, which it does as long as it is the array that
          the model returned: see `MaskedPredictions`. Without any, every position counts, and MaskMissing is warned of.
        """
        return self._run(self._calls.loss(output, label, sample_weight, mask), timeout_s)

    def initialize_metrics_state(self, *, timeout_s: float | None = None) -> Any:
        """The metrics state before the first batch: a value, to be passed to `update_metrics_state`."""
        return self._run(self._calls.initialize_metrics_state(), timeout_s)

    def update_metrics_state(
        self,
        state: Any,
        labels: Any,
        batch_output: Any,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        timeout_s: float | None = None,
    ) -> Any:
        """The metrics state after one more batch; `state` itself stays as it is.

        labels: like y of `input_spec`. batch_output: what `forward_pass` returned, or any object with the fields
        loss, predictions and num_examples; those that the model's metrics do not read may be None.
        mask: of the batch output's predictions, as of `loss`.
        """
        call = self._calls.update_metrics_state(state, labels, batch_output, sample_weight, mask)
        return self._run(call, timeout_s)

    def finalize_metrics(self, state: Any, *, timeout_s: float | None = None) -> Any:
        """The metrics of a state, in the model's order."""
        return self._run(self._calls.finalize_metrics(state), timeout_s)

    def put_weights(self, model_weights: Any, *, progress: Progress | None = None) -> Any:
        """Sends weights once: a handle that can be passed wherever `model_weights` is.

        Only the tensors that the server lacks are sent, and what had arrived before a connection broke is not sent
        again. Weights of any size: there is no limit as for messages.
        progress: called with (bytes done, bytes in all), from another thread.
        Raises StructureMismatch, DTypeMismatch, ShapeMismatch, WeightStoreFull, ServerUnavailable.
        """
        held = self._calls.hold(model_weights)
        return self._handle_after(held, held.put(progress))

    def weights_handle(self, weights_id: str) -> Any:
        """A handle of weights that somebody has put, by their id. Nothing is sent. Raises ValueError for no id."""
        return self._handle(HeldWeights(ids.parse(weights_id, DIGEST_BYTES, "weights_id")))

    def get_weights(self, handle: WeightsHandleApi, *, progress: Progress | None = None) -> Any:
        """The weights that the server holds: (trainable, non_trainable) of read-only arrays, in the containers they
        were put in.

        progress: called with (bytes done, bytes in all). Raises WeightsNotFound, ServerUnavailable.
        """
        return self._run_steps(transfers.get(handle.held.weights_id, progress))

    def metrics_session(self, session_id: str | None = None, *, initial_state: Any = None) -> Any:
        """A metrics state that the server holds, and to which each update is applied exactly once.

        session_id: `id` of a session that is open, to go on with it; None for a new one.
        initial_state: of a new session: a state of `session.state()` or `update_metrics_state`; None for the state
          before the first batch.
        Raises FunctionNotAvailable for a model without metrics, SessionNotFound, SessionExpired,
        SessionLimitExceeded, InvalidRequest for a session of another model.
        """
        if session_id is None:
            return self._session(secrets.token_bytes(ID_BYTES)).open(False, initial_state)
        if initial_state is not None:
            raise ValueError("initial_state: a session that is open has a state already")
        return self._session(ids.parse(session_id, ID_BYTES, "session_id")).open(True, None)

    @abc.abstractmethod
    def evaluate(
        self,
        model_weights: Any,
        batches: Any,
        *,
        training: bool = False,
        session: MetricsSessionApi | None = None,
        progress: BatchProgress | None = None,
    ) -> Any:
        """The metrics of weights over batches: these go to the server, and only the metrics come back.

        model_weights: a handle of `put_weights`, or weights, which are put first.
        batches: an iterable of (x, y), (x, y, sample_weight), or mappings with these keys.
        session: where the batches are counted, which goes on afterwards; None for one of their own.
        progress: called with the number of batches that have counted, from another thread.
        A connection that breaks is made again, for half a minute at most; no batch counts twice.
        Raises what `forward_pass` and a session's `update` raise, naming the batch where the server refused it. Those
        before it have counted in `session`, and of those behind it some.
        """

    @abc.abstractmethod
    def evaluate_many(
        self,
        model_weights: Sequence[Any],
        batches: Any,
        *,
        training: bool = False,
        sessions: Sequence[MetricsSessionApi] | None = None,
        progress: BatchProgress | None = None,
    ) -> Any:
        """The metrics of each of several weights over the same batches, each of which is sent once.

        sessions: where the batches are counted, one for each weights; they go on afterwards. None for their own.
        Returns a list, in the order of `model_weights`. Otherwise as `evaluate`.
        """

    @abc.abstractmethod
    def _session(self, session_id: bytes) -> Any:
        """A session, before it is opened."""

    @abc.abstractmethod
    def _run(self, call: Call[Any], timeout_s: float | None) -> Any:
        """Makes the call: returns its result, or what to await for it."""

    @abc.abstractmethod
    def _run_steps(self, steps: Steps) -> Any:
        """Makes the calls: returns their result, or what to await for it."""

    @abc.abstractmethod
    def _handle(self, held: HeldWeights) -> Any:
        """A handle of weights."""

    @abc.abstractmethod
    def _handle_after(self, held: HeldWeights, steps: Steps) -> Any:
        """A handle of weights once the calls are made, or what to await for it."""

    def _deadline(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s


class RemoteFunctionalModel(FunctionalModelApi):
    """A functional model on a server, called as if it were local. Any number of threads may call at once."""

    def __init__(self, transport: Transport, found: FoundModel, options: Options) -> None:
        super().__init__(found, options)
        self._transport = transport
        self._initial_weights: Any = None
        self._fetching = threading.Lock()

    @property
    def initial_weights(self) -> Any:
        with self._fetching:
            if self._initial_weights is None:
                self._initial_weights = super().initial_weights
            return self._initial_weights

    def _run(self, call: Call[ResultT], timeout_s: float | None) -> ResultT:
        deadline = self._deadline(timeout_s)
        if call.held is None:
            return self._transport.ask(call, deadline)
        try:
            return call.read(self._transport.call(call.path, call.request, deadline, stays=True))
        except errors.WeightsNotFound:
            pass
        return call.read(self._transport.run(after_put(call.held, Unary(call.path, call.request)), deadline))

    def put_weights(self, model_weights: Any, *, progress: Progress | None = None) -> WeightsHandle:
        handle: WeightsHandle = super().put_weights(model_weights, progress=progress)
        return handle

    def weights_handle(self, weights_id: str) -> WeightsHandle:
        handle: WeightsHandle = super().weights_handle(weights_id)
        return handle

    def pipeline(self, model_weights: Any) -> Pipeline:
        """Calls with these weights over one stream, each a future, many in flight at once. A context manager.

        model_weights: a handle of `put_weights`, or weights, which are put first.
        """
        if not isinstance(model_weights, WeightsHandleApi):
            model_weights = self.put_weights(model_weights)
        return Pipeline(self._transport, self._calls, model_weights, self._timeout_s, self._options.max_message_bytes)

    def predict_many(self, model_weights: Any, batches: Iterable[Any], training: bool = True) -> Iterator[Any]:
        """The predictions for each batch, in order, with many in flight at once. Arguments as of `predict_on_batch`."""
        with self.pipeline(model_weights) as pipeline:
            futures: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
            for x in batches:
                futures.append(pipeline.predict_on_batch(x, training))
                while len(futures) >= MAX_CALLS or (futures and futures[0].done()):
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()

    def metrics_session(self, session_id: str | None = None, *, initial_state: Any = None) -> MetricsSession:
        session: MetricsSession = super().metrics_session(session_id, initial_state=initial_state)
        return session

    def _session(self, session_id: bytes) -> MetricsSession:
        return MetricsSession(self._calls, session_id, self._timeout_s, self._transport)

    def evaluate(
        self,
        model_weights: Any,
        batches: Iterable[Any],
        *,
        training: bool = False,
        session: MetricsSessionApi | None = None,
        progress: BatchProgress | None = None,
    ) -> Any:
        """See `FunctionalModelApi.evaluate`."""
        sessions = None if session is None else [session]
        (metrics,) = self.evaluate_many(
            [model_weights], batches, training=training, sessions=sessions, progress=progress
        )
        return metrics

    def evaluate_many(
        self,
        model_weights: Sequence[Any],
        batches: Iterable[Any],
        *,
        training: bool = False,
        sessions: Sequence[MetricsSessionApi] | None = None,
        progress: BatchProgress | None = None,
    ) -> list[Any]:
        """See `FunctionalModelApi.evaluate_many`."""
        if sessions is not None:
            self._count(sessions, model_weights, batches, training, progress)
            return [session.result() for session in sessions]
        own: list[MetricsSession] = []
        try:
            for _ in model_weights:
                # One by one: those that were opened before one is refused are closed.
                own.append(self.metrics_session())  # noqa: PERF401
            return self.evaluate_many(model_weights, batches, training=training, sessions=own, progress=progress)
        finally:
            # Where the server is away they end by themselves.
            with contextlib.suppress(errors.ForwardPassError):
                for session in own:
                    session.close(timeout_s=_CLOSE_S)

    def _count(
        self,
        sessions: Sequence[MetricsSessionApi],
        model_weights: Sequence[Any],
        batches: Iterable[Any],
        training: bool,
        progress: BatchProgress | None,
    ) -> None:
        """Counts batches in sessions, one for each of several weights."""
        if len(sessions) != len(model_weights):
            raise ValueError(f"sessions: expected {len(model_weights)}, one for each weights, got {len(sessions)}")
        handles = [one if isinstance(one, WeightsHandleApi) else self.put_weights(one) for one in model_weights]
        pairs = list(zip(sessions, handles, strict=True))
        if not pairs:
            return
        flying = BatchesInFlight(self._calls, pairs, training, progress)
        with Stream(self._transport, evaluation.PATH, flying, evaluation.TITLE) as stream:
            futures: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
            for batch in batches:
                futures.append(stream.submit(evaluation.encode(self._calls, batch), None))
                while futures and futures[0].done():
                    futures.popleft().result()
            while futures:
                futures.popleft().result()

    def _run_steps(self, steps: Steps) -> Any:
        return self._transport.run(steps, self._timeout_s)

    def _handle(self, held: HeldWeights) -> WeightsHandle:
        return WeightsHandle(held, self._transport, self._timeout_s)

    def _handle_after(self, held: HeldWeights, steps: Steps) -> WeightsHandle:
        self._run_steps(steps)
        return self._handle(held)


class AsyncRemoteFunctionalModel(FunctionalModelApi):
    """`RemoteFunctionalModel` for asyncio: the same methods, whose results are to be awaited.

    Errors about arguments are raised by the call itself, before anything is awaited. `weights_handle` needs no await.
    """

    def __init__(self, transport: AsyncTransport, found: FoundModel, options: Options) -> None:
        super().__init__(found, options)
        self._transport = transport
        self._initial_weights: Any = None

    @property
    async def initial_weights(self) -> Any:
        if self._initial_weights is None:
            self._initial_weights = await super().initial_weights
        return self._initial_weights

    def _run(self, call: Call[ResultT], timeout_s: float | None) -> Coroutine[Any, Any, ResultT]:
        # Now: until it is awaited, its arrays may be changed.
        return self._run_joined(call.joined(), self._deadline(timeout_s))

    async def _run_joined(self, call: Call[ResultT], deadline: float | None) -> ResultT:
        if call.held is None:
            return await self._transport.ask(call, deadline)
        try:
            return call.read(await self._transport.call(call.path, call.request, deadline, stays=True))
        except errors.WeightsNotFound:
            pass
        return call.read(await self._transport.run(after_put(call.held, Unary(call.path, call.request)), deadline))

    async def put_weights(self, model_weights: Any, *, progress: Progress | None = None) -> AsyncWeightsHandle:
        handle: AsyncWeightsHandle = await super().put_weights(model_weights, progress=progress)
        return handle

    def weights_handle(self, weights_id: str) -> AsyncWeightsHandle:
        handle: AsyncWeightsHandle = super().weights_handle(weights_id)
        return handle

    async def pipeline(self, model_weights: Any) -> AsyncPipeline:
        """See `RemoteFunctionalModel.pipeline`: `async with await model.pipeline(weights) as pipeline`."""
        if not isinstance(model_weights, WeightsHandleApi):
            model_weights = await self.put_weights(model_weights)
        return AsyncPipeline(
            self._transport, self._calls, model_weights, self._timeout_s, self._options.max_message_bytes
        )

    async def predict_many(
        self, model_weights: Any, batches: Iterable[Any], training: bool = True
    ) -> AsyncIterator[Any]:
        """See `RemoteFunctionalModel.predict_many`."""
        async with await self.pipeline(model_weights) as pipeline:
            futures: collections.deque[asyncio.Future[Any]] = collections.deque()
            for x in batches:
                futures.append(pipeline.predict_on_batch(x, training))
                while len(futures) >= MAX_CALLS or (futures and futures[0].done()):
                    yield await futures.popleft()
            while futures:
                yield await futures.popleft()

    async def metrics_session(self, session_id: str | None = None, *, initial_state: Any = None) -> AsyncMetricsSession:
        """See `RemoteFunctionalModel.metrics_session`: `async with await model.metrics_session() as session`."""
        session: AsyncMetricsSession = await super().metrics_session(session_id, initial_state=initial_state)
        return session

    def _session(self, session_id: bytes) -> AsyncMetricsSession:
        return AsyncMetricsSession(self._calls, session_id, self._timeout_s, self._transport)

    async def evaluate(
        self,
        model_weights: Any,
        batches: Iterable[Any] | AsyncIterable[Any],
        *,
        training: bool = False,
        session: MetricsSessionApi | None = None,
        progress: BatchProgress | None = None,
    ) -> Any:
        """See `FunctionalModelApi.evaluate`. batches: may be asynchronous too."""
        sessions = None if session is None else [session]
        (metrics,) = await self.evaluate_many(
            [model_weights], batches, training=training, sessions=sessions, progress=progress
        )
        return metrics

    async def evaluate_many(
        self,
        model_weights: Sequence[Any],
        batches: Iterable[Any] | AsyncIterable[Any],
        *,
        training: bool = False,
        sessions: Sequence[MetricsSessionApi] | None = None,
        progress: BatchProgress | None = None,
    ) -> list[Any]:
        """See `FunctionalModelApi.evaluate_many`. batches: may be asynchronous too."""
        if sessions is not None:
            await self._count(sessions, model_weights, batches, training, progress)
            return [await session.result() for session in sessions]
        own: list[AsyncMetricsSession] = []
        try:
            for _ in model_weights:
                # One by one: those that were opened before one is refused are closed.
                own.append(await self.metrics_session())  # noqa: PERF401
            return await self.evaluate_many(model_weights, batches, training=training, sessions=own, progress=progress)
        finally:
            with contextlib.suppress(errors.ForwardPassError):
                for session in own:
                    await session.close(timeout_s=_CLOSE_S)

    async def _count(
        self,
        sessions: Sequence[MetricsSessionApi],
        model_weights: Sequence[Any],
        batches: Iterable[Any] | AsyncIterable[Any],
        training: bool,
        progress: BatchProgress | None,
    ) -> None:
        """See `RemoteFunctionalModel._count`."""
        if len(sessions) != len(model_weights):
            raise ValueError(f"sessions: expected {len(model_weights)}, one for each weights, got {len(sessions)}")
        handles = [one if isinstance(one, WeightsHandleApi) else await self.put_weights(one) for one in model_weights]
        pairs = list(zip(sessions, handles, strict=True))
        if not pairs:
            return
        flying = BatchesInFlight(self._calls, pairs, training, progress)
        async with AsyncStream(self._transport, evaluation.PATH, flying, evaluation.TITLE) as stream:
            futures: collections.deque[asyncio.Future[Any]] = collections.deque()
            async for batch in _each(batches):
                futures.append(stream.submit(evaluation.encode(self._calls, batch), None))
                while len(futures) >= evaluation.MAX_BATCHES or (futures and futures[0].done()):
                    await futures.popleft()
            while futures:
                await futures.popleft()

    async def _run_steps(self, steps: Steps) -> Any:
        return await self._transport.run(steps, self._timeout_s)

    def _handle(self, held: HeldWeights) -> AsyncWeightsHandle:
        return AsyncWeightsHandle(held, self._transport, self._timeout_s)

    async def _handle_after(self, held: HeldWeights, steps: Steps) -> AsyncWeightsHandle:
        await self._run_steps(steps)
        return self._handle(held)


async def _each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
