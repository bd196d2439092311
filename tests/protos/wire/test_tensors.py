"""Encoding and decoding of arrays."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from forwardpass import v1
from forwardpass.wire import dtypes, errors, tensors
from forwardpass.wire.limits import Limits
from support.arrays import any_array, same_bits


def encode(array: np.ndarray) -> bytes:
    pieces, size_bytes = tensors.encode(array)
    encoded = b"".join(pieces)
    assert len(encoded) == size_bytes
    return encoded


def decode(data: bytes, **limits: int) -> np.ndarray:
    return tensors.decode(data, 0, len(data), limits=Limits(**limits))


@given(any_array)
def test_every_array_is_decoded_unchanged(array):
    decoded = decode(encode(array))
    assert same_bits(decoded, array.astype(array.dtype.newbyteorder("=")))
    assert decoded.dtype == array.dtype.newbyteorder("=")
    assert not decoded.flags.writeable


@given(any_array)
def test_protobuf_and_this_codec_read_each_others_bytes(array):
    message = v1.Tensor.FromString(encode(array))
    assert list(message.shape) == list(array.shape)
    assert message.data_type == dtypes.of(array).code
    assert same_bits(decode(message.SerializeToString()), decode(encode(array)))


def test_decoding_returns_a_view_of_the_bytes():
    data = encode(np.arange(1000, dtype=np.float32))
    whole = np.frombuffer(data, np.uint8)
    assert np.shares_memory(decode(data), whole)


def test_encoding_does_not_copy_a_contiguous_array():
    array = np.arange(1000, dtype=np.float32)
    pieces, _ = tensors.encode(array)
    assert any(isinstance(piece, np.ndarray) and np.shares_memory(piece, array) for piece in pieces)


def test_a_shape_that_is_not_packed_is_read():
    # Field 2 with wire type 0, twice: not packed, as a proto2 encoder writes it.
    data = bytes([0x08, v1.DataType.DATA_TYPE_INT8, 0x10, 2, 0x10, 1, 0x1A, 2, 7, 8])
    assert decode(data).tolist() == [[7], [8]]


def test_unknown_fields_are_ignored():
    data = encode(np.float32([1, 2]))
    assert decode(bytes([0x7D, 1, 2, 3, 4, 0x78, 0x80, 1, 0x7A, 1, 0]) + data).tolist() == [1, 2]


@pytest.mark.parametrize("text", [b"", b"a\x00", "grün".encode(), b"\xff" * 300])
def test_strings_keep_every_byte(text):
    assert decode(encode(np.array([text], object))).tolist() == [text]


def test_numpy_strings_and_str_become_bytes():
    assert decode(encode(np.array(["grün", "b"]))).tolist() == ["grün".encode(), b"b"]
    assert decode(encode(np.array([b"ab", b"c"]))).tolist() == [b"ab", b"c"]
    assert decode(encode(np.array(["grün"], object))).tolist() == ["grün".encode()]


@pytest.mark.parametrize(
    "array",
    [np.array(["2020-01-01"], "datetime64[D]"), np.zeros(2, [("a", "f4")]), np.longdouble([1]), np.array([3], object)],
    ids=["datetime", "record", "longdouble", "object"],
)
def test_a_dtype_without_a_wire_type_is_refused(array):
    with pytest.raises(errors.DTypeMismatch, match="array: expected"):
        encode(array)


def tensor(**fields) -> bytes:
    return v1.Tensor(**fields).SerializeToString()


HOSTILE = {
    "unknown dtype": (tensor(data_type=99, data=b"1234"), errors.DTypeMismatch),
    "no dtype": (tensor(shape=[1], data=b"1234"), errors.DTypeMismatch),
    "negative dimension": (tensor(data_type=2, shape=[-1], data=b"1234"), errors.ShapeMismatch),
    "negative twice": (tensor(data_type=2, shape=[-1, -1], data=b"1234"), errors.ShapeMismatch),
    "too little data": (tensor(data_type=2, shape=[2], data=b"1234"), errors.ShapeMismatch),
    "too much data": (tensor(data_type=2, shape=[1], data=b"12345678"), errors.ShapeMismatch),
    "a splat": (tensor(data_type=2, shape=[10**8], data=b"1234"), errors.ShapeMismatch),
    "a product that wraps around in 64 bits": (
        tensor(data_type=2, shape=[2**32, 2**32, 1], data=b""),
        errors.ShapeMismatch,
    ),
    "an empty array of endless extent": (tensor(data_type=2, shape=[0, 2**62]), errors.ShapeMismatch),
    "an empty array whose extent wraps around": (tensor(data_type=2, shape=[0, 2**62, 2**62]), errors.ShapeMismatch),
    "33 dimensions": (tensor(data_type=2, shape=[1] * 33, data=b"1234"), errors.ShapeMismatch),
    "a million dimensions": (tensor(data_type=2, shape=[1] * 10**6, data=b"1234"), errors.ShapeMismatch),
    "a bool of 2": (tensor(data_type=13, shape=[2], data=b"\x01\x02"), errors.InvalidRequest),
    "strings without lengths": (tensor(data_type=16, shape=[10**6], data=b""), errors.ShapeMismatch),
    "a string longer than its tensor": (
        tensor(data_type=16, shape=[1], data=b"\xff\xff\xff\x7f"),
        errors.InvalidRequest,
    ),
    "bytes after the last string": (
        tensor(data_type=16, shape=[1], data=b"\x01\x00\x00\x00ab"),
        errors.InvalidRequest,
    ),
    "half a length": (tensor(data_type=16, shape=[1], data=b"\x01\x00\x00\x00a" + b"\x01"), errors.InvalidRequest),
    "a field that ends nowhere": (b"\x1a\x05ab", errors.InvalidRequest),
    "a varint that ends nowhere": (b"\x08\x80", errors.InvalidRequest),
    "a varint of 11 bytes": (b"\x08" + b"\x80" * 10 + b"\x01", errors.InvalidRequest),
    "a group": (b"\x0b\x0c", errors.InvalidRequest),
    "field number 0": (b"\x00\x01", errors.InvalidRequest),
    "data as a varint": (b"\x18\x01", errors.InvalidRequest),
    "a dtype as bytes": (b"\x0a\x01\x02", errors.InvalidRequest),
    "a shape as fixed32": (b"\x08\x02\x15\x01\x00\x00\x00", errors.InvalidRequest),
}


@pytest.mark.parametrize("data, error", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_tensor_is_refused(data, error):
    with pytest.raises(error):
        decode(data)


def test_an_empty_array_of_modest_extent_is_read():
    assert decode(tensor(data_type=2, shape=[0, 5])).shape == (0, 5)


def test_the_extent_of_an_empty_array_is_bounded_by_the_limit():
    data = tensor(data_type=2, shape=[0, 5])
    assert decode(data, max_empty_extent_bytes=20).shape == (0, 5)
    with pytest.raises(errors.ShapeMismatch, match="at most 19 bytes"):
        decode(data, max_empty_extent_bytes=19)


def test_bfloat16_is_rounded_as_ml_dtypes_rounds_it():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint64).astype(np.uint32)
    edges = np.uint32(
        [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF, 0x00008000, 0x00018000]
    )
    values = np.concatenate([bits, edges]).view(np.float32)
    ours = dtypes.bfloat16_bits(values).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        theirs = values.astype(ml_dtypes.bfloat16)
    assert np.array_equal(np.isnan(ours.astype(np.float32)), np.isnan(values))
    numbers = ~np.isnan(values)
    assert np.array_equal(ours[numbers].view(np.uint16), theirs[numbers].view(np.uint16))


def test_bfloat16_values_are_exact():
    bits = np.arange(2**16, dtype=np.uint16)
    expected = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(dtypes.bfloat16_values(bits), expected, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_bfloat16_conversions_keep_the_shape(shape):
    values = np.ones(shape, np.float32)
    assert dtypes.bfloat16_bits(values).shape == shape
    assert dtypes.bfloat16_values(dtypes.bfloat16_bits(values)).shape == shape
