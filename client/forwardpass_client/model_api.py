"""The methods of a functional model on a server that threads and asyncio share."""

from __future__ import annotations

import abc
import secrets
from collections.abc import (
    Iterable,
    Sequence,
)
from typing import Any

from forwardpass.wire import conform, errors
from forwardpass.wire.description import ModelDescription
from forwardpass.wire.manifests import DIGEST_BYTES
from forwardpass_client import combinations, ids, transfers
from forwardpass_client.batches_in_flight import BatchProgress
from forwardpass_client.call import Call
from forwardpass_client.calls import (
    FoundModel,
    ModelVersion,
    check_handle,
    check_training,
)
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.metrics_sessions import ID_BYTES, MetricsSessionApi
from forwardpass_client.options import Options
from forwardpass_client.processes import Connected
from forwardpass_client.reuse import Reuse
from forwardpass_client.stream_pools import MAX_STREAMS
from forwardpass_client.training import TrainingProgress
from forwardpass_client.training_calls import TrainingCalls, TrainingResult, UpdateOptions
from forwardpass_client.transfers import Progress, Steps
from forwardpass_client.updates_in_flight import Answer
from forwardpass_client.weights_handles import WeightsHandleApi

# For closing the sessions of an evaluation, together: where the server is away, they expire there.
_CLOSE_S = 2.0


class _EachCall:
    """The argument of a pipeline whose calls name their weights. None would not do: it may be a mistake of a caller."""

    def __repr__(self) -> str:
        return "weights of each call"


EACH_CALL = _EachCall()


class FunctionalModelApi(Connected, abc.ABC):
    """The methods of a functional model on a server, for threads and for asyncio.

    Arguments: nested tuples, lists, dicts and named tuples as the model was written for, with numpy arrays, Python
    numbers and lists, or anything with `__array__` as leaves; dtypes are cast where numpy calls that "same kind" and
    every integer fits. Results: the model's own containers with read-only numpy arrays.

    Every method may raise, before anything is sent, StructureMismatch, DTypeMismatch or ShapeMismatch (naming the
    leaf), FunctionNotAvailable, MessageTooLarge, or RuntimeError in a forked child; and afterwards ModelRefusedInput,
    DeadlineExceeded, ServerUnavailable, or another error of `forwardpass_client.errors`.
    timeout_s: seconds until DeadlineExceeded; None for the client's own. Every attempt, pause and transfer of the call
    ends then. In transfers and evaluations without a timeout of their own, the client's limits the time without
    progress.
    Source: tff.learning.models.FunctionalModel.
    """

    def __init__(self, found: FoundModel, options: Options) -> None:
        super().__init__(options.timeout_s)
        self._found = found
        self._calls = TrainingCalls(
            found.description,
            min(found.max_request_bytes, options.max_message_bytes),
            Reuse() if options.reuse_weights else None,
        )
        self._options = options
        self._input_spec = found.description.spec.input.nested()

    @property
    def name(self) -> str:
        """The name that the model was looked up by."""
        return self._found.description.identity.name

    @property
    def version(self) -> int:
        """The version that answers: the one asked for, or the highest or labelled one at the time of the look-up.

        Version, specs and weights do not change when a label moves or a higher version is loaded.
        """
        return self._found.description.identity.version

    @property
    def content_hash(self) -> str:
        """SHA-256 of the model's files, in hex. An answer of a model with other content raises ModelChanged."""
        return self._found.description.identity.content_hash.hex()

    @property
    def versions(self) -> tuple[ModelVersion, ...]:
        """Every version of the model that the server had at the time of the look-up, the highest last."""
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

    def forward_pass(
        self,
        model_weights: Any,
        batch_input: Any,
        training: bool = True,
        *,
        exact: bool = True,
        timeout_s: float | None = None,
    ) -> Any:
        """Runs the forward pass of one batch: its BatchOutput (loss, predictions, num_examples).

        model_weights: (trainable, non_trainable) like `initial_weights`, or a handle of `put_weights`.
        batch_input: (x, y), or a mapping with keys x and y, like `input_spec`, leaves of shape [B, ...]; B may differ
          from call to call.
        training: whether layers such as dropout and batch normalisation act as in training.
        exact: False where the server may compute this call together with calls of other weights although that changes
          the last bits of the results: see `description.vectorization`.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Returns a loss of shape [], predictions of shape [B, ...] and num_examples, an int32 of shape [].
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, before anything is sent; then
        ModelRefusedInput, WeightsNotFound, ModelChanged, ServerUnavailable or DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(self._calls.forward_pass(model_weights, batch_input, training, exact), deadline)

    def predict_on_batch(
        self,
        model_weights: Any,
        x: Any,
        training: bool = True,
        *,
        exact: bool = True,
        timeout_s: float | None = None,
    ) -> Any:
        """Predictions for one batch: leaves of shape [B, ...].

        model_weights: (trainable, non_trainable) like `initial_weights`, or a handle of `put_weights`.
        x: like x of `input_spec`, leaves of shape [B, ...]; B may differ from call to call.
        training: whether layers such as dropout and batch normalisation act as in training.
        exact: as of `forward_pass`.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, before anything is sent; then
        ModelRefusedInput, WeightsNotFound, ModelChanged, ServerUnavailable or DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(self._calls.predict_on_batch(model_weights, x, training, exact), deadline)

    def loss(
        self,
        output: Any,
        label: Any,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        timeout_s: float | None = None,
    ) -> Any:
        """The loss of predictions against labels: an array of shape [], or what the model's loss returns.

        output: predictions of `predict_on_batch`, leaves of shape [B, ...].
        label: like y of `input_spec`, leaves of shape [B, ...].
        sample_weight: one weight for each example, float32[B] unless the model says otherwise; None for no weights.
        mask: for a model whose predictions have a Keras mask (`description.spec.prediction_mask`): bool[B, ...] like
          that spec, False for a position that does not count. None for the mask that `output` carries as long as it is
          the array that the model returned (see `MaskedPredictions`). Without a mask every position counts, with the
          warning MaskMissing.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, and FunctionNotAvailable before
        anything is sent; then ModelRefusedInput, ModelChanged, ServerUnavailable or DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(self._calls.loss(output, label, sample_weight, mask), deadline)

    def forward_backward(
        self,
        model_weights: Any,
        batch_input: Any,
        training: bool = True,
        *,
        sample_weight: Any = None,
        keep: bool = False,
        timeout_s: float | None = None,
    ) -> Any:
        """Runs the forward pass of one batch, and differentiates its loss: (BatchOutput, gradients) in one call.

        model_weights, batch_input, training: as of `forward_pass`, leaves of shape [B, ...].
        sample_weight: one weight for each example, float32[B] unless the model says otherwise; None for no weights.
        keep: whether the gradients stay on the server. `gradients` is then a handle of the pair (gradients,
          non_trainable), where each leaf of non_trainable is None: `client.combine` takes it as a change of weights.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Returns the BatchOutput, as of `forward_pass`, and gradients in the structure, shapes and dtypes of the
        trainable weights, with None for leaves of integers, booleans and strings. They are zeros for the leaves in
        `description.unreached_weights`. If the loss has several values, they are the gradients of their sum, as of
        `tf.GradientTape`.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, and FunctionNotAvailable for a model
        without gradients, before anything is sent; then ModelRefusedInput, WeightsNotFound, WeightStoreFull,
        ModelChanged, ServerUnavailable or DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        handle = self._handle if keep else None
        return self._run(
            self._calls.forward_backward(model_weights, batch_input, training, sample_weight, handle), deadline
        )

    def vjp(
        self, model_weights: Any, x: Any, cotangents: Any, training: bool = True, *, timeout_s: float | None = None
    ) -> Any:
        """The vector-Jacobian product of `predict_on_batch`: (weights_cotangents, x_cotangents).

        For a caller who computes the loss from the predictions, and for split learning.
        model_weights, x, training: as of `predict_on_batch`.
        cotangents: the derivatives of the caller's loss with respect to the predictions, in their structure, shapes
          [B, ...] and dtypes; None for leaves of integers, booleans and strings.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Returns the derivatives with respect to the trainable weights, in their structure, and to x, in its structure,
        with None for leaves of integers, booleans and strings.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, and FunctionNotAvailable before
        anything is sent; then ModelRefusedInput, WeightsNotFound, ModelChanged, ServerUnavailable or DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(self._calls.vjp(model_weights, x, cotangents, training), deadline)

    def initialize_metrics_state(self, *, timeout_s: float | None = None) -> Any:
        """The metrics state before the first batch: a value for `update_metrics_state`.

        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises FunctionNotAvailable for a model without metrics, ModelChanged, ServerUnavailable, DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(self._calls.initialize_metrics_state(), deadline)

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
        """The metrics state after one more batch. `state` itself does not change.

        state: of `initialize_metrics_state` or of this method.
        labels: like y of `input_spec`, leaves of shape [B, ...].
        batch_output: a `BatchOutput` of `forward_pass`, or any object with its fields: predictions of shape [B, ...];
          fields that the model's metrics do not read may be None.
        sample_weight: one weight for each example, float32[B] unless the model says otherwise; None for no weights.
        mask: of the predictions, as of `loss`.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, and FunctionNotAvailable before
        anything is sent; then ModelRefusedInput, ModelChanged, ServerUnavailable or DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        call = self._calls.update_metrics_state(state, labels, batch_output, sample_weight, mask)
        return self._run(call, deadline)

    def finalize_metrics(self, state: Any, *, timeout_s: float | None = None) -> Any:
        """The metrics of a state, by name, in the model's order: arrays of shape [] for most metrics.

        state: of `initialize_metrics_state`, `update_metrics_state`, or a session's `state()`.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, and FunctionNotAvailable before
        anything is sent; then ModelChanged, ServerUnavailable or DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(self._calls.finalize_metrics(state), deadline)

    def put_weights(
        self, model_weights: Any, *, progress: Progress | None = None, timeout_s: float | None = None
    ) -> Any:
        """Puts weights on the server once: a handle that is accepted wherever `model_weights` is.

        Sends only the tensors that the server lacks. An upload that breaks continues where it stopped. Weights may have
        any size: the limit of messages does not apply.
        model_weights: (trainable, non_trainable) in the containers and shapes of `initial_weights`. The handle keeps
          the arrays, not a copy.
        progress: called with (bytes done, bytes in all), from another thread.
        timeout_s: seconds until DeadlineExceeded for the whole transfer; None for the client's own without progress,
          plus a second for each MiB that is to be sent.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf, before anything is sent; then
        WeightStoreFull, ServerUnavailable or DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s, is_renewable=True)
        return self._put(self._calls.hold(model_weights), progress, deadline)

    def weights_handle(self, weights_id: str) -> Any:
        """A handle of weights that were put before, perhaps by another client. Nothing is sent.

        weights_id: `id` of their handle, 64 hexadecimal digits. Raises ValueError or TypeError for anything else.
        """
        self._deadline()
        return self._handle(HeldWeights(ids.parse(weights_id, DIGEST_BYTES, "weights_id")))

    def get_weights(
        self, handle: WeightsHandleApi, *, progress: Progress | None = None, timeout_s: float | None = None
    ) -> Any:
        """The weights of a handle: (trainable, non_trainable) of read-only arrays, in the containers of the put.

        progress: called with (bytes done, bytes in all).
        timeout_s: as of `put_weights`.
        Raises TypeError if it gets no handle (StructureMismatch for an id), WeightsNotFound, ServerUnavailable,
        DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s, is_renewable=True)
        held = check_handle(handle, "handle").held
        return self._run_steps(transfers.get(held.weights_id, deadline, progress), held, deadline)

    def average(self, results: Iterable[Any], *, timeout_s: float | None = None) -> Any:
        """The average of weights on the server, each weighted by its number of examples: the handle of the average.

        results: objects with `weights` (a handle) and `num_examples`, such as the results of training, or pairs of a
          handle and a number.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Leaves of integers, booleans and strings are those of the first result with examples. Training changes such
        leaves in Keras models with Dropout: the states of their random numbers, which cannot be averaged.
        Raises TypeError or ValueError for other results, and for no examples in total, before anything is sent; then
        what `combine` of the client raises, with its default of `float64`.
        """
        deadline = self._deadline(timeout_s)
        terms = combinations.average_terms(results)
        (first, _), *_ = terms
        steps = combinations.combine(terms, False, "first", self._handle, deadline)
        return self._run_steps(steps, first.held, deadline)

    def metrics_session(
        self, session_id: str | None = None, *, initial_state: Any = None, timeout_s: float | None = None
    ) -> Any:
        """Opens a metrics session: a state on the server to which each update is applied exactly once.

        session_id: `id` of an open session, to continue it; None for a new one.
        initial_state: of a new session, as `session.state()` or `update_metrics_state` returns it, in the shapes of
          `description.spec.metrics_state`; None for the state before the first batch.
        timeout_s: seconds until DeadlineExceeded for opening it; None for the client's own.
        Returns the open session. For asyncio: `async with model.metrics_session() as session`, or await it.
        Raises FunctionNotAvailable for a model without metrics, SessionNotFound, SessionExpired,
        SessionLimitExceeded, InvalidRequest for a session of another model, ValueError for an invalid id or for an
        initial state of an open session, ServerUnavailable, DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        if session_id is None:
            return self._session(secrets.token_bytes(ID_BYTES)).open(False, initial_state, deadline)
        if initial_state is not None:
            raise ValueError("initial_state: expected None for the id of an open session, which has a state already")
        return self._session(ids.parse(session_id, ID_BYTES, "session_id")).open(True, None, deadline)

    @abc.abstractmethod
    def evaluate(
        self,
        model_weights: Any,
        batches: Any,
        *,
        training: bool = False,
        exact: bool = True,
        session: MetricsSessionApi | None = None,
        progress: BatchProgress | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """The metrics of weights over batches. The batches go to the server, and only the metrics come back.

        model_weights: a handle of `put_weights`, or (trainable, non_trainable), which is put first.
        batches: an iterable of (x, y), (x, y, sample_weight), or mappings with these keys: x and y like `input_spec`,
          leaves of shape [B, ...]; sample_weight float32[B] unless the model says otherwise. An asynchronous iterable
          too, for asyncio.
        training: whether layers such as dropout act as in training.
        exact: as of `forward_pass`.
        session: the session that counts the batches, and stays open; None for one that is closed at the end.
        progress: called with the number of batches that have counted, from another thread.
        timeout_s: seconds until DeadlineExceeded for the whole evaluation; None for the client's own while a batch is
          in flight and none counts.
        Returns the metrics by name, in the model's order: arrays of shape [] for most metrics.
        When the connection breaks, the evaluation reconnects, for half a minute at most; no batch counts twice.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch (naming the leaf), ModelRefusedInput (naming the
        batch), FunctionNotAvailable, WeightsNotFound, SessionNotFound, ServerUnavailable, DeadlineExceeded. The batches
        before a refused one have counted in `session`, and perhaps some of those after it.
        """

    @abc.abstractmethod
    def evaluate_many(
        self,
        model_weights: Sequence[Any],
        batches: Any,
        *,
        training: bool = False,
        exact: bool = True,
        sessions: Sequence[MetricsSessionApi] | None = None,
        progress: BatchProgress | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """The metrics of each of several weights over the same batches. Each batch is sent once.

        model_weights: handles of `put_weights`, or (trainable, non_trainable) each.
        batches, training, exact, progress, timeout_s, errors: as of `evaluate`; leaves of shape [B, ...]. With
          exact=False the server may compute these weights together although that changes the last bits.
        sessions: the sessions that count the batches, one for each weights, which stay open; None for sessions that are
          closed at the end.
        Returns a list of metrics, in the order of `model_weights`.
        Raises ValueError where the numbers of sessions and weights differ, and what `evaluate` raises.
        """

    @abc.abstractmethod
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
    ) -> Any:
        """Trains weights on the server: one optimizer step for each batch. The trained weights stay there.

        model_weights: a handle of `put_weights`, or (trainable, non_trainable), which is put first. They do not change.
        batches: an iterable of (x, y), (x, y, sample_weight), or mappings with these keys: x and y like `input_spec`,
          leaves of shape [B, ...]; sample_weight float32[B] unless the model says otherwise, in all batches or in none.
          Or a function that returns such an iterable. Asynchronous iterables too, for asyncio.
        optimizer: the name of a Keras optimizer, a mapping with "class_name" and "config", or a Keras optimizer.
        learning_rate: replaces the optimizer's own, which may be a schedule; None where the optimizer has one.
        epochs: how often the batches are read, in the order in which they come.
        proximal: FedProx's mu: mu / 2 times the squared distance from `model_weights` is added to the loss.
        trainable: which trainable weights change: booleans in the containers of the trainable weights; one boolean in
          place of a container stands for all leaves in it. None for all.
        checkpoint_steps: the server keeps the state after each so many steps, so that a training that was interrupted
          continues from there; None to begin again.
        optimizer_state: `TrainingResult.optimizer_state` of an earlier training, to continue it; None for a new one.
        keep_optimizer_state: whether the result has the state of the optimizer.
        progress: called with the number of batches that were trained on, from another thread. After an interruption
          the number may be lower than before.
        timeout_s: seconds until DeadlineExceeded for the whole training; None for the client's own while the server
          makes no progress.
        Returns a `TrainingResult`, with the handle of the trained weights.
        If the connection breaks, the training continues from its last checkpoint, or begins again, for half a minute at
        most. `batches` is then read again, and must give the same batches. An iterator cannot be read again, which
        raises ServerUnavailable. The same batches give the same weights, however often the training was interrupted.
        Raises, before anything is sent, FunctionNotAvailable, OptimizerNotSupported, TypeError and ValueError; then
        StructureMismatch, DTypeMismatch or ShapeMismatch (naming the leaf), ModelRefusedInput (naming the batch),
        WeightsNotFound, WeightStoreFull, OutOfMemory, ServerOverloaded, ServerUnavailable, DeadlineExceeded.
        """

    @abc.abstractmethod
    def train_many(
        self,
        clients: Any,
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
    ) -> Any:
        """Yields the `TrainingResult` of each of many trainings, in order. Several run at once.

        clients: an iterable of tuples (batches, weights): batches as of `train`, leaves of shape [B, ...]; weights as
          of `train`, or None for `weights`. It is read as results come; the batches are read on other threads.
        weights: those at the start of each training that has no weights of its own.
        max_streams: how many trainings run at once. Twice as many clients are read before their results are yielded.
        progress: called with the number of trainings that have ended, from other threads but one call at a time. A
          training may end before one that comes earlier in the order.
        timeout_s: seconds until DeadlineExceeded for all trainings together; None as of `train`.
        optimizer, learning_rate, epochs, proximal, trainable, checkpoint_steps: as of `train`, for each training.
        Raises what `train` raises, and TypeError or ValueError for clients that are not such pairs. The first error
        ends all trainings.
        """

    def _answered(self, answer: Answer) -> TrainingResult:
        """The result of an update."""
        result = answer.result
        state_id = result.optimizer_state_id
        return TrainingResult(
            weights=self._handle(HeldWeights(result.weights_id)),
            loss=result.loss,
            num_examples=result.num_examples,
            num_steps=result.num_steps,
            metrics=answer.metrics,
            optimizer_state=self._handle(HeldWeights(state_id)) if state_id else None,
        )

    def _pair(self, number: int, pair: Any) -> tuple[Any, Any]:
        """One pair of `predict_each`: the weights and x. Raises TypeError."""
        # A list may be weights.
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"pairs[{number}]: expected a tuple (weights, x), got {conform.kind_of(pair)}")
        return pair[0], pair[1]

    def _client(self, number: int, client: Any, weights: Any) -> tuple[Any, Any]:
        """The batches and the weights of one client. weights: the default. Raises TypeError and ValueError."""
        # A list of two batches is not a pair.
        if not isinstance(client, tuple) or len(client) != 2:
            raise TypeError(
                f"clients[{number}]: expected a tuple (batches, weights), with None for the weights of all, got "
                f"{type(client).__name__}"
            )
        batches, own = client
        if own is None and weights is None:
            raise ValueError(f"weights: expected weights, because clients[{number}] has none of its own, got None")
        return batches, weights if own is None else own

    def _many_options(
        self,
        max_streams: Any,
        *,
        optimizer: Any,
        learning_rate: Any,
        proximal: Any,
        trainable: Any,
        checkpoint_steps: Any,
    ) -> UpdateOptions:
        """Checks the options of `train_many`."""
        if isinstance(max_streams, bool) or not isinstance(max_streams, int):
            raise TypeError(f"max_streams: expected an int, got {max_streams!r}")
        if not 1 <= max_streams <= MAX_STREAMS:
            raise ValueError(f"max_streams: expected 1 to {MAX_STREAMS}, got {max_streams}")
        return self._calls.update_options(
            optimizer=optimizer,
            learning_rate=learning_rate,
            proximal=proximal,
            trainable=trainable,
            checkpoint_steps=checkpoint_steps,
            optimizer_state=None,
            keep_optimizer_state=False,
        )

    def _check_many(self, model_weights: Any, sessions: Any, training: Any) -> bool:
        """Checks the arguments of an evaluation: whether it is to be in training mode."""
        if isinstance(model_weights, (WeightsHandleApi, str, bytes)) or not isinstance(model_weights, Sequence):
            raise TypeError(
                "model_weights: expected a list with one entry for each set of weights, got "
                f"{type(model_weights).__name__}: "
                "for one set of weights, call evaluate"
            )
        if sessions is not None:
            for session in sessions:
                if not isinstance(session, self._session_type):
                    raise TypeError(
                        f"session: expected a {self._session_type.__name__} of metrics_session, got "
                        f"{type(session).__name__}"
                    )
            if len(sessions) != len(model_weights):
                raise ValueError(
                    f"sessions: expected {len(model_weights)}, one for each set of weights, got {len(sessions)}"
                )
        return check_training(training)

    @property
    @abc.abstractmethod
    def _session_type(self) -> type[MetricsSessionApi]:
        """The class of this model's sessions."""

    @abc.abstractmethod
    def _session(self, session_id: bytes) -> Any:
        """A session, before it is opened."""

    @abc.abstractmethod
    def _run(self, call: Call[Any], deadline: Deadline) -> Any:
        """Makes the call: returns its result, or an awaitable of it."""

    @abc.abstractmethod
    def _run_steps(self, steps: Steps, held: HeldWeights, deadline: Deadline) -> Any:
        """Carries out the steps, which use these weights: returns their result, or an awaitable of it."""

    @abc.abstractmethod
    def _put(self, held: HeldWeights, progress: Progress | None, deadline: Deadline) -> Any:
        """Puts weights: returns their handle, or an awaitable of it."""

    @abc.abstractmethod
    def _handle(self, held: HeldWeights) -> Any:
        """A handle of weights."""


def closing_deadline(deadline: Deadline, failure: BaseException | None) -> Deadline:
    """For closing the sessions of an evaluation at its end.

    Within the deadline of the evaluation, but for a renewable one that no call to the server has used up.
    """
    wait_s = deadline.wait_s()
    if wait_s is None or (deadline.is_renewable and not isinstance(failure, errors.ForwardPassError)):
        return Deadline(_CLOSE_S)
    return Deadline(min(_CLOSE_S, wait_s))
