"""A servicer's methods as gRPC wants them, bytes in and out."""

from __future__ import annotations

import grpc

from forwardpass.wire.methods import SERVICES

_KINDS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def of(service: str, servicer: object) -> grpc.GenericRpcHandler:
    """Every method of a service, from the attribute of the servicer that has its name."""
    return grpc.method_handlers_generic_handler(
        service,
        {
            name: _KINDS[method.streams_requests, method.streams_responses](getattr(servicer, name))
            for name, method in SERVICES[service].items()
        },
    )
