"""Encodes arrays as `forwardpass.v1.Tensor` messages, and decodes them as views of the received bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from forwardpass.wire import dtypes, errors, fields
from forwardpass.wire.dtypes import Array
from forwardpass.wire.limits import DEFAULT, Budget, Limits

Buffer = bytes | memoryview | Array
"""Any argument of `bytes.join`; arrays are C-contiguous."""

_DATA_TYPE, _SHAPE, _DATA, _PADDING = 1, 2, 3, 4
_LENGTH = struct.Struct("<I")
STRING_LENGTH_BYTES = _LENGTH.size


def encode(array: Array, dtype: dtypes.DType | None = None, place: str = "array") -> tuple[list[Buffer], int]:
    """Encodes an array of any shape: the buffers of a Tensor message, and their total length in bytes.

    A contiguous array in native byte order is not copied: do not change it until the buffers are joined.
    dtype: the type on the wire if the array does not determine it (bfloat16 held as float32).
    Raises DTypeMismatch for a dtype that the protocol does not have, and what `elements` raises.
    """
    dtype = dtype or dtypes.of(array, place)
    data, data_bytes = elements(array, dtype, place)
    header = encode_header(dtype.code, array.shape, data_bytes)
    return [header, data], len(header) + data_bytes


def elements(array: Array, dtype: dtypes.DType, place: str = "array") -> tuple[Buffer, int]:
    """The elements of an array as on the wire, and their length in bytes. Copied only if necessary.

    Raises DTypeMismatch for an object array with other elements than strings, InvalidRequest for a str that cannot be
    encoded.
    """
    if dtype is dtypes.STRING:
        strings = _encode_strings(array, place)
        return strings, len(strings)
    data = array if array.dtype == dtype.numpy else array.astype(dtype.numpy)
    if dtype is dtypes.BFLOAT16:
        # The buffer protocol has no bfloat16.
        data = data.view(np.uint16) if dtypes.HAS_NATIVE_BFLOAT16 else dtypes.bfloat16_bits(data)
    if not data.flags.c_contiguous:
        data = np.ascontiguousarray(data)
    return data, data.nbytes


def element_bytes(array: Array, dtype: dtypes.DType | None = None, place: str = "array") -> memoryview:
    """The elements of an array as on the wire, as a view of bytes. Arguments and errors: see `encode`."""
    data, _ = elements(array, dtype or dtypes.of(array, place), place)
    return data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else memoryview(data)


def encode_header(code: int, shape: tuple[int, ...], data_bytes: int, padding_bytes: int = 0) -> bytes:
    """The bytes of a Tensor message before its elements.

    code: of the data type. data_bytes: length of the elements. padding_bytes: by how much the header is longer than it
    must be: 0, or 2 to 129.
    """
    encoded = bytes((_DATA_TYPE << 3 | fields.VARINT, code))
    if shape:
        dims = b"".join(map(fields.varint, shape))
        encoded += fields.prefix(_SHAPE, len(dims)) + dims
    if padding_bytes:
        encoded += fields.prefix(_PADDING, padding_bytes - 2) + bytes(padding_bytes - 2)
    return encoded + fields.prefix(_DATA, data_bytes)


class Located(NamedTuple):
    """The position, dtype and shape of an array in a message. Everything but the elements is validated.

    start, end: the byte range of the elements. num_elements: the product of the shape.
    """

    start: int
    end: int
    dtype: dtypes.DType
    shape: tuple[int, ...]
    num_elements: int


def decode(data: bytes, start: int, end: int, place: str = "tensor", limits: Limits = DEFAULT) -> Array:
    """Decodes the Tensor message in data[start:end] to a read-only array that shares the memory of `data`.

    Strings (object arrays of bytes) are copied, and so is bfloat16 without ml_dtypes.
    Raises InvalidRequest, DTypeMismatch or ShapeMismatch, which name `place`. Allocates memory only after the message
    is validated.
    """
    return read(data, locate(data, start, end, place, limits), place)


def locate(data: bytes, start: int, end: int, place: str, limits: Limits, budget: Budget | None = None) -> Located:
    """Validates the Tensor message in data[start:end], and locates its elements without reading them.

    Raises InvalidRequest, DTypeMismatch or ShapeMismatch, which name `place`, or LimitExceeded.
    """
    code, shape, data_start, data_end = _scan(data, start, end, place, limits, budget)
    dtype = dtypes.BY_CODE.get(code)
    if dtype is None:
        raise errors.DTypeMismatch(place=place, expected="a data type of the protocol", found=f"number {code}")
    count = element_count(shape, dtype, place, limits)
    if dtype is not dtypes.STRING:
        _check_length(data_end - data_start, dtype, shape, count, place)
    else:
        _check_strings(data_end - data_start, shape, count, place)
        if budget is not None:
            budget.take_strings(count)
    return Located(data_start, data_end, dtype, tuple(shape), count)


def decode_elements(data: Any, dtype: dtypes.DType, shape: Sequence[int], place: str) -> Array:
    """The read-only array of shape `shape` whose elements fill the buffer `data`. It shares the memory of `data`.

    data: bytes, or a one-dimensional buffer of bytes. Errors: see `decode`.
    """
    count = element_count(shape, dtype, place, DEFAULT)
    if dtype is not dtypes.STRING:
        _check_length(len(data), dtype, shape, count, place)
    else:
        _check_strings(len(data), shape, count, place)
    return _read_only(read(data, Located(0, len(data), dtype, tuple(shape), count), place))


def _scan(
    data: bytes, start: int, end: int, place: str, limits: Limits, budget: Budget | None
) -> tuple[int, Sequence[int], int, int]:
    """The code of the data type, the shape, and start and end of the elements of a Tensor message."""
    code = 0
    shape: Sequence[int] = ()
    data_start = data_end = start
    for number, wire_type, _, value_start, value_end in fields.scan(data, start, end, budget):
        if number == _DATA:
            _expect(wire_type, fields.LENGTH_DELIMITED, place)
            data_start, data_end = value_start, value_end
        elif number == _SHAPE:
            if value_end - value_start > 10 * limits.max_rank:
                raise errors.ShapeMismatch(place=place, expected=f"at most {limits.max_rank} dimensions", found="more")
            shape = [*shape, *fields.read_int64s(data, wire_type, value_start, value_end)]
            if len(shape) > limits.max_rank:
                raise errors.ShapeMismatch(
                    place=place, expected=f"at most {limits.max_rank} dimensions", found=f"{len(shape)}"
                )
        elif number == _DATA_TYPE:
            _expect(wire_type, fields.VARINT, place)
            code, _ = fields.read_varint(data, value_start, value_end)
    return code, shape, data_start, data_end


def _check_length(size_bytes: int, dtype: dtypes.DType, shape: Sequence[int], count: int, place: str) -> None:
    if count * dtype.itemsize != size_bytes:
        raise errors.ShapeMismatch(
            place=place,
            expected=f"{count * dtype.itemsize} bytes for {dtype}{list(shape)}",
            found=f"{size_bytes} bytes",
        )


def _check_strings(size_bytes: int, shape: Sequence[int], count: int, place: str) -> None:
    if count > DEFAULT.max_strings:
        raise errors.ShapeMismatch(place=place, expected=f"at most {DEFAULT.max_strings} strings", found=f"{count}")
    # Each string takes at least the bytes of its length. This limits the count before memory is allocated.
    if count * STRING_LENGTH_BYTES > size_bytes:
        raise errors.ShapeMismatch(
            place=place, expected=f"{count} strings for string{list(shape)}", found=f"{size_bytes} bytes"
        )


def read(data: bytes, located: Located, place: str) -> Array:
    """Reads an array that was located in `data`, or in a message of the same length and framing.

    Shares memory as `decode` does. Raises InvalidRequest, which names `place`, for invalid elements: a bool other than
    0 and 1, or a string whose length exceeds the data.
    """
    start, end, dtype, shape, count = located
    if dtype is dtypes.STRING:
        return _decode_strings(data, start, end, count, shape, place)
    if dtype is dtypes.BFLOAT16 and not dtypes.HAS_NATIVE_BFLOAT16:
        bits = np.frombuffer(data, np.uint16, count, start) if count else np.empty(0, np.uint16)
        return _read_only(dtypes.bfloat16_values(bits).reshape(shape))
    if not count:
        return _read_only(np.empty(shape, dtype.numpy))
    array: Array = np.frombuffer(data, dtype.numpy, count, start).reshape(shape)
    if dtype is dtypes.BOOL and array.view(np.uint8).max() > 1:
        raise errors.InvalidRequest("malformed tensor: a bool that is neither 0 nor 1", place=place)
    return array


def _expect(wire_type: int, expected: int, place: str) -> None:
    if wire_type != expected:
        raise errors.InvalidRequest(f"malformed tensor: wire type {wire_type}", place=place)


def element_count(shape: Sequence[int], dtype: dtypes.DType, place: str, limits: Limits) -> int:
    """The product of the dimensions. Raises ShapeMismatch for negative dimensions, or an empty array over `limits`."""
    count = 1
    for dim in shape:
        if dim < 0:
            raise errors.ShapeMismatch(place=place, expected="dimensions >= 0", found=f"{list(shape)}")
        count *= dim
    if not count:
        extent = math.prod(dim for dim in shape if dim) * max(dtype.itemsize, 1)
        if extent > limits.max_empty_extent_bytes:
            raise errors.ShapeMismatch(
                place=place,
                expected=f"dimensions other than 0 of at most {limits.max_empty_extent_bytes} bytes",
                found=f"{dtype}{list(shape)}",
            )
    return count


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


def _encode_strings(array: Array, place: str) -> bytes:
    pieces = []
    for element in array.ravel().tolist():
        if isinstance(element, str):
            try:
                element = element.encode()
            except UnicodeEncodeError:
                raise errors.InvalidRequest("a str that cannot be encoded as UTF-8", place=place) from None
        elif not isinstance(element, bytes):
            raise errors.DTypeMismatch(
                place=place, expected="bytes or str", found=f"an object array that holds {dtypes.foreign_object(array)}"
            )
        pieces.append(_LENGTH.pack(len(element)))
        pieces.append(element)
    return b"".join(pieces)


def _decode_strings(data: bytes, start: int, end: int, count: int, shape: Sequence[int], place: str) -> Array:
    strings = np.empty(count, object)
    position = start
    for index in range(count):
        if position + _LENGTH.size > end:
            raise errors.InvalidRequest("malformed tensor: a string without its length", place=place)
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size
        if length > end - position:
            raise errors.InvalidRequest("malformed tensor: a string longer than its tensor", place=place)
        strings[index] = bytes(data[position : position + length])
        position += length
    if position != end:
        raise errors.InvalidRequest(f"malformed tensor: {end - position} bytes after the last string", place=place)
    return _read_only(strings.reshape(shape))
