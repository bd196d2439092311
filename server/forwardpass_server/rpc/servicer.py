"""The methods of FunctionalModelService: decode the request, make one call, encode the response."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from forwardpass import v1
from forwardpass.wire import description, fields, limits
from forwardpass.wire.description import Function
from forwardpass.wire.methods import MODEL_SERVICE
from forwardpass.wire.structures import Structure
from forwardpass_server.access import principals
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.execution import Executor, Invocation
from forwardpass_server.calls.plans import Servable
from forwardpass_server.catalog.registry import Entry, Registry, State
from forwardpass_server.rpc import handlers
from forwardpass_server.rpc.codec import Codec, Incoming
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.rpc.handlers import Method
from forwardpass_server.rpc.pipeline import Pipeline
from forwardpass_server.rpc.selectors import checked
from forwardpass_server.status.readiness import Readiness
from forwardpass_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from forwardpass_server.telemetry.spans import Tracing

MessageT = TypeVar("MessageT", bound=Message)

_STATES = {
    State.LOADING: v1.ModelState.MODEL_STATE_LOADING,
    State.AVAILABLE: v1.ModelState.MODEL_STATE_AVAILABLE,
    State.FAILED: v1.ModelState.MODEL_STATE_FAILED,
}


# A longer response is returned in pieces: a pipeline sends them without joining them first.
_LONG_BYTES = 2**20


class FunctionalModelServicer:
    """Each method has the name of its RPC; it takes the bytes of a request and returns those of the response."""

    def __init__(
        self,
        registry: Registry,
        executor: Executor,
        codec: Codec,
        max_message_bytes: int,
        admission: Admission,
        metrics: Metrics,
        readiness: Readiness,
        others: Mapping[str, Method],
        drain: Drain,
        shares_weights: bool,
        tracing: Tracing | None = None,
    ) -> None:
        """others: methods of other services that a pipeline may call, by name. tracing: None for no spans.

        shares_weights: whether other servers can use the weights of this one.
        """
        self._registry = registry
        self._executor = executor
        self._max_message_bytes = max_message_bytes
        self._shares_weights = shares_weights
        self._admission = admission
        self._metrics = metrics
        self._readiness = readiness
        self._drain = drain
        self._codec = codec
        self._pipelined = {**handlers.unary(MODEL_SERVICE, self), **others}
        if tracing is not None:
            self._pipelined = tracing.of_pipeline(self._pipelined)

    async def ForwardPass(self, data: bytes, context: object) -> Any:
        incoming = self._codec.open(v1.ForwardPassRequest, data)
        header = incoming.header
        return await self._call(
            v1.ForwardPassResponse,
            incoming,
            Function.FORWARD_PASS,
            training=header.training,
            weights_id=header.weights_id,
            allow_rounding=header.allow_rounding,
        )

    async def PredictOnBatch(self, data: bytes, context: object) -> Any:
        incoming = self._codec.open(v1.PredictOnBatchRequest, data)
        header = incoming.header
        return await self._call(
            v1.PredictOnBatchResponse,
            incoming,
            Function.PREDICT_ON_BATCH,
            training=header.training,
            weights_id=header.weights_id,
            allow_rounding=header.allow_rounding,
        )

    async def Loss(self, data: bytes, context: object) -> Any:
        incoming = self._codec.open(v1.LossRequest, data)
        return await self._call(v1.LossResponse, incoming, Function.LOSS, Function.WEIGHTED_LOSS)

    async def ForwardBackward(self, data: bytes, context: object) -> Any:
        incoming = self._codec.open(v1.ForwardBackwardRequest, data)
        header = incoming.header
        servable, results = await self._run(
            incoming,
            Function.FORWARD_BACKWARD,
            Function.WEIGHTED_FORWARD_BACKWARD,
            training=header.training,
            weights_id=header.weights_id,
        )
        response = servable.response_header(v1.ForwardBackwardResponse)
        if header.keep_gradients:
            gradients = results.pop("gradients")
            gradients_id = await self._executor.keep_gradients(servable, principals.current(), gradients)
            response = v1.ForwardBackwardResponse(model=response.model, gradients_id=gradients_id)
        return await self._encoded(response, results)

    async def Vjp(self, data: bytes, context: object) -> Any:
        incoming = self._codec.open(v1.VjpRequest, data)
        header = incoming.header
        return await self._call(
            v1.VjpResponse, incoming, Function.VJP, training=header.training, weights_id=header.weights_id
        )

    async def InitializeMetricsState(self, data: bytes, context: object) -> Any:
        incoming = self._codec.open(v1.InitializeMetricsStateRequest, data)
        return await self._call(v1.InitializeMetricsStateResponse, incoming, Function.INITIALIZE_METRICS_STATE)

    async def UpdateMetricsState(self, data: bytes, context: object) -> Any:
        incoming = self._codec.open(v1.UpdateMetricsStateRequest, data)
        function, weighted = Function.UPDATE_METRICS_STATE, Function.WEIGHTED_UPDATE_METRICS_STATE
        return await self._call(v1.UpdateMetricsStateResponse, incoming, function, weighted)

    async def FinalizeMetrics(self, data: bytes, context: object) -> Any:
        incoming = self._codec.open(v1.FinalizeMetricsRequest, data)
        return await self._call(v1.FinalizeMetricsResponse, incoming, Function.FINALIZE_METRICS)

    async def GetModel(self, data: bytes, context: object) -> bytes:
        header = fields.parse(v1.GetModelRequest, data)
        model = self._registry.get(header.model.name, self._version(header.model)).model
        described = model.description
        many = len(described.spec.weights.leaves) > limits.SMALL_LEAVES
        encode = functools.partial(description.encode, described)
        response = v1.GetModelResponse(
            model=await self._codec.offload(encode) if many else encode(),
            versions=[self._status(entry) for entry in self._registry.versions(header.model.name)],
            max_request_bytes=self._max_message_bytes,
            shares_weights=self._shares_weights,
        )
        return response.SerializeToString()

    async def ListModels(self, data: bytes, context: object) -> bytes:
        fields.parse(v1.ListModelsRequest, data)
        response = v1.ListModelsResponse(
            models=[self._status(entry) for entry in self._registry.entries()],
            unready_reasons=self._readiness.reasons(),
        )
        return response.SerializeToString()

    async def GetInitialWeights(self, data: bytes, context: object) -> bytes:
        header = fields.parse(v1.GetInitialWeightsRequest, data)
        model = self._registry.get(header.model.name, self._version(header.model)).model
        spec = model.description.spec
        parts = spec.weights_parts(Structure(spec.weights.tree, model.initial_weights))
        response = v1.GetInitialWeightsResponse(model=model.description.identity.message())
        return (await self._codec.encode(response, parts)).join()

    def Pipeline(self, requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        pipeline = Pipeline(self._pipelined, self._max_message_bytes, self._admission, self._metrics.rpcs, self._drain)
        return pipeline.run(requests, context)

    def _version(self, selector: v1.ModelSelector) -> int:
        """The version that a selector names; 0 for the highest."""
        model = checked(selector)
        return self._registry.asked_for(model.name, model.version, model.label)

    def _status(self, entry: Entry) -> v1.ModelVersionStatus:
        return version_status(entry, self._registry.labels(entry.source))

    async def _call(
        self,
        response_type: type[MessageT],
        incoming: Incoming[Any],
        function: Function,
        weighted: Function | None = None,
        *,
        training: bool = False,
        weights_id: bytes = b"",
        allow_rounding: bool = False,
    ) -> Any:
        """Answers one call of a function: see `_run`."""
        servable, results = await self._run(
            incoming, function, weighted, training=training, weights_id=weights_id, allow_rounding=allow_rounding
        )
        return await self._encoded(servable.response_header(response_type), results)

    async def _encoded(self, response: Message, results: Mapping[str, Structure]) -> Any:
        pieces = await self._codec.encode(response, results)
        return pieces if len(pieces) >= _LONG_BYTES else pieces.join()

    async def _run(
        self,
        incoming: Incoming[Any],
        function: Function,
        weighted: Function | None = None,
        *,
        training: bool = False,
        weights_id: bytes = b"",
        allow_rounding: bool = False,
    ) -> tuple[Servable, dict[str, Structure]]:
        """Runs one call of a function. weighted: the function for a request with sample weights."""
        model = incoming.header.model
        servable = self._registry.get(model.name, self._version(model))
        principal, size_bytes = principals.current(), incoming.size_bytes

        async def read() -> Invocation:
            parts = await incoming.parts()
            asked = weighted if weighted is not None and "sample_weight" in parts else function
            return Invocation(asked, parts, size_bytes, training, weights_id, principal, allow_rounding=allow_rounding)

        return servable, await self._executor.admit_and_run(servable, principal, size_bytes, read)


def version_status(entry: Entry, labels: Sequence[str]) -> v1.ModelVersionStatus:
    """The status of a version as its message."""
    return v1.ModelVersionStatus(
        name=entry.source.name,
        version=entry.source.version,
        state=_STATES[entry.state],
        error=entry.error or entry.waiting,
        content_hash=entry.servable.identity.content_hash if entry.servable else b"",
        labels=labels,
    )
