"""Ids of weights, compared with an independent computation and with test vectors."""

from __future__ import annotations

import collections
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given

from forwardpass import v1
from forwardpass.wire import dtypes, errors, manifests
from forwardpass.wire.structures import Structure
from support.arrays import any_array, structures

WEIGHTS = (
    (np.arange(6, dtype=np.float32).reshape(2, 3), np.float32([1.5, -2.0, 0.0])),
    (np.array(7, np.int64), np.array([b"a", b""], object)),
)

# Test vectors for other implementations: the digest of each tensor of WEIGHTS, and the id of the set.
VECTORS = [
    "b94430e2b2c9cc2125ca7e5ae38c1e207cc259933af5529d054f6e576e1982e2",
    "9978f48129ac607ae97de30692e19e3d812354df0a45691a1f243670aaa6c318",
    "56f2304fe159e0627f615017ad3a1fae0712307af97f0ae7aad677117b5def7a",
    "5ec2ea8c37bd964293c6e891f09dce32a6c85ba6276a160b13244a82d6deabe5",
    "52cb15952639ad91ab4797a9324f05dddac807283894b8644cbfbd4217d2d544",
]


def of(value):
    return manifests.of_structure(Structure.of(value), "weights")


def digest_by_hand(code: int, shape: list[int], data: bytes) -> bytes:
    dims = b"".join(struct.pack("<q", dim) for dim in shape)
    return hashlib.sha256(b"forwardpass.tensor.v1\0" + bytes([code, len(shape)]) + dims + data).digest()


def test_the_digest_of_a_tensor_can_be_recomputed_from_its_definition():
    found = of(WEIGHTS)
    expected = [
        digest_by_hand(2, [2, 3], struct.pack("<6f", 0, 1, 2, 3, 4, 5)),
        digest_by_hand(2, [3], struct.pack("<3f", 1.5, -2, 0)),
        digest_by_hand(8, [], struct.pack("<q", 7)),
        digest_by_hand(16, [2], b"\x01\0\0\0a\0\0\0\0"),
    ]
    assert [tensor.digest for tensor in found.tensors] == expected
    leaf = b"\x0a\x02\x0a\x00"
    pair = b"\x12\x08" + leaf + leaf
    tree = b"\x12\x18" + b"\x0a\x0a" + pair + b"\x0a\x0a" + pair
    prefix = b"forwardpass.weights.v1\0" + struct.pack("<q", len(tree))
    assert found.weights_id == hashlib.sha256(prefix + tree + b"".join(expected)).digest()


def test_the_ids_are_those_of_the_test_vectors():
    found = of(WEIGHTS)
    assert [tensor.digest.hex() for tensor in found.tensors] + [found.weights_id.hex()] == VECTORS


@given(any_array)
def test_the_hash_does_not_depend_on_layout_and_byte_order(array):
    plain = np.ascontiguousarray(array).reshape(array.shape)
    if plain.dtype != object:
        plain = plain.astype(plain.dtype.newbyteorder("="))
    assert manifests.of_tensor(array).digest == manifests.of_tensor(plain).digest


def test_the_hash_depends_on_dtype_shape_containers_and_numbers():
    variants = [
        (np.float32([1, 2]),),
        (np.float64([1, 2]),),
        (np.int32([1, 2]),),
        (np.float32([[1, 2]]),),
        (np.float32([[1], [2]]),),
        (np.float32([2, 1]),),
        [np.float32([1, 2])],
        {"a": np.float32([1, 2])},
        {"b": np.float32([1, 2])},
        collections.OrderedDict(a=np.float32([1, 2])),
        (np.float32([1, 2]), np.float32([])),
        (np.float32([]), np.float32([1, 2])),
    ]
    assert len({of(value).weights_id for value in variants}) == len(variants)


@given(structures())
def test_a_manifest_is_decoded_unchanged(value):
    manifest = of(value)
    found = manifests.decode(v1.WeightsManifest.FromString(manifests.encode(manifest).SerializeToString()))
    assert found == manifest
    assert found.weights_id == manifest.weights_id


def test_equal_tensors_count_once():
    ones = np.ones(10, np.float32)
    manifest = of((ones, ones.copy(), np.zeros(10, np.float32)))
    assert manifest.size_bytes == 80
    assert len(manifest.distinct) == 2


def test_bfloat16_held_as_float32_has_the_digest_of_bfloat16():
    values = np.float32([1, 2.5])
    native = values.astype(dtypes.BFLOAT16.numpy)
    assert manifests.of_tensor(values, dtypes.BFLOAT16).digest == manifests.of_tensor(native).digest


def message(**changes) -> v1.WeightsManifest:
    spec = v1.TensorSpec(data_type=v1.DataType.DATA_TYPE_FLOAT32, shape=[2])
    tensor = {"digest": bytes(32), "spec": spec, "size_bytes": 8, **changes}
    return v1.WeightsManifest(tree=v1.TreeDef(leaf=v1.TreeDef.Leaf()), tensors=[v1.TensorManifest(**tensor)])


@pytest.mark.parametrize(
    "broken, error",
    [
        (message(digest=b"short"), "manifest.tensors[0].digest: expected 32 bytes, got 5"),
        (message(size_bytes=9), "manifest.tensors[0]: expected the bytes of float32[2], got 9"),
        (message(size_bytes=-8), "got -8"),
        (message(spec=v1.TensorSpec(data_type=2, shape=[-1])), "none of them free"),
        (message(spec=v1.TensorSpec(data_type=2, unknown_rank=True)), "none of them free"),
        (message(spec=v1.TensorSpec(data_type=2, shape=[1] * 33)), "at most 32 dimensions"),
        (message(spec=v1.TensorSpec(data_type=99, shape=[2])), "a data type of the protocol"),
        (message(spec=v1.TensorSpec(data_type=2, shape=[2**62, 4])), "expected the bytes of float32"),
        (message(spec=v1.TensorSpec(data_type=16, shape=[3])), "expected the bytes of string[3], got 8"),
        (v1.WeightsManifest(tree=v1.TreeDef(leaf=v1.TreeDef.Leaf())), "manifest.tensors: expected 1, got 0"),
        (v1.WeightsManifest(), "an empty node"),
    ],
)
def test_an_invalid_manifest_is_refused(broken, error):
    with pytest.raises(errors.InvalidRequest) as caught:
        manifests.decode(broken)
    assert error in str(caught.value)
