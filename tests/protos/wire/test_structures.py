"""Encoding and decoding of structures and their trees."""

from __future__ import annotations

import collections
import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given

from forwardpass import v1
from forwardpass.wire import errors, fields, trees
from forwardpass.wire import structures as wire_structures
from forwardpass.wire.limits import Limits
from forwardpass.wire.structures import Structure
from forwardpass.wire.trees import Kind
from support.arrays import Point, nested, same_bits, structures


def encode(structure: Structure) -> bytes:
    pieces, size_bytes = wire_structures.encode(structure)
    encoded = b"".join(pieces)
    assert len(encoded) == size_bytes
    return encoded


def decode(data: bytes, **limits: int) -> Structure:
    return wire_structures.decode(data, 0, len(data), "here", Limits(**limits))


@given(structures())
def test_every_structure_is_decoded_with_its_containers(value):
    decoded = nested(decode(encode(Structure.of(value))))
    expected_tree, expected = trees.flatten(value)
    tree, leaves = trees.flatten(decoded)
    assert tree == expected_tree
    assert [type(node) for node in _containers(decoded)] == [
        type(node) if not isinstance(node, Point) else type(found)
        for node, found in zip(_containers(value), _containers(decoded), strict=True)
    ]
    for leaf, original in zip(leaves, expected, strict=True):
        assert same_bits(leaf, original.astype(original.dtype.newbyteorder("=")))


def _containers(value):
    if isinstance(value, (tuple, list, dict)):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


@given(structures())
def test_protobuf_reads_the_encoded_bytes(value):
    structure = Structure.of(value)
    message = v1.Structure.FromString(encode(structure))
    assert len(message.leaves) == structure.tree.num_leaves
    assert decode(message.SerializeToString()).tree == structure.tree


def test_the_deepest_structure_allowed_is_read():
    assert nested(decode(nested_message(24))) is not None


def test_a_named_tuple_is_decoded_with_its_name_and_fields():
    decoded = nested(decode(encode(Structure.of(Point(y=np.int32(1), x=np.int32(2))))))
    assert type(decoded).__name__ == "Point"
    assert decoded._fields == ("y", "x")
    assert (decoded.y, decoded.x) == (1, 2)


def test_named_tuples_of_one_kind_share_their_class():
    first, second = (nested(decode(encode(Structure.of(Point(np.int32(1), np.int32(2)))))) for _ in range(2))
    assert type(first) is type(second)


def test_mappings_keep_their_order():
    value = collections.OrderedDict(b=np.int8(1), a=np.int8(2))
    assert list(nested(decode(encode(Structure.of(value))))) == ["b", "a"]


@pytest.mark.parametrize(
    "value, text",
    [
        (1, "*"),
        (None, "None"),
        ((1,), "(*,)"),
        ([1, (2, 3)], "[*, (*, *)]"),
        ({"a": 1}, "{'a': *}"),
        (collections.OrderedDict(a=1), "OrderedDict({'a': *})"),
        (Point(1, None), "Point(y=*, x=None)"),
    ],
)
def test_a_tree_is_described_as_python_literals(value, text):
    assert trees.flatten(value)[0].describe() == text


def test_paths_are_python_expressions():
    tree, _ = trees.flatten({"a": [1, (2,)], "b": Point(3, 4)})
    assert tree.paths("x") == ["x['a'][0]", "x['a'][1][0]", "x['b'].y", "x['b'].x"]


def test_a_wrong_number_of_leaves_is_refused():
    with pytest.raises(errors.StructureMismatch, match="expected 2 leaves, got 1"):
        trees.flatten((1, 2))[0].unflatten([1])


def test_a_recursive_tree_is_refused():
    endless: list = []
    endless.append(endless)
    with pytest.raises(errors.StructureMismatch, match="at most 24 levels"):
        trees.flatten(endless)


@pytest.mark.parametrize(
    "value, reason",
    [
        ({1: 2}, "keys that are strings, got int"),
        ({"k" * 257: 2}, "at most 256 bytes"),
        ({"ü" * 129: 2}, "at most 256 bytes"),
    ],
)
def test_names_that_cannot_be_encoded_are_refused(value, reason):
    with pytest.raises(errors.StructureMismatch, match=reason):
        trees.flatten(value)


def nested_message(depth: int) -> bytes:
    """A leaf in nested lists, encoded by hand: protobuf does not encode messages of this depth."""
    node = b"\x0a\x00"
    for _ in range(depth):
        items = fields.prefix(1, len(node)) + node
        node = fields.prefix(3, len(items)) + items
    leaf = v1.Structure(leaves=[v1.Tensor(data_type=2, data=b"1234")]).SerializeToString()
    return fields.prefix(1, len(node)) + node + leaf


def tree_message(**node) -> bytes:
    return v1.Structure(tree=v1.TreeDef(**node)).SerializeToString()


LEAF = v1.TreeDef(leaf=v1.TreeDef.Leaf())
HOSTILE = {
    "no tree": b"",
    "an empty node": tree_message(),
    "25 levels": nested_message(25),
    "a thousand levels": nested_message(1000),
    "fewer leaves than the tree has": v1.Structure(tree=LEAF).SerializeToString(),
    "more leaves than the tree has": v1.Structure(
        tree=LEAF, leaves=[v1.Tensor(data_type=2, data=b"1234")] * 2
    ).SerializeToString(),
    "two trees": v1.Structure(tree=LEAF).SerializeToString() * 2,
    "keys without values": tree_message(dict=v1.TreeDef.Mapping(keys=["a"])),
    "one key twice": tree_message(dict=v1.TreeDef.Mapping(keys=["a", "a"], values=[LEAF, LEAF])),
    "a long key": tree_message(dict=v1.TreeDef.Mapping(keys=["k" * 300], values=[LEAF])),
    "a type name that is code": tree_message(
        named_tuple=v1.TreeDef.NamedTuple(type_name="a;import os", fields=["a"], values=[LEAF])
    ),
    "a type name that is a keyword": tree_message(
        named_tuple=v1.TreeDef.NamedTuple(type_name="class", fields=["a"], values=[LEAF])
    ),
    "a field name that is code": tree_message(
        named_tuple=v1.TreeDef.NamedTuple(type_name="T", fields=["a,b"], values=[LEAF])
    ),
    "a private field": tree_message(named_tuple=v1.TreeDef.NamedTuple(type_name="T", fields=["_make"], values=[LEAF])),
    "a tree that is no message": b"\x0a\x02\xff\xff",
    "a tree as a varint": b"\x08\x01",
    "leaves as a varint": v1.Structure(tree=LEAF).SerializeToString() + b"\x10\x01",
    "a tree of three megabytes": tree_message(
        list=v1.TreeDef.Sequence(items=[v1.TreeDef(none=v1.TreeDef.Absent())] * 800_000)
    ),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_structure_is_refused(data):
    with pytest.raises(errors.InvalidRequest):
        decode(data)


def test_the_number_of_leaves_is_bounded():
    data = encode(Structure.of([np.int8(0)] * 11))
    assert decode(data, max_leaves=11).tree.num_leaves == 11
    with pytest.raises(errors.StructureMismatch, match="at most 10 leaves"):
        decode(data, max_leaves=10)


def test_an_error_names_the_leaf():
    message = v1.Structure.FromString(encode(Structure.of({"a": [np.float32([1]), np.float32([2])]})))
    message.leaves[1].data = b"123"
    with pytest.raises(errors.ShapeMismatch, match=r"here\['a'\]\[1\]: expected 4 bytes for float32\[1\], got 3 bytes"):
        decode(message.SerializeToString())


def named(type_name: str, fields: tuple[str, ...], items: tuple) -> object:
    """A named tuple of a decoded response."""
    return trees.TreeDef(Kind.NAMED_TUPLE, [trees.LEAF] * len(items), fields, type_name).unflatten(items)


def test_a_named_tuple_of_a_response_can_be_pickled():
    value = {"scores": named("Scores", ("zeta", "alpha"), (np.float32([1, 2]), named("Inner", ("x",), (b"s",))))}
    program = "import pickle, sys; print(pickle.dumps(pickle.load(sys.stdin.buffer)).hex())"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        finished = subprocess.run(
            [sys.executable, "-c", program], input=pickle.dumps(value, protocol), capture_output=True, check=True
        )
        found = pickle.loads(bytes.fromhex(finished.stdout.decode()))["scores"]
        assert type(found) is type(value["scores"])
        assert found.zeta.tolist() == [1, 2]
        assert found.alpha == (b"s",)
        assert found.alpha._fields == ("x",)


def test_a_named_tuple_of_a_response_is_copied():
    value = named("Scores", ("zeta", "alpha"), ([1], 2))
    found = copy.deepcopy(value)
    assert found == value
    assert type(found) is type(value)
    assert found.zeta is not value.zeta
    assert copy.copy(value) == value
