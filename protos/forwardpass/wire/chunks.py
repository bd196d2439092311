"""Long data in pieces of a size that gRPC moves best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from forwardpass.wire import fields
from forwardpass.wire.dtypes import Array
from forwardpass.wire.tensors import Buffer

MessageT = TypeVar("MessageT", bound=Message)

CHUNK_BYTES = 2 * 2**20
"""Measured: below 1 MiB the price of a message shows, above 4 MiB that of fresh memory for it."""


class Pieces:
    """A message that is not put together. Its length is that of the whole."""

    def __init__(self, buffers: Sequence[Buffer], size_bytes: int) -> None:
        self._buffers = buffers
        self._size_bytes = size_bytes

    def __len__(self) -> int:
        return self._size_bytes

    def join(self) -> bytes:
        return b"".join(self._buffers)  # type: ignore[arg-type]  # Arrays are buffers; the stubs say so since numpy 2.

    def after(self, start: bytes) -> Pieces:
        """The message that begins with other bytes before these."""
        return Pieces([start, *self._buffers], len(start) + self._size_bytes)

    def views(self) -> list[memoryview]:
        """Each piece as bytes, where it lies."""
        return [
            one.reshape(-1).view(np.uint8).data if isinstance(one, np.ndarray) else memoryview(one)
            for one in self._buffers
        ]

    def largest_offset(self) -> int:
        """Where in the message its largest piece begins."""
        sizes = [one.nbytes if isinstance(one, np.ndarray) else len(one) for one in self._buffers]
        return sum(sizes[: sizes.index(max(sizes, default=0))]) if sizes else 0


# TensorFlow shares the memory of an array that is aligned so; any other it copies.
_ALIGNMENT = 64


def aligned_buffer(size_bytes: int, aligned_at: int = 0) -> Array:
    """Bytes in which an array that begins at `aligned_at` can share its memory with a tensor."""
    raw = np.empty(size_bytes + _ALIGNMENT, np.uint8)
    start = -(raw.ctypes.data + aligned_at) % _ALIGNMENT
    return raw[start : start + size_bytes]


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
