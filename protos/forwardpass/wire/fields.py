"""The protobuf wire format, field by field: read where it lies, written without a copy.

protobuf's own parser copies a `bytes` field several times; at 16 MB that leaves a fifth of what gRPC can move. So
messages that hold arrays are taken apart here, and what is small in them is left to protobuf.
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

# Twice what a structure of as many leaves as there may be has. Every field costs time and memory of its own, however
# few its bytes are.
_MAX_FIELDS = 2**17

# Of a message without repeated fields: some ten times what any has, with room for those of later versions.
_FEW_FIELDS = 128


def read_varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """An unsigned 64-bit varint at `position` and the position after it."""
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
    raise malformed("a varint that ends nowhere", position)


def scan(
    data: bytes, start: int, end: int, budget: Budget | None = None, max_fields: int = _MAX_FIELDS
) -> Iterator[tuple[int, int, int, int, int]]:
    """The fields of the message in data[start:end], in order.

    Each is (number, wire type, start of the whole field, start of its value, end of its value). A length-delimited
    value is without its length.
    budget: of the whole message that the bytes are part of. Its fields are charged when the scan ends.
    Raises InvalidRequest where the bytes are no protobuf message, and LimitExceeded.
    """
    position = start
    most = max_fields if budget is None else max(min(max_fields, budget.fields), 0)
    for count in range(most):
        if position >= end:
            if budget is not None:
                budget.fields -= count
            return
        field_start = position
        # Nearly every tag and length is one byte: do not pay for a call then.
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
            raise malformed(f"a field of {value_end - position} bytes where {end - position} are left", field_start)
        yield number, wire_type, field_start, position, value_end
        position = value_end
    if position < end and most < max_fields:
        raise LimitExceeded(f"{MAX_MESSAGE_FIELDS} fields in a message")
    if position < end:
        raise malformed(f"more than {max_fields} fields", position)
    if budget is not None:
        budget.fields -= most


def scan_few(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """`scan` of a message that has a handful of fields. Raises InvalidRequest for one of more than `_FEW_FIELDS`."""
    return scan(data, start, end, None, _FEW_FIELDS)


def without(message_type: type[MessageT], data: bytes, number: int) -> tuple[MessageT, tuple[int, int]]:
    """A message without length-delimited field `number`, and where in `data` that field's value lies; else (0, 0).

    Raises InvalidRequest where the bytes are no such message, or have the field twice.
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
    """A message that is small, by protobuf's own parser. Raises InvalidRequest."""
    message = message_type()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise errors.InvalidRequest(f"malformed message: no {message.DESCRIPTOR.name}") from None
    return message


def read_int64s(data: bytes, wire_type: int, start: int, end: int) -> list[int]:
    """The values of one `repeated int64` field, packed or not."""
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
    """An int64 as a varint."""
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
    """What precedes the `length` bytes of length-delimited field `number`."""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(length)


def malformed(what: str, position: int) -> errors.InvalidRequest:
    return errors.InvalidRequest(f"malformed message: {what} at byte {position}")
