"""The protobuf wire format, field by field: read in place, written without a copy.

protobuf's own parser copies a `bytes` field several times; at 16 MB this leaves a fifth of gRPC's throughput. Messages
with arrays are therefore parsed here, and only their small fields by protobuf.
Source: the protobuf encoding specification.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from forwardpass.wire import errors
from forwardpass.wire.limits import MAX_MESSAGE_FIELDS, Budget, LimitExceeded

MessageT = TypeVar("MessageT", bound=Message)

VARINT = 0
FIXED64 = 1
LENGTH_DELIMITED = 2
FIXED32 = 5

_MAX_FIELD_NUMBER = 2**29 - 1

# Twice the fields of a structure with the maximum of leaves. Each field costs time and memory, even if it has few
# bytes.
_MAX_FIELDS = 2**17

# For a message without repeated fields: about ten times what any has now, with room for later versions.
_FEW_FIELDS = 128


def read_varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """An unsigned 64-bit varint at `position`, and the position after it. Raises InvalidRequest."""
    value = shift = 0
    while position < end:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
        shift += 7
        if shift > 63:
            raise malformed("a varint longer than 10 bytes", position)
    raise malformed("a varint without an end", position)


def scan(
    data: bytes, start: int, end: int, budget: Budget | None = None, max_fields: int = _MAX_FIELDS
) -> Iterator[tuple[int, int, int, int, int]]:
    """The fields of the message in data[start:end], in order.

    Each is (number, wire type, start of the whole field, start of its value, end of its value). The value of a
    length-delimited field excludes its length.
    budget: the budget of the whole message; the number of fields is subtracted when the scan ends.
    Raises InvalidRequest for bytes that are not a protobuf message, or LimitExceeded.
    """
    position = start
    most = max_fields if budget is None else max(min(max_fields, budget.fields), 0)
    for count in range(most):
        if position >= end:
            if budget is not None:
                budget.fields -= count
            return
        field_start = position
        # Nearly every tag and length is one byte: avoid a function call then.
        tag = data[position]
        if tag < 0x80:
            position += 1
        else:
            tag, position = read_varint(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        if not 0 < number <= _MAX_FIELD_NUMBER:
            raise malformed(f"field number {number}", field_start)
        if wire_type == LENGTH_DELIMITED:
            if position < end and data[position] < 0x80:
                length = data[position]
                position += 1
            else:
                length, position = read_varint(data, position, end)
            value_end = position + length
        elif wire_type == VARINT:
            _, value_end = read_varint(data, position, end)
        elif wire_type == FIXED64:
            value_end = position + 8
        elif wire_type == FIXED32:
            value_end = position + 4
        else:
            raise malformed(f"wire type {wire_type}", field_start)
        if value_end > end:
            raise malformed(f"a field of {value_end - position} bytes with {end - position} left", field_start)
        yield number, wire_type, field_start, position, value_end
        position = value_end
    if position < end and most < max_fields:
        raise LimitExceeded(f"{MAX_MESSAGE_FIELDS} fields in a message")
    if position < end:
        raise malformed(f"more than {max_fields} fields", position)
    if budget is not None:
        budget.fields -= most


def scan_few(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Like `scan`, for a message with few fields. Raises InvalidRequest for more than 128 fields."""
    return scan(data, start, end, None, _FEW_FIELDS)


def without(message_type: type[MessageT], data: bytes, number: int) -> tuple[MessageT, tuple[int, int]]:
    """A message without its length-delimited field `number`, and (start, end) of that field's value in `data`.

    (0, 0) if the field is missing. Raises InvalidRequest for an invalid message, or one that has the field twice.
    """
    span = (0, 0)
    rest = []
    for found, wire_type, start, value_start, value_end in scan_few(data, 0, len(data)):
        if found != number:
            rest.append(data[start:value_end])
        elif wire_type != LENGTH_DELIMITED or span[1]:
            raise malformed(f"a second field {number}, or one of wire type {wire_type}", start)
        else:
            span = (value_start, value_end)
    return parse(message_type, b"".join(rest)), span


def parse(message_type: type[MessageT], data: bytes) -> MessageT:
    """Parses a small message with protobuf's own parser. Raises InvalidRequest."""
    message = message_type()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise errors.InvalidRequest(f"malformed message: not a {message.DESCRIPTOR.name}") from None
    return message


def read_int64s(data: bytes, wire_type: int, start: int, end: int) -> list[int]:
    """The values of a `repeated int64` field, packed or not. Raises InvalidRequest."""
    values = []
    position = start
    while position < end:
        value = data[position]
        if value < 0x80:
            position += 1
        else:
            value, position = read_varint(data, position, end)
            if value >= 2**63:
                value -= 2**64
        values.append(value)
    if wire_type not in (VARINT, LENGTH_DELIMITED):
        raise malformed(f"wire type {wire_type} for an integer", start)
    return values


_ONE_BYTE = [bytes((value,)) for value in range(0x80)]


def varint(value: int) -> bytes:
    """Encodes an int64 as a varint."""
    if 0 <= value < 0x80:
        return _ONE_BYTE[value]
    value &= 0xFFFF_FFFF_FFFF_FFFF
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


@functools.lru_cache(maxsize=4096)
def prefix(number: int, length: int) -> bytes:
    """The tag and length of a length-delimited field. length: of its value in bytes."""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(length)


def malformed(what: str, position: int) -> errors.InvalidRequest:
    """The error for bytes that are not a protobuf message."""
    return errors.InvalidRequest(f"malformed message: {what} at byte {position}")
