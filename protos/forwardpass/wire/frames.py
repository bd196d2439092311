"""Frames: calls and answers on a stream, numbered, several in one message, long ones split."""

from __future__ import annotations

import collections
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from forwardpass import v1
from forwardpass.wire import errors, fields
from forwardpass.wire.chunks import CHUNK_BYTES, Pieces, aligned_buffer

_FRAMES = v1.PipelineRequest.DESCRIPTOR.fields_by_name["frames"].number
_CALL = 1
_METHOD, _TIMEOUT, _REQUEST_SIZE, _REQUEST, _LARGEST = 2, 3, 4, 5, 6
_STATUS, _MESSAGE, _DETAIL, _RESPONSE_SIZE, _RESPONSE = 2, 3, 4, 5, 6

# The names of gRPC's status codes; the index is the code.
STATUSES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)

# Limit of calls on one stream that have arrived in part.
_MAX_ARRIVING = 1024

# Limit of the other fields of a message besides its frames. Present messages have at most one.
_MAX_OTHERS = 128

_DOUBLE = struct.Struct("<d")
_CALL_TAG = fields.varint(_CALL << 3 | fields.VARINT)
_TIMEOUT_TAG = fields.varint(_TIMEOUT << 3 | fields.FIXED64)


class Frame(NamedTuple):
    """A part of a call or of an answer. data: a view of the message.

    The first frame of a call also holds: method, timeout_s (0 for no limit), size_bytes of the whole call, and
    largest_array_offset, where the elements of its largest array begin.
    The first frame of an answer also holds: status (0 for success), message, detail, size_bytes of the whole answer.
    """

    call: int
    data: memoryview
    size_bytes: int = 0
    method: str = ""
    timeout_s: float = 0.0
    largest_array_offset: int = 0
    status: int = 0
    message: str = ""
    detail: bytes = b""


def encode_call(method: str, timeout_s: float | None, size_bytes: int, largest_array_offset: int = 0) -> bytes:
    """The head of a call: the fields of its first frame except number and data."""
    head = _encode_call(method, size_bytes, largest_array_offset)
    return head if timeout_s is None else _TIMEOUT_TAG + _DOUBLE.pack(timeout_s) + head


@functools.lru_cache(maxsize=1024)
def _encode_call(method: str, size_bytes: int, largest_array_offset: int) -> bytes:
    name = method.encode()
    encoded = fields.prefix(_METHOD, len(name)) + name
    if largest_array_offset:
        encoded += _integer(_LARGEST, largest_array_offset)
    return encoded + _integer(_REQUEST_SIZE, size_bytes)


@functools.lru_cache(maxsize=1024)
def encode_answer(size_bytes: int) -> bytes:
    """The head of an answer: the fields of its first frame except number and data."""
    return _integer(_RESPONSE_SIZE, size_bytes)


def encode_error(error: errors.ForwardPassError) -> bytes:
    """The head of the answer to a failed call."""
    text = errors.encode_message(error).encode(errors="replace")
    detail = errors.encode_detail(error)
    return (
        _integer(_STATUS, STATUSES.index(error.status))
        + fields.prefix(_MESSAGE, len(text))
        + text
        + fields.prefix(_DETAIL, len(detail))
        + detail
    )


def _integer(number: int, value: int) -> bytes:
    return fields.varint(number << 3 | fields.VARINT) + fields.varint(value)


def decode_calls(message: bytes) -> Iterator[Frame]:
    """The frames of a PipelineRequest. Raises InvalidRequest."""
    return _CALLS.read(message)


def decode_answers(message: bytes) -> Iterator[Frame]:
    """The frames of a PipelineResponse. Raises InvalidRequest."""
    return _ANSWERS.read(message)


def _decode_call(message: bytes, start: int, end: int) -> tuple[Frame, int]:
    """One frame, and where its data ends."""
    call, size_bytes, timeout_s, method, largest = 0, 0, 0.0, "", 0
    data_start = data_end = start
    for number, wire_type, _, value_start, value_end in fields.scan_few(message, start, end):
        if number == _REQUEST and wire_type == fields.LENGTH_DELIMITED:
            data_start, data_end = value_start, value_end
        elif number == _CALL and wire_type == fields.VARINT:
            call, _ = fields.read_varint(message, value_start, value_end)
        elif number == _METHOD and wire_type == fields.LENGTH_DELIMITED:
            method = _text(message[value_start:value_end])
        elif number == _TIMEOUT and wire_type == fields.FIXED64:
            (timeout_s,) = _DOUBLE.unpack_from(message, value_start)
        elif number == _REQUEST_SIZE and wire_type == fields.VARINT:
            size_bytes, _ = fields.read_varint(message, value_start, value_end)
        elif number == _LARGEST and wire_type == fields.VARINT:
            largest, _ = fields.read_varint(message, value_start, value_end)
    data = memoryview(message)[data_start:data_end]
    return Frame(call, data, size_bytes, method, timeout_s, largest), data_end


def _decode_answer(message: bytes, start: int, end: int) -> tuple[Frame, int]:
    """One frame, and where its data ends."""
    call, size_bytes, status, text, detail = 0, 0, 0, "", b""
    data_start = data_end = start
    for number, wire_type, _, value_start, value_end in fields.scan_few(message, start, end):
        if number == _RESPONSE and wire_type == fields.LENGTH_DELIMITED:
            data_start, data_end = value_start, value_end
        elif number == _CALL and wire_type == fields.VARINT:
            call, _ = fields.read_varint(message, value_start, value_end)
        elif number == _STATUS and wire_type == fields.VARINT:
            status, _ = fields.read_varint(message, value_start, value_end)
        elif number == _MESSAGE and wire_type == fields.LENGTH_DELIMITED:
            text = _text(message[value_start:value_end])
        elif number == _DETAIL and wire_type == fields.LENGTH_DELIMITED:
            detail = message[value_start:value_end]
        elif number == _RESPONSE_SIZE and wire_type == fields.VARINT:
            size_bytes, _ = fields.read_varint(message, value_start, value_end)
    data = memoryview(message)[data_start:data_end]
    return Frame(call, data, size_bytes, status=status, message=text, detail=detail), data_end


# Limits of the cache of heads: any client can send heads, and must not fill the memory.
_KEPT_HEAD_BYTES = 64
_KEPT_HEADS = 256


class _Frames:
    """Reads the frames of one direction, with a cache of heads.

    A frame as written by this module begins with its number and, for a call, its timeout. The bytes from there to the
    data (the head) are usually the same from call to call. Each head is cached with its decoded frame, under the number
    of bytes from the head's start to the frame's end. For a frame with a cached head only the rest is decoded.
    """

    def __init__(self, decode: Callable[[bytes, int, int], tuple[Frame, int]], *, have_timeouts: bool) -> None:
        self._decode = decode
        self._have_timeouts = have_timeouts
        self._heads: dict[int, tuple[bytes, Frame]] = {}

    def read(self, message: bytes) -> Iterator[Frame]:
        """The frames of a message. Raises InvalidRequest."""
        view = memoryview(message)
        others = 0
        for number, wire_type, _, start, end in fields.scan(message, 0, len(message)):
            if number != _FRAMES or wire_type != fields.LENGTH_DELIMITED:
                others += 1
                if others > _MAX_OTHERS:
                    raise fields.malformed(f"more than {_MAX_OTHERS} fields besides frames", start)
                continue
            if not message.startswith(_CALL_TAG, start, end):
                yield self._decode(message, start, end)[0]
                continue
            call, position = fields.read_varint(message, start + 1, end)
            timeout_s = 0.0
            if self._have_timeouts and message.startswith(_TIMEOUT_TAG, position) and position + 9 <= end:
                (timeout_s,) = _DOUBLE.unpack_from(message, position + 1)
                position += 9
            head, first = self._heads.get(end - position, _NO_HEAD)
            if head and message.startswith(head, position):
                data = view[position + len(head) : end]
                yield Frame(call, data, first.size_bytes, first.method, timeout_s, first.largest_array_offset)
            else:
                yield self._read_uncached(message, start, position, end)

    def _read_uncached(self, message: bytes, start: int, head_start: int, end: int) -> Frame:
        frame, data_end = self._decode(message, start, end)
        head = message[head_start : end - len(frame.data)]
        if (
            frame.data
            and data_end == end
            and not (frame.status or frame.message or frame.detail)
            and len(head) <= _KEPT_HEAD_BYTES
            and not any(number in (_CALL, _TIMEOUT) for number, *_ in fields.scan_few(message, head_start, end))
        ):
            if len(self._heads) >= _KEPT_HEADS:
                self._heads.clear()
            self._heads[end - head_start] = head, frame._replace(data=memoryview(b""))
        return frame


_NO_HEAD = b"", Frame(0, memoryview(b""))
_CALLS = _Frames(_decode_call, have_timeouts=True)
_ANSWERS = _Frames(_decode_answer, have_timeouts=False)


def check(frame: Frame) -> None:
    """Raises the error of an answer; does nothing for a successful one."""
    if frame.status:
        name = STATUSES[frame.status] if frame.status < len(STATUSES) else "UNKNOWN"
        raise errors.decode(name, frame.message, frame.detail)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


class _Leaving:
    """A call or an answer that is being sent. head: of its first frame; then b"". data: the unsent rest."""

    __slots__ = ("call", "data", "head")

    def __init__(self, call: int, head: bytes, data: bytes | collections.deque[memoryview]) -> None:
        self.call = call
        self.head = head
        self.data = data

    def take(self, room: int) -> tuple[Sequence[bytes | memoryview], int]:
        """Removes the next buffers, of at most `room` bytes together. Returns them and their length."""
        if isinstance(self.data, bytes):
            if len(self.data) <= room:
                whole, self.data = self.data, b""
                return (whole,), len(whole)
            self.data = collections.deque([memoryview(self.data)])
        parts = []
        size_bytes = 0
        while self.data and size_bytes < room:
            view = self.data.popleft()
            if len(view) > room - size_bytes:
                self.data.appendleft(view[room - size_bytes :])
                view = view[: room - size_bytes]
            parts.append(view)
            size_bytes += len(view)
        return parts, size_bytes


class Outbox:
    """Calls or answers that wait to be sent, in messages of about `CHUNK_BYTES`.

    A long one is split into frames, and others are sent between its frames. in_order: send each one completely before
    the next.
    """

    def __init__(self, *, answers: bool, in_order: bool = False) -> None:
        self._data = _RESPONSE if answers else _REQUEST
        self._in_order = in_order
        self._leaving: collections.deque[_Leaving] = collections.deque()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._leaving)

    def put(self, call: int, head: bytes, data: bytes | Pieces = b"") -> None:
        """Adds a call or an answer. head: from `encode_call`, `encode_answer` or `encode_error`."""
        views = data if isinstance(data, bytes) else collections.deque(view for view in data.views() if view)
        self._leaving.append(_Leaving(call, head, views))
        self.size_bytes += len(data)

    def clear(self) -> None:
        """Drops everything that is unsent."""
        self._leaving.clear()
        self.size_bytes = 0

    def next_message(self) -> bytes:
        """Removes and returns the next message. The outbox must not be empty."""
        pieces: list[bytes | memoryview] = []
        room = CHUNK_BYTES
        for _ in range(len(self._leaving)):
            if room <= 0:
                break
            one = self._leaving.popleft()
            parts, size_bytes = one.take(room)
            head = _CALL_TAG + fields.varint(one.call) + one.head
            if size_bytes:
                head += fields.prefix(self._data, size_bytes)
            pieces.append(fields.prefix(_FRAMES, len(head) + size_bytes) + head)
            pieces += parts
            self.size_bytes -= size_bytes
            one.head = b""
            room -= size_bytes + len(head)
            if one.data and self._in_order:
                self._leaving.appendleft(one)
            elif one.data:
                self._leaving.append(one)
        return b"".join(pieces)


class Inbox:
    """Joins frames to calls or answers.

    max_bytes: the limit for one. total_bytes: the limit for all incomplete ones together.
    """

    def __init__(self, max_bytes: int, total_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._total_bytes = total_bytes
        self._arriving: dict[int, _Arriving] = {}
        self.size_bytes = 0

    def take(self, frame: Frame) -> tuple[Frame, bytes | memoryview] | None:
        """Adds a frame. Returns the first frame and all data of its call or answer when it is complete, else None.

        Raises MessageTooLarge, ServerOverloaded or InvalidRequest; the call is then dropped.
        """
        arriving = self._arriving.get(frame.call)
        if arriving is None:
            if len(frame.data) == frame.size_bytes:
                return frame, bytes(frame.data)
            self._check(frame)
            arriving = self._arriving[frame.call] = _Arriving(frame)
            self.size_bytes += frame.size_bytes
        end = arriving.received + len(frame.data)
        if end > len(arriving.buffer):
            self.drop(frame.call)
            raise errors.InvalidRequest(
                place=f"call {frame.call}", expected=f"{len(arriving.buffer)} bytes", found=f"{end} or more"
            )
        arriving.buffer[arriving.received : end] = np.frombuffer(frame.data, np.uint8)
        arriving.received = end
        if end < len(arriving.buffer):
            return None
        self.drop(frame.call)
        return arriving.first, arriving.buffer.data.toreadonly()

    def drop(self, call: int) -> None:
        """Drops an incomplete call."""
        arriving = self._arriving.pop(call, None)
        if arriving is not None:
            self.size_bytes -= len(arriving.buffer)

    def clear(self) -> None:
        """Drops all incomplete calls."""
        for call in list(self._arriving):
            self.drop(call)

    def _check(self, frame: Frame) -> None:
        if frame.size_bytes > self._max_bytes:
            raise errors.MessageTooLarge(
                place=f"call {frame.call}", expected=f"at most {self._max_bytes} bytes", found=f"{frame.size_bytes}"
            )
        if len(self._arriving) >= _MAX_ARRIVING or self.size_bytes + frame.size_bytes > self._total_bytes:
            raise errors.ServerOverloaded(
                f"{len(self._arriving)} calls of {self.size_bytes} bytes are incomplete, the limit is "
                f"{_MAX_ARRIVING} calls of {self._total_bytes} bytes: retry later",
                retry_after_s=0.1,
            )
        if frame.size_bytes < len(frame.data):
            raise errors.InvalidRequest(
                place=f"call {frame.call}", expected=f"{frame.size_bytes} bytes", found=f"{len(frame.data)} or more"
            )


class _Arriving:
    """An incomplete call or answer."""

    def __init__(self, first: Frame) -> None:
        self.first = first._replace(data=memoryview(b""))
        self.buffer = aligned_buffer(first.size_bytes, first.largest_array_offset)
        self.received = 0
