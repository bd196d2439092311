"""The methods of FunctionalModelService: messages in, one call, messages out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from forwardpass import v1
from forwardpass.wire import description, messages
from forwardpass.wire.description import Function
from forwardpass.wire.methods import MODEL_SERVICE
from forwardpass.wire.structures import Structure
from forwardpass_server.rpc import handlers, principals
from forwardpass_server.rpc.codec import Codec
from forwardpass_server.rpc.departure import Departure
from forwardpass_server.rpc.handlers import Method
from forwardpass_server.rpc.pipeline import Pipeline
from forwardpass_server.rpc.selectors import checked
from forwardpass_server.serving.admission import Admission
from forwardpass_server.serving.calls import Caller, Request
from forwardpass_server.serving.readiness import Readiness
from forwardpass_server.serving.registry import Entry, Registry, State
from forwardpass_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from forwardpass_server.telemetry.tracing import Tracing

MessageT = TypeVar("MessageT", bound=Message)

_STATES = {
    State.LOADING: v1.ModelState.MODEL_STATE_LOADING,
    State.AVAILABLE: v1.ModelState.MODEL_STATE_AVAILABLE,
    State.FAILED: v1.ModelState.MODEL_STATE_FAILED,
}


# From here on a response is worth leaving in pieces, for whoever sends it so.
_LONG_BYTES = 2**20


class FunctionalModelServicer:
    """Each method has the name of its RPC, takes the request's bytes and returns the response's, or its pieces."""

    def __init__(
        self,
        registry: Registry,
        caller: Caller,
        max_message_bytes: int,
        admission: Admission,
        metrics: Metrics,
        readiness: Readiness,
        others: Mapping[str, Method],
        departure: Departure,
        tracing: Tracing | None = None,
    ) -> None:
        """others: methods of other services that a pipeline may call too, by name. tracing: None for no spans."""
        self._registry = registry
        self._caller = caller
        self._max_message_bytes = max_message_bytes
        self._admission = admission
        self._metrics = metrics
        self._readiness = readiness
        self._departure = departure
        self._codec = Codec(max_message_bytes, metrics.models)
        self._pipelined = {**handlers.unary(MODEL_SERVICE, self), **others}
        if tracing is not None:
            self._pipelined = tracing.of_pipeline(self._pipelined)

    async def ForwardPass(self, data: bytes, context: object) -> Any:
        header, parts = self._codec.decode(v1.ForwardPassRequest, data)
        function = Function.FORWARD_PASS
        return await self._call(
            v1.ForwardPassResponse, header, function, parts, len(data), header.training, header.weights_id
        )

    async def PredictOnBatch(self, data: bytes, context: object) -> Any:
        header, parts = self._codec.decode(v1.PredictOnBatchRequest, data)
        function = Function.PREDICT_ON_BATCH
        return await self._call(
            v1.PredictOnBatchResponse, header, function, parts, len(data), header.training, header.weights_id
        )

    async def Loss(self, data: bytes, context: object) -> Any:
        header, parts = self._codec.decode(v1.LossRequest, data)
        function = Function.WEIGHTED_LOSS if "sample_weight" in parts else Function.LOSS
        return await self._call(v1.LossResponse, header, function, parts, len(data))

    async def InitializeMetricsState(self, data: bytes, context: object) -> Any:
        header, parts = self._codec.decode(v1.InitializeMetricsStateRequest, data)
        function = Function.INITIALIZE_METRICS_STATE
        return await self._call(v1.InitializeMetricsStateResponse, header, function, parts, len(data))

    async def UpdateMetricsState(self, data: bytes, context: object) -> Any:
        header, parts = self._codec.decode(v1.UpdateMetricsStateRequest, data)
        weighted = "sample_weight" in parts
        function = Function.WEIGHTED_UPDATE_METRICS_STATE if weighted else Function.UPDATE_METRICS_STATE
        return await self._call(v1.UpdateMetricsStateResponse, header, function, parts, len(data))

    async def FinalizeMetrics(self, data: bytes, context: object) -> Any:
        header, parts = self._codec.decode(v1.FinalizeMetricsRequest, data)
        return await self._call(v1.FinalizeMetricsResponse, header, Function.FINALIZE_METRICS, parts, len(data))

    async def GetModel(self, data: bytes, context: object) -> bytes:
        header, _ = messages.decode(v1.GetModelRequest, data)
        model = self._registry.get(header.model.name, self._version(header.model)).model
        response = v1.GetModelResponse(
            model=description.encode(model.description),
            versions=[self._status(entry) for entry in self._registry.versions(header.model.name)],
            max_request_bytes=self._max_message_bytes,
        )
        return response.SerializeToString()

    async def ListModels(self, data: bytes, context: object) -> bytes:
        messages.decode(v1.ListModelsRequest, data)
        response = v1.ListModelsResponse(
            models=[self._status(entry) for entry in self._registry.entries()],
            unready_reasons=self._readiness.reasons(),
        )
        return response.SerializeToString()

    async def GetInitialWeights(self, data: bytes, context: object) -> bytes:
        header, _ = messages.decode(v1.GetInitialWeightsRequest, data)
        model = self._registry.get(header.model.name, self._version(header.model)).model
        spec = model.description.spec
        parts = spec.weights_parts(Structure(spec.weights.tree, model.initial_weights))
        return messages.encode(v1.GetInitialWeightsResponse(model=model.description.identity.message()), parts)

    def Pipeline(self, requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        pipeline = Pipeline(
            self._pipelined, self._max_message_bytes, self._admission, self._metrics.rpcs, self._departure
        )
        return pipeline.run(requests, context)

    def _version(self, selector: v1.ModelSelector) -> int:
        """The version that is asked for, 0 for the highest."""
        model = checked(selector)
        return self._registry.asked_for(model.name, model.version, model.label)

    def _status(self, entry: Entry) -> v1.ModelVersionStatus:
        return version_status(entry, self._registry.labels(entry.source))

    async def _call(
        self,
        response_type: type[MessageT],
        header: Any,
        function: Function,
        parts: Mapping[str, Structure],
        size_bytes: int,
        training: bool = False,
        weights_id: bytes = b"",
    ) -> Any:
        request = Request(
            header.model.name,
            self._version(header.model),
            function,
            parts,
            size_bytes,
            training,
            weights_id,
            principals.current(),
        )
        servable, results = await self._caller.call(request)
        pieces = self._codec.encode(servable.response_header(response_type), results)
        return pieces if len(pieces) >= _LONG_BYTES else pieces.join()


def version_status(entry: Entry, labels: Sequence[str]) -> v1.ModelVersionStatus:
    return v1.ModelVersionStatus(
        name=entry.source.name,
        version=entry.source.version,
        state=_STATES[entry.state],
        error=entry.error or entry.waiting,
        content_hash=entry.servable.identity.content_hash if entry.servable else b"",
        labels=labels,
    )
