"""Calls from bytes and to bytes, timed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import Message

from forwardpass.wire import messages
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.structures import Structure
from forwardpass_server.telemetry.models import ModelMetrics

MessageT = TypeVar("MessageT", bound=Message)


class Codec:
    """`wire.messages`, for calls of models. max_message_bytes: of an answer."""

    def __init__(self, max_message_bytes: int, metrics: ModelMetrics) -> None:
        self._max_message_bytes = max_message_bytes
        self._metrics = metrics

    def decode(self, request_type: type[MessageT], data: bytes) -> tuple[MessageT, dict[str, Structure]]:
        """The header and the structures of a request. Raises InvalidRequest."""
        started = time.perf_counter()
        decoded = messages.decode(request_type, data)
        self._metrics.decoded(time.perf_counter() - started)
        return decoded

    def encode(self, header: Message, parts: Mapping[str, Structure]) -> Pieces:
        """A response in pieces. Raises MessageTooLarge."""
        started = time.perf_counter()
        pieces = messages.encode_pieces(header, parts, self._max_message_bytes)
        self._metrics.encoded(time.perf_counter() - started)
        return pieces
