"""Connections to a server."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import TypeVar

from forwardpass.wire import errors
from forwardpass_client import calls
from forwardpass_client.calls import Call, ModelVersion
from forwardpass_client.model import AsyncRemoteFunctionalModel, RemoteFunctionalModel
from forwardpass_client.transport import AsyncTransport, Transport

ResultT = TypeVar("ResultT")

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_MESSAGE_BYTES = 256 * 2**20
_POLL_S = 0.2


def connect(
    target: str,
    *,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
) -> Client:
    """A client of the server at `target`, "host:port" or any other gRPC target. Nothing is sent yet.

    timeout_s: seconds that each call may take, retries included; None for no limit.
    max_message_bytes: the longest request and response. The server has a limit of its own.
    Calls that meet a server that is gone or stopping are sent again, up to four times within some seconds.
    """
    return Client(target, timeout_s, max_message_bytes)


def connect_async(
    target: str,
    *,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
) -> AsyncClient:
    """`connect` for asyncio. Call it, and use the client, on one event loop."""
    return AsyncClient(target, timeout_s, max_message_bytes)


class Client:
    """One connection, for any number of threads. A context manager: leaving it closes the connection."""

    def __init__(self, target: str, timeout_s: float | None, max_message_bytes: int) -> None:
        self._transport = Transport(target, max_message_bytes)
        self._timeout_s = timeout_s
        self._max_message_bytes = max_message_bytes

    def model(self, name: str, version: int | None = None) -> RemoteFunctionalModel:
        """A model of the server; without a version, the highest that is available now, and that one from then on.

        Raises ModelNotFound, ModelVersionNotFound, ModelFailed, or ModelLoading.
        """
        found = self._run(calls.get_model(name, version))
        return RemoteFunctionalModel(self._transport, found, self._max_message_bytes, self._timeout_s)

    def models(self) -> list[ModelVersion]:
        """Every version of every model, by name and version, those that failed to load included."""
        return self._run(calls.list_models())

    def is_ready(self) -> bool:
        """Whether the server has tried to load every model, and is not about to stop. Raises ServerUnavailable."""
        return self._run(calls.check_health())

    def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Waits for a server that is still starting. Raises DeadlineExceeded."""
        deadline = time.monotonic() + timeout_s
        while not self._is_ready_now():
            if time.monotonic() > deadline:
                raise errors.DeadlineExceeded(f"the server was not ready within {timeout_s:g} s")
            time.sleep(_POLL_S)

    def _is_ready_now(self) -> bool:
        try:
            return self.is_ready()
        except errors.ServerUnavailable:
            return False

    def close(self) -> None:
        """Ends the connection. Calls in flight raise CallCancelled."""
        self._transport.close()

    def _run(self, call: Call[ResultT]) -> ResultT:
        return call.read(self._transport.call(call.path, call.request, self._timeout_s))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio."""

    def __init__(self, target: str, timeout_s: float | None, max_message_bytes: int) -> None:
        self._transport = AsyncTransport(target, max_message_bytes)
        self._timeout_s = timeout_s
        self._max_message_bytes = max_message_bytes

    async def model(self, name: str, version: int | None = None) -> AsyncRemoteFunctionalModel:
        """See `Client.model`."""
        found = await self._run(calls.get_model(name, version))
        return AsyncRemoteFunctionalModel(self._transport, found, self._max_message_bytes, self._timeout_s)

    async def models(self) -> list[ModelVersion]:
        """See `Client.models`."""
        return await self._run(calls.list_models())

    async def is_ready(self) -> bool:
        """See `Client.is_ready`."""
        return await self._run(calls.check_health())

    async def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """See `Client.wait_until_ready`."""
        deadline = time.monotonic() + timeout_s
        while not await self._is_ready_now():
            if time.monotonic() > deadline:
                raise errors.DeadlineExceeded(f"the server was not ready within {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def _is_ready_now(self) -> bool:
        try:
            return await self.is_ready()
        except errors.ServerUnavailable:
            return False

    async def close(self) -> None:
        """See `Client.close`."""
        await self._transport.close()

    async def _run(self, call: Call[ResultT]) -> ResultT:
        return call.read(await self._transport.call(call.path, call.request, self._timeout_s))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
