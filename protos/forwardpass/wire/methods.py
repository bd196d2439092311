"""The methods of the service, as its descriptor lists them."""

from __future__ import annotations

import dataclasses

from google.protobuf import message_factory
from google.protobuf.message import Message

from forwardpass import v1


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """One RPC. path: what gRPC calls it by."""

    name: str
    path: str
    request: type[Message]
    response: type[Message]


SERVICE = v1.SERVICE_FILE.services_by_name["FunctionalModelService"].full_name

METHODS: dict[str, Method] = {
    method.name: Method(
        method.name,
        f"/{SERVICE}/{method.name}",
        message_factory.GetMessageClass(method.input_type),
        message_factory.GetMessageClass(method.output_type),
    )
    for method in v1.SERVICE_FILE.services_by_name["FunctionalModelService"].methods
}
