"""gRPC channels: the only module that knows them. Bytes out, bytes in, errors of the catalogue."""

from __future__ import annotations

import json
from typing import Any

import grpc

from forwardpass.wire import errors
from forwardpass.wire.methods import SERVICE

# Every method is a pure function of its request: a call that a server dropped, or never got, may be sent again.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                # gRPC allows no more than 5. Together they span some 3 s, the restart of a process.
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                # A server that stops answers CANCELLED to calls that it had begun.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ]
}


_CLOSED = "the client is closed"


def _options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        # A request longer than this buffer would not be sent again.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # A peer that is gone without a word is noticed while a call waits for it.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
    ]


class Transport:
    """Calls over one channel, from any thread."""

    def __init__(self, target: str, max_message_bytes: int) -> None:
        self._channel = grpc.insecure_channel(target, _options(max_message_bytes))
        self._is_closed = False
        self._methods: dict[str, Any] = {}

    def call(self, path: str, request: bytes, timeout_s: float | None) -> bytes:
        """One unary call. Raises the error that its status stands for."""
        method = self._methods.get(path)
        if method is None:
            method = self._methods[path] = self._channel.unary_unary(path)
        try:
            response: bytes = method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _decode(error) from None
        except ValueError:
            if self._is_closed:
                raise errors.CallCancelled(_CLOSED) from None
            raise
        return response

    def close(self) -> None:
        self._is_closed = True
        self._channel.close()


class AsyncTransport:
    """Calls over one channel, on the event loop that made it."""

    def __init__(self, target: str, max_message_bytes: int) -> None:
        self._channel = grpc.aio.insecure_channel(target, _options(max_message_bytes))
        self._is_closed = False
        self._methods: dict[str, Any] = {}

    async def call(self, path: str, request: bytes, timeout_s: float | None) -> bytes:
        """One unary call. Raises the error that its status stands for."""
        method = self._methods.get(path)
        if method is None:
            method = self._methods[path] = self._channel.unary_unary(path)
        try:
            response: bytes = await method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _decode(error) from None
        except Exception:  # Of a class that grpc does not export.
            if self._is_closed:
                raise errors.CallCancelled(_CLOSED) from None
            raise
        return response

    async def close(self) -> None:
        self._is_closed = True
        await self._channel.close()


def _decode(error: Any) -> errors.ForwardPassError:
    trailing = dict(error.trailing_metadata() or ())
    return errors.decode(error.code().name, error.details() or "", trailing.get(errors.DETAIL_KEY))
