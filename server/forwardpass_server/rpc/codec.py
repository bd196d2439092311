"""Decodes requests and encodes responses, timed; large ones on a thread beside the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from google.protobuf.message import Message

from forwardpass.wire import messages
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.structures import Structure
from forwardpass_server.telemetry.models import ModelMetrics

MessageT = TypeVar("MessageT", bound=Message)
ResultT = TypeVar("ResultT")


class Incoming(Generic[MessageT]):
    """A request whose header is decoded. size_bytes: of the whole request.

    Call `parts` to decode its structures, after the request is admitted.
    """

    def __init__(self, codec: Codec, request_type: type[MessageT], data: bytes) -> None:
        started = time.perf_counter()
        self._codec = codec
        self._envelope = messages.Envelope(request_type, data)
        self.header = self._envelope.header
        self.size_bytes = len(data)
        self._seconds = time.perf_counter() - started

    async def parts(self) -> dict[str, Structure]:
        """The structures, by the name of their field. Raises InvalidRequest or a subclass, which names the place."""
        started = time.perf_counter()
        parts = self._envelope.small_parts()
        if parts is None:
            parts = await self._codec.offload(self._envelope.parts)
        self._codec.metrics.decoded(self._seconds + time.perf_counter() - started)
        return parts


class Codec:
    """Decodes and encodes messages by `wire.messages`. max_message_bytes: the limit of a response.

    Each leaf and each string costs Python about 1 us, and a message of some kilobytes may hold a million. A message
    over the limits of `wire.limits.small_message` is therefore decoded and encoded on one thread beside the event loop.
    The event loop then waits for Python's lock at most 5 ms at a time; with more threads it would wait for each of
    them.
    """

    def __init__(self, max_message_bytes: int, metrics: ModelMetrics) -> None:
        self._max_message_bytes = max_message_bytes
        self.metrics = metrics
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="codec")

    def open(self, request_type: type[MessageT], data: bytes) -> Incoming[MessageT]:
        """Decodes the header of a request. Raises InvalidRequest."""
        return Incoming(self, request_type, data)

    async def encode(self, header: Message, parts: Mapping[str, Structure]) -> Pieces:
        """Encodes a response, in pieces. Raises MessageTooLarge."""
        started = time.perf_counter()
        if messages.is_small(parts):
            pieces = self._encode(header, parts)
        else:
            pieces = await self.offload(lambda: self._encode(header, parts))
        self.metrics.encoded(time.perf_counter() - started)
        return pieces

    def _encode(self, header: Message, parts: Mapping[str, Structure]) -> Pieces:
        return messages.encode_pieces(header, parts, self._max_message_bytes)

    async def offload(self, work: Callable[[], ResultT]) -> ResultT:
        """Runs long Python code on the codec's thread, one function at a time, and returns its result."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
