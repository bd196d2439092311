"""Large data in chunks of the size that gRPC transfers fastest."""

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
"""Measured: chunks below 1 MiB lose time per message, chunks above 4 MiB for the allocation of memory."""


class Pieces:
    """A message as a list of buffers that are not joined. `len` is the length of the whole message in bytes."""

    def __init__(self, buffers: Sequence[Buffer], size_bytes: int) -> None:
        self._buffers = buffers
        self._size_bytes = size_bytes

    def __len__(self) -> int:
        return self._size_bytes

    def join(self) -> bytes:
        """The message as one bytes object."""
        return b"".join(self._buffers)  # type: ignore[arg-type]  # Arrays are buffers; the stubs say so since numpy 2.

    def after(self, start: bytes) -> Pieces:
        """The message with other bytes before these."""
        return Pieces([start, *self._buffers], len(start) + self._size_bytes)

    def views(self) -> list[memoryview]:
        """A view of the bytes of each buffer; nothing is copied."""
        return [
            one.reshape(-1).view(np.uint8).data if isinstance(one, np.ndarray) else memoryview(one)
            for one in self._buffers
        ]

    def largest_offset(self) -> int:
        """The offset of the largest buffer in the message."""
        sizes = [one.nbytes if isinstance(one, np.ndarray) else len(one) for one in self._buffers]
        return sum(sizes[: sizes.index(max(sizes, default=0))]) if sizes else 0


# TensorFlow shares the memory of an array with this alignment, and copies any other array.
_ALIGNMENT = 64


def aligned_buffer(size_bytes: int, aligned_at: int = 0) -> Array:
    """A uint8 array of shape [size_bytes]. An array at offset `aligned_at` in it can share memory with a tensor."""
    raw = np.empty(size_bytes + _ALIGNMENT, np.uint8)
    start = -(raw.ctypes.data + aligned_at) % _ALIGNMENT
    return raw[start : start + size_bytes]


def split(pieces: Iterable[memoryview], chunk_bytes: int = CHUNK_BYTES) -> Iterator[list[memoryview]]:
    """Splits the bytes of all pieces into chunks. Each chunk is a list of views of at most `chunk_bytes` together."""
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
    """Encodes a message whose field `data` holds a chunk. header: its other fields."""
    number = header.DESCRIPTOR.fields_by_name["data"].number
    return b"".join([header.SerializeToString(), fields.prefix(number, sum(map(len, chunk))), *chunk])


def decode(message_type: type[MessageT], data: bytes) -> tuple[MessageT, memoryview]:
    """Decodes a message to its other fields and a view of its field `data`. Raises InvalidRequest."""
    number = message_type.DESCRIPTOR.fields_by_name["data"].number
    header, (start, end) = fields.without(message_type, data, number)
    return header, memoryview(data)[start:end]
