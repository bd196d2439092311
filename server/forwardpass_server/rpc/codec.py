"""Calls from bytes and to bytes, timed; long ones beside the event loop."""

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
    """A request of which the header is decoded. size_bytes: of all of it.

    The structures are decoded once the request is admitted: see `parts`.
    """

    def __init__(self, codec: Codec, request_type: type[MessageT], data: bytes) -> None:
        started = time.perf_counter()
        self._codec = codec
        self._envelope = messages.Envelope(request_type, data)
        self.header = self._envelope.header
        self.size_bytes = len(data)
        self._seconds = time.perf_counter() - started

    async def parts(self) -> dict[str, Structure]:
        """The structures. Raises InvalidRequest or a subclass, naming the place."""
        started = time.perf_counter()
        parts = self._envelope.small_parts()
        if parts is None:
            parts = await self._codec.aside(self._envelope.parts)
        self._codec.metrics.decoded(self._seconds + time.perf_counter() - started)
        return parts


class Codec:
    """`wire.messages` for requests and responses. max_message_bytes: of a response.

    Each leaf and each string costs Python about a microsecond, and a message of some kilobytes may hold a million.
    What has more than `wire.limits.small_message` is therefore decoded and encoded on one thread beside the event loop:
    while it runs, the event loop waits for Python's lock for 5 ms at most at a time. More threads would make it wait
    for each of them.
    """

    def __init__(self, max_message_bytes: int, metrics: ModelMetrics) -> None:
        self._max_message_bytes = max_message_bytes
        self.metrics = metrics
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="codec")

    def open(self, request_type: type[MessageT], data: bytes) -> Incoming[MessageT]:
        """Decodes the header of a request. Raises InvalidRequest."""
        return Incoming(self, request_type, data)

    async def encode(self, header: Message, parts: Mapping[str, Structure]) -> Pieces:
        """A response in pieces. Raises MessageTooLarge."""
        started = time.perf_counter()
        if messages.is_small(parts):
            pieces = self._encode(header, parts)
        else:
            pieces = await self.aside(lambda: self._encode(header, parts))
        self.metrics.encoded(time.perf_counter() - started)
        return pieces

    def _encode(self, header: Message, parts: Mapping[str, Structure]) -> Pieces:
        return messages.encode_pieces(header, parts, self._max_message_bytes)

    async def aside(self, work: Callable[[], ResultT]) -> ResultT:
        """Does work that takes long in Python beside the event loop, one piece of work after another."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
