"""The methods of FunctionalModelService: messages in, one call, messages out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from forwardpass import v1
from forwardpass.wire import description, messages
from forwardpass.wire.description import Function
from forwardpass.wire.methods import METHODS, SERVICE
from forwardpass.wire.structures import Structure
from forwardpass_server.serving.calls import Caller
from forwardpass_server.serving.registry import Entry, Registry, State

MessageT = TypeVar("MessageT", bound=Message)

_STATES = {
    State.LOADING: v1.ModelState.MODEL_STATE_LOADING,
    State.AVAILABLE: v1.ModelState.MODEL_STATE_AVAILABLE,
    State.FAILED: v1.ModelState.MODEL_STATE_FAILED,
}


class FunctionalModelServicer:
    """Each method has the name of its RPC, takes the request's bytes and returns the response's."""

    def __init__(self, registry: Registry, caller: Caller, max_message_bytes: int) -> None:
        self._registry = registry
        self._caller = caller
        self._max_message_bytes = max_message_bytes

    async def ForwardPass(self, data: bytes, context: object) -> bytes:
        header, parts = messages.decode(v1.ForwardPassRequest, data)
        return await self._call(
            v1.ForwardPassResponse, header.model, Function.FORWARD_PASS, parts, len(data), header.training
        )

    async def PredictOnBatch(self, data: bytes, context: object) -> bytes:
        header, parts = messages.decode(v1.PredictOnBatchRequest, data)
        return await self._call(
            v1.PredictOnBatchResponse, header.model, Function.PREDICT_ON_BATCH, parts, len(data), header.training
        )

    async def Loss(self, data: bytes, context: object) -> bytes:
        header, parts = messages.decode(v1.LossRequest, data)
        function = Function.WEIGHTED_LOSS if "sample_weight" in parts else Function.LOSS
        return await self._call(v1.LossResponse, header.model, function, parts, len(data))

    async def InitializeMetricsState(self, data: bytes, context: object) -> bytes:
        header, parts = messages.decode(v1.InitializeMetricsStateRequest, data)
        return await self._call(
            v1.InitializeMetricsStateResponse, header.model, Function.INITIALIZE_METRICS_STATE, parts, len(data)
        )

    async def UpdateMetricsState(self, data: bytes, context: object) -> bytes:
        header, parts = messages.decode(v1.UpdateMetricsStateRequest, data)
        weighted = "sample_weight" in parts
        function = Function.WEIGHTED_UPDATE_METRICS_STATE if weighted else Function.UPDATE_METRICS_STATE
        return await self._call(v1.UpdateMetricsStateResponse, header.model, function, parts, len(data))

    async def FinalizeMetrics(self, data: bytes, context: object) -> bytes:
        header, parts = messages.decode(v1.FinalizeMetricsRequest, data)
        return await self._call(v1.FinalizeMetricsResponse, header.model, Function.FINALIZE_METRICS, parts, len(data))

    async def GetModel(self, data: bytes, context: object) -> bytes:
        header, _ = messages.decode(v1.GetModelRequest, data)
        model = self._registry.get(header.model.name, header.model.version).model
        response = v1.GetModelResponse(
            model=description.encode(model.description),
            versions=[_status(entry) for entry in self._registry.versions(header.model.name)],
            max_request_bytes=self._max_message_bytes,
        )
        return response.SerializeToString()

    async def ListModels(self, data: bytes, context: object) -> bytes:
        messages.decode(v1.ListModelsRequest, data)
        response = v1.ListModelsResponse(models=[_status(entry) for entry in self._registry.entries()])
        return response.SerializeToString()

    async def GetInitialWeights(self, data: bytes, context: object) -> bytes:
        header, _ = messages.decode(v1.GetInitialWeightsRequest, data)
        model = self._registry.get(header.model.name, header.model.version).model
        parts = model.description.spec.weights_parts(model.initial_weights)
        return messages.encode(v1.GetInitialWeightsResponse(model=model.description.identity.message()), parts)

    async def _call(
        self,
        response_type: type[MessageT],
        selector: v1.ModelSelector,
        function: Function,
        parts: Mapping[str, Structure],
        size_bytes: int,
        training: bool = False,
    ) -> bytes:
        servable, results = await self._caller.call(
            selector.name, selector.version, function, parts, size_bytes, training
        )
        return messages.encode(servable.response_header(response_type), results, self._max_message_bytes)


def _status(entry: Entry) -> v1.ModelVersionStatus:
    return v1.ModelVersionStatus(
        name=entry.source.name,
        version=entry.source.version,
        state=_STATES[entry.state],
        error=entry.error,
        content_hash=entry.servable.identity.content_hash if entry.servable else b"",
    )


def handlers(servicer: FunctionalModelServicer) -> grpc.GenericRpcHandler:
    """The servicer's methods as gRPC wants them, bytes in and out."""
    return grpc.method_handlers_generic_handler(
        SERVICE, {name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name)) for name in METHODS}
    )
