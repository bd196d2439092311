"""Long data in pieces of a size that gRPC moves best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

from forwardpass.wire import fields

MessageT = TypeVar("MessageT", bound=Message)

CHUNK_BYTES = 2 * 2**20
"""Measured: below 1 MiB the price of a message shows, above 4 MiB that of fresh memory for it."""


def split(pieces: Iterable[memoryview], chunk_bytes: int = CHUNK_BYTES) -> Iterator[list[memoryview]]:
    """The bytes of all pieces, as lists of views that together hold at most `chunk_bytes`."""
    chunk: list[memoryview] = []
    room = chunk_bytes
    for view in pieces:
        position = 0
        while position < len(view):
            part = view[position : position + room]
            chunk.append(part)
            position += len(part)
            room -= len(part)
            if not room:
                yield chunk
                chunk, room = [], chunk_bytes
    if chunk:
        yield chunk


def encode(header: Message, chunk: list[memoryview]) -> bytes:
    """A message whose field `data` holds a chunk. header: its other fields."""
    number = header.DESCRIPTOR.fields_by_name["data"].number
    return b"".join([header.SerializeToString(), fields.prefix(number, sum(map(len, chunk))), *chunk])


def decode(message_type: type[MessageT], data: bytes) -> tuple[MessageT, memoryview]:
    """A message without its field `data`, and a view of that. Raises InvalidRequest."""
    number = message_type.DESCRIPTOR.fields_by_name["data"].number
    header, (start, end) = fields.without(message_type, data, number)
    return header, memoryview(data)[start:end]
