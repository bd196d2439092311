"""gRPC handlers of a servicer's methods. Requests and responses are bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from forwardpass.wire.chunks import Pieces
from forwardpass.wire.methods import SERVICES

Method = Callable[[Any, object], Awaitable[bytes | Pieces]]
"""A unary method: takes the bytes of a request and returns those of the response."""

MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""Constructors of handlers, by (requests are a stream, responses are a stream)."""


def of(service: str, servicer: object) -> grpc.GenericRpcHandler:
    """The handlers of all methods of a service. Each method is the attribute of the servicer with its name."""
    return grpc.method_handlers_generic_handler(
        service,
        {
            name: MAKERS[method.streams_requests, method.streams_responses](
                _joined(getattr(servicer, name)) if method.is_unary else getattr(servicer, name)
            )
            for name, method in SERVICES[service].items()
        },
    )


def unary(service: str, servicer: object) -> dict[str, Method]:
    """The unary methods of a service, by name."""
    return {name: getattr(servicer, name) for name, method in SERVICES[service].items() if method.is_unary}


def _joined(method: Method) -> Callable[[bytes, object], Awaitable[bytes]]:
    """The method, with its response joined to one bytes object."""

    async def joined(data: bytes, context: object) -> bytes:
        response = await method(data, context)
        return response.join() if isinstance(response, Pieces) else response

    return joined
