"""A functional model that runs on a server, with the face of the local one."""

from __future__ import annotations

import abc
import threading
from typing import Any

from forwardpass.wire.description import ModelDescription
from forwardpass_client.calls import Call, FoundModel, ModelCalls, ModelVersion, ResultT
from forwardpass_client.transport import AsyncTransport, Transport


class FunctionalModelApi(abc.ABC):
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

    def __init__(self, found: FoundModel, max_message_bytes: int, timeout_s: float | None) -> None:
        self._found = found
        self._calls = ModelCalls(found.description, min(found.max_request_bytes, max_message_bytes))
        self._timeout_s = timeout_s
        self._input_spec = found.description.spec.input.nested()

    @property
    def name(self) -> str:
        return self._found.description.identity.name

    @property
    def version(self) -> int:
        """The version that answers: the one asked for, or the highest there was when the model was looked up."""
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

        model_weights: (trainable, non_trainable) like `initial_weights`.
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

    def loss(self, output: Any, label: Any, sample_weight: Any = None, *, timeout_s: float | None = None) -> Any:
        """The loss of predictions against labels.

        output: what `predict_on_batch` returns. label: like y of `input_spec`.
        sample_weight: one weight for each example, float32[B] unless the model says otherwise.
        """
        return self._run(self._calls.loss(output, label, sample_weight), timeout_s)

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
        timeout_s: float | None = None,
    ) -> Any:
        """The metrics state after one more batch; `state` itself stays as it is.

        labels: like y of `input_spec`. batch_output: what `forward_pass` returned, or any object with the fields
        loss, predictions and num_examples; those that the model's metrics do not read may be None.
        """
        return self._run(self._calls.update_metrics_state(state, labels, batch_output, sample_weight), timeout_s)

    def finalize_metrics(self, state: Any, *, timeout_s: float | None = None) -> Any:
        """The metrics of a state, in the model's order."""
        return self._run(self._calls.finalize_metrics(state), timeout_s)

    @abc.abstractmethod
    def _run(self, call: Call[Any], timeout_s: float | None) -> Any:
        """Makes the call: returns its result, or what to await for it."""

    def _deadline(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s


class RemoteFunctionalModel(FunctionalModelApi):
    """A functional model on a server, called as if it were local. Any number of threads may call at once."""

    def __init__(
        self, transport: Transport, found: FoundModel, max_message_bytes: int, timeout_s: float | None
    ) -> None:
        super().__init__(found, max_message_bytes, timeout_s)
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
        return call.read(self._transport.call(call.path, call.request, self._deadline(timeout_s)))


class AsyncRemoteFunctionalModel(FunctionalModelApi):
    """`RemoteFunctionalModel` for asyncio: the same methods, whose results are to be awaited.

    Errors about arguments are raised by the call itself, before anything is awaited.
    """

    def __init__(
        self, transport: AsyncTransport, found: FoundModel, max_message_bytes: int, timeout_s: float | None
    ) -> None:
        super().__init__(found, max_message_bytes, timeout_s)
        self._transport = transport
        self._initial_weights: Any = None

    @property
    async def initial_weights(self) -> Any:
        if self._initial_weights is None:
            self._initial_weights = await super().initial_weights
        return self._initial_weights

    async def _run(self, call: Call[ResultT], timeout_s: float | None) -> ResultT:
        return call.read(await self._transport.call(call.path, call.request, self._deadline(timeout_s)))
