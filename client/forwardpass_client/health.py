"""The health check of gRPC."""

from __future__ import annotations

from forwardpass.wire import fields
from forwardpass_client.call import Call


def check_health(service: str = "") -> Call[bool]:
    """Whether the server answers SERVING for a service; "" stands for the server as a whole.

    Source: grpc.health.v1.Health.Check, whose request is one string in field 1 and whose answer one enum in field 1.
    """

    def read(data: bytes) -> bool:
        return any(
            number == 1 and fields.read_varint(data, start, end)[0] == 1
            for number, _, _, start, end in fields.scan(data, 0, len(data))
        )

    name = service.encode()
    return Call("/grpc.health.v1.Health/Check", fields.prefix(1, len(name)) + name, read)
