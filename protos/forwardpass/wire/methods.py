"""The methods of the services, from their descriptors."""

from __future__ import annotations

import dataclasses

from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import ServiceDescriptorProto
from google.protobuf.message import Message

from forwardpass import v1


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """One RPC.

    path: gRPC's path, "/SERVICE/METHOD". streams_requests, streams_responses: whether these are streams.
    """

    name: str
    path: str
    request: type[Message]
    response: type[Message]
    streams_requests: bool
    streams_responses: bool

    @property
    def is_unary(self) -> bool:
        """Whether the method has one request and one response."""
        return not (self.streams_requests or self.streams_responses)


def _methods(service: ServiceDescriptor) -> dict[str, Method]:
    definition = ServiceDescriptorProto()
    service.CopyToProto(definition)
    return {
        method.name: Method(
            method.name,
            f"/{service.full_name}/{method.name}",
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
            proto.client_streaming,
            proto.server_streaming,
        )
        for method, proto in zip(service.methods, definition.method, strict=True)
    }


_MODELS = v1.SERVICE_FILE.services_by_name["FunctionalModelService"]
_WEIGHTS = v1.WEIGHTS_FILE.services_by_name["WeightsService"]
_SESSIONS = v1.SESSIONS_FILE.services_by_name["MetricsSessionService"]
_TRAINING = v1.TRAINING_FILE.services_by_name["TrainingService"]
_MANAGEMENT = v1.MANAGEMENT_FILE.services_by_name["ManagementService"]

MODEL_SERVICE: str = _MODELS.full_name
WEIGHTS_SERVICE: str = _WEIGHTS.full_name
SESSION_SERVICE: str = _SESSIONS.full_name
TRAINING_SERVICE: str = _TRAINING.full_name
MANAGEMENT_SERVICE: str = _MANAGEMENT.full_name
SERVICES: dict[str, dict[str, Method]] = {
    service.full_name: _methods(service) for service in (_MODELS, _WEIGHTS, _SESSIONS, _TRAINING, _MANAGEMENT)
}
"""The methods of each service, by name."""

METHODS: dict[str, Method] = {name: method for methods in SERVICES.values() for name, method in methods.items()}
"""The methods of all services, by name; the names are unique."""
