"""A servicer's methods as gRPC wants them, bytes in and out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from forwardpass.wire.chunks import Pieces
from forwardpass.wire.methods import SERVICES

Method = Callable[[Any, object], Awaitable[bytes | Pieces]]
"""A method that takes one request's bytes and returns its response's."""

MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""What makes a handler, by whether requests and responses are streams."""


def of(service: str, servicer: object) -> grpc.GenericRpcHandler:
    """Every method of a service, from the attribute of the servicer that has its name."""
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
    """The methods of a service that take one request and give one response, by name."""
    return {name: getattr(servicer, name) for name, method in SERVICES[service].items() if method.is_unary}


def _joined(method: Method) -> Callable[[bytes, object], Awaitable[bytes]]:
    """The method, with responses that are in pieces put together."""

    async def joined(data: bytes, context: object) -> bytes:
        response = await method(data, context)
        return response.join() if isinstance(response, Pieces) else response

    return joined
