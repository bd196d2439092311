"""TFF's serialized types."""

from __future__ import annotations

import collections

import pytest
import tensorflow as tf

from forwardpass.wire import errors
from forwardpass_server.models import tff_types

FLOAT = tf.TensorSpec([], tf.float32)


def element(value: bytes, name: str = "") -> bytes:
    named = b"\x0a" + bytes([len(name)]) + name.encode() if name else b""
    body = named + b"\x12" + bytes([len(value)]) + value
    return b"\x0a" + bytes([len(body)]) + body


def struct(*elements: bytes) -> bytes:
    body = b"".join(elements)
    return b"\x12" + bytes([len(body)]) + body


SCALAR = bytes.fromhex("22020801")


@pytest.mark.parametrize(
    "serialized, expected",
    [
        ("22020801", FLOAT),
        ("220f0801120bffffffffffffffffff0101", tf.TensorSpec([None, 1], tf.float32)),
        ("220408011801", tf.TensorSpec(None, tf.float32)),
        ("22020807", tf.TensorSpec([], tf.string)),
        ("2202080e", tf.TensorSpec([], tf.bfloat16)),
        ("1200", ()),
    ],
)
def test_types_that_tff_wrote_are_read(serialized, expected):
    assert tff_types.decode(bytes.fromhex(serialized), "here") == expected


def test_named_elements_keep_their_order():
    decoded = tff_types.decode(struct(element(SCALAR, "b"), element(SCALAR, "a")), "here")
    assert isinstance(decoded, collections.OrderedDict)
    assert list(decoded) == ["b", "a"]


def test_unnamed_elements_are_a_tuple():
    assert tff_types.decode(struct(element(SCALAR), element(struct())), "here") == (FLOAT, ())


@pytest.mark.parametrize(
    "serialized, error",
    [
        (b"", errors.InvalidRequest),
        (b"\x22\x05\x08", errors.InvalidRequest),
        (bytes.fromhex("1a00"), errors.StructureMismatch),  # A sequence.
        (bytes.fromhex("0a00"), errors.StructureMismatch),  # A function.
        (struct(element(SCALAR, "a"), element(SCALAR)), errors.StructureMismatch),
    ],
)
def test_bytes_that_are_not_a_tff_type_are_refused(serialized, error):
    with pytest.raises(error):
        tff_types.decode(serialized, "here")
