"""What the transport makes of gRPC's own errors."""

from __future__ import annotations

import grpc
import pytest

from forwardpass_client import errors, transport


def failed(code: grpc.StatusCode, details: str) -> grpc.RpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


def test_a_connection_that_is_lost_while_sending_means_an_unavailable_server():
    with pytest.raises(errors.ServerUnavailable), transport._Errors():
        raise failed(grpc.StatusCode.INTERNAL, "Internal error from Core")


def test_other_internal_errors_are_raised_as_internal_error():
    with pytest.raises(errors.InternalError), transport._Errors():
        raise failed(grpc.StatusCode.INTERNAL, "something else")
