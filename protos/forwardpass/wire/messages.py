"""Encodes and decodes whole messages: small fields by protobuf, structures of arrays by this package.

The descriptor of a message shows which fields are structures, so that the same functions handle every present and later
message of the protocol. The result is plain protobuf, readable by any other implementation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from forwardpass import v1
from forwardpass.wire import errors, fields, layouts, structures, tensors
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.limits import (
    DEFAULT,
    SMALL_LEAVES,
    SMALL_STRINGS,
    Budget,
    LimitExceeded,
    Limits,
    small_message,
    whole_message,
)
from forwardpass.wire.structures import Structure

MessageT = TypeVar("MessageT", bound=Message)


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    """A field with structures. Without `inner` the field is a structure; else the fields in `inner` hold structures.

    path: the dotted name in the whole message. A field called `value` is a wrapper and not part of the path.
    """

    number: int
    path: str
    inner: dict[int, _Field]


@functools.cache  # One entry for each message type of the protocol.
def _structure_fields(descriptor: Descriptor) -> Mapping[int, _Field]:
    return _schema(descriptor, "", frozenset())


def _schema(descriptor: Descriptor, parent: str, ancestors: frozenset[str]) -> dict[int, _Field]:
    found = {}
    for field in sorted(descriptor.fields, key=lambda field: field.number):
        inner_type = field.message_type
        if inner_type is None or inner_type.full_name in ancestors:
            continue
        path = parent if field.name == "value" else f"{parent}.{field.name}" if parent else field.name
        inner = {}
        if inner_type is not v1.Structure.DESCRIPTOR:
            inner = _schema(inner_type, path, ancestors | {descriptor.full_name})
            if not inner:
                continue
        found[field.number] = _Field(field.number, path, inner)
    return found


@functools.lru_cache(maxsize=256)  # A message type has few combinations of present structures.
def _fields_of(descriptor: Descriptor, places: tuple[str, ...]) -> Mapping[int, _Field]:
    """The fields that hold the structures at these places."""
    return _narrowed(_structure_fields(descriptor), places)


def _narrowed(schema: Mapping[int, _Field], places: tuple[str, ...]) -> dict[int, _Field]:
    found = {}
    for number, field in schema.items():
        inner = _narrowed(field.inner, places)
        if inner or field.path in places:
            found[number] = dataclasses.replace(field, inner=inner)
    return found


@functools.cache  # One entry for each message type of the protocol.
def places(message_type: type[Message]) -> tuple[str, ...]:
    """The names of all structures that a message of this type may hold, as in `encode`."""

    def of(schema: Mapping[int, _Field]) -> Iterator[str]:
        for field in schema.values():
            if field.inner:
                yield from of(field.inner)
            else:
                yield field.path

    return tuple(of(_structure_fields(message_type.DESCRIPTOR)))


def encode(header: Message, parts: Mapping[str, Structure], max_bytes: int | None = None) -> bytes:
    """Encodes one message.

    header: the message with all fields except structures.
    parts: the structures by name; a nested name is dotted: "model_weights.trainable".
    Raises MessageTooLarge for a message of more than `max_bytes`, before its buffers are joined.
    """
    return encode_pieces(header, parts, max_bytes).join()


def encode_pieces(header: Message, parts: Mapping[str, Structure], max_bytes: int | None = None) -> Pieces:
    """Like `encode`, without joining the buffers. Do not change the arrays while the result is in use.

    Raises MessageTooLarge.
    """
    pieces: list[tensors.Buffer] = [header.SerializeToString()]
    start = len(pieces[0])
    size_bytes = start + _encode_fields(_fields_of(header.DESCRIPTOR, tuple(parts)), parts, pieces, start)
    if max_bytes is not None and size_bytes > max_bytes:
        raise errors.MessageTooLarge(
            place=header.DESCRIPTOR.name, expected=f"at most {max_bytes} bytes", found=f"{size_bytes} bytes"
        )
    return Pieces(pieces, size_bytes)


def _encode_fields(
    schema: Mapping[int, _Field], parts: Mapping[str, Structure], pieces: list[tensors.Buffer], start: int
) -> int:
    """Adds the fields to `pieces`. Returns their length. start: their position in the message."""
    total_bytes = 0
    for number, field in schema.items():
        # The length of the prefix depends on the length of the field. If the estimate is wrong, its arrays are not
        # aligned, and a reader copies them.
        offset = start + total_bytes + len(fields.prefix(number, _estimate(field, parts)))
        if field.inner:
            inner: list[tensors.Buffer] = []
            size_bytes = _encode_fields(field.inner, parts, inner, offset)
        else:
            inner, size_bytes = structures.encode(parts[field.path], field.path, offset)
        prefix = fields.prefix(number, size_bytes)
        pieces.append(prefix)
        pieces += inner
        total_bytes += len(prefix) + size_bytes
    return total_bytes


# What the framing of an array takes: tags, lengths, shape and padding.
_FRAMING_BYTES = 24


def _estimate(field: _Field, parts: Mapping[str, Structure]) -> int:
    """About the length of a field, without its tag and length."""
    if field.inner:
        return sum(_estimate(inner, parts) for inner in field.inner.values())
    structure = parts[field.path]
    return len(structure.tree.encoded) + sum(leaf.nbytes + _FRAMING_BYTES for leaf in structure.leaves)


def decode(
    message_type: type[MessageT], data: bytes, limits: Limits = DEFAULT
) -> tuple[MessageT, dict[str, Structure]]:
    """Decodes one message to its header and its structures, named as in `encode`. Arrays share the memory of `data`.

    The header may be shared with other calls: do not change it.
    Raises InvalidRequest or a subclass, which names the place, for an invalid message.
    """
    found = _find(message_type, data) if limits is DEFAULT else None
    if found is not None:
        header, layout = found
        return header, _read(data, layout.parts)
    try:
        head, parts = _decode(message_type, data, limits, whole_message())
        return _header_of(message_type, head), parts
    except LimitExceeded as error:
        raise errors.InvalidRequest(
            place=message_type.DESCRIPTOR.name, expected=f"at most {error.most}", found="more"
        ) from None


def _find(message_type: type[MessageT], data: bytes) -> tuple[MessageT, layouts.Layout] | None:
    """The header and the layout of a message with a cached layout; None for any other."""
    layout = _layouts.find(message_type, data)
    if layout is None:
        return None
    header = _header(message_type, bytes(data[: layout.head_end]))
    return None if header is None else (header, layout)


class Envelope(Generic[MessageT]):
    """A message with a decoded header. Its structures are decoded on request.

    Decoding the header takes some microseconds, however large the message is. Raises InvalidRequest.
    """

    __slots__ = ("_data", "_layout", "_type", "header")

    def __init__(self, message_type: type[MessageT], data: bytes) -> None:
        self._type = message_type
        self._data = data
        found = _find(message_type, data)
        if found is not None:
            self.header: MessageT = found[0]
            self._layout: layouts.Layout | None = found[1]
        else:
            self.header = _read_header(message_type, data)
            self._layout = None

    def small_parts(self) -> dict[str, Structure] | None:
        """The structures of a message that is fast to decode (`limits.small_message`); None for any other.

        Raises InvalidRequest or a subclass, which names the place.
        """
        if self._layout is not None:
            return _read(self._data, self._layout.parts)
        try:
            return _decode(self._type, self._data, DEFAULT, small_message())[1]
        except LimitExceeded:
            return None

    def parts(self) -> dict[str, Structure]:
        """The structures of a message of any size. Errors: see `decode`."""
        return decode(self._type, self._data)[1]


def _read_header(message_type: type[MessageT], data: bytes) -> MessageT:
    schema = _structure_fields(message_type.DESCRIPTOR)
    head = b"".join(
        [
            data[field_start:value_end]
            for number, _, field_start, _, value_end in fields.scan_few(data, 0, len(data))
            if number not in schema
        ]
    )
    return _header_of(message_type, head)


def _header_of(message_type: type[MessageT], head: bytes) -> MessageT:
    if len(head) > _CACHED_BYTES:
        return fields.parse(message_type, head)
    header: MessageT | None = _header(message_type, head)
    return fields.parse(message_type, head) if header is None else header


def is_small(parts: Mapping[str, Structure]) -> bool:
    """Whether structures are fast to encode: see `limits.small_message`."""
    leaves = strings = 0
    for part in parts.values():
        leaves += len(part.leaves)
        if leaves > SMALL_LEAVES:
            return False
        for leaf in part.leaves:
            if leaf.dtype.kind in "OSU":
                strings += leaf.size
    return strings <= SMALL_STRINGS


def _decode(
    message_type: type[Message], data: bytes, limits: Limits, budget: Budget
) -> tuple[bytes, dict[str, Structure]]:
    """The bytes of the header, and the structures. Raises LimitExceeded for a message over its budget."""
    schema = _structure_fields(message_type.DESCRIPTOR)
    parts: dict[str, structures.Located] = {}
    head, head_end = _locate(schema, data, 0, len(data), parts, limits, budget)
    if limits is DEFAULT and len(head) == head_end and len(head) <= _CACHED_BYTES:
        layout = layouts.of(data, head_end, parts)
        if layout is not None:
            _layouts.keep(message_type, len(data), layout)
    return head, _read(data, parts)


# Headers are cached because they rarely change from call to call. Longer ones are not: any client can send them, and
# must not fill the memory.
_CACHED_BYTES = 512
_layouts = layouts.Layouts()


def _parse_header(message_type: type[MessageT], head: bytes) -> MessageT | None:
    """Parses the header of a message; None for invalid bytes, and for bytes that hold structures."""
    schema = _structure_fields(message_type.DESCRIPTOR)
    try:
        if any(number in schema for number, *_ in fields.scan(head, 0, len(head))):
            return None
        return fields.parse(message_type, head)
    except errors.InvalidRequest:
        return None  # The caller then decodes the whole message, which raises a precise error.


_header: Any = functools.lru_cache(maxsize=1024)(_parse_header)


def _locate(
    schema: Mapping[int, _Field],
    data: bytes,
    start: int,
    end: int,
    parts: dict[str, structures.Located],
    limits: Limits,
    budget: Budget,
) -> tuple[bytes, int]:
    """Adds the structures in data[start:end] to `parts`.

    Returns the bytes of all other fields, and the position of the first field with structures. If both are equal, all
    other fields come first.
    """
    rest: list[bytes] = []
    head_end = end
    for number, wire_type, field_start, value_start, value_end in fields.scan(data, start, end, budget):
        field = schema.get(number)
        if field is None:
            rest.append(data[field_start:value_end])
            continue
        head_end = min(head_end, field_start)
        if wire_type != fields.LENGTH_DELIMITED:
            raise errors.InvalidRequest(f"malformed message: wire type {wire_type}", place=field.path)
        if field.inner:
            _locate(field.inner, data, value_start, value_end, parts, limits, budget)
        elif field.path in parts:
            raise errors.InvalidRequest("malformed message: a second structure in one field", place=field.path)
        else:
            parts[field.path] = structures.locate(data, value_start, value_end, field.path, limits, budget)
    return b"".join(rest), head_end


def _read(data: bytes, parts: Mapping[str, structures.Located]) -> dict[str, Structure]:
    return {place: structures.read(data, part, place) for place, part in parts.items()}
