"""Conversion of values to specs, and refusals."""

from __future__ import annotations

import collections
from decimal import Decimal

import numpy as np
import pytest

from forwardpass.wire import conform, dtypes, errors, trees
from forwardpass.wire.specs import StructureSpec, TensorSpec
from forwardpass.wire.structures import Structure
from support.arrays import nested

Pair = collections.namedtuple("Pair", ["second", "first"])


def leaf(dtype: str, *shape: int | None, batched: bool = False) -> TensorSpec:
    return TensorSpec(shape, dtypes.BY_NAME[dtype], batched)


def spec(nested_spec) -> StructureSpec:
    return StructureSpec.of(nested_spec)


def conformed(value, nested_spec):
    return nested(conform.conform(value, spec(nested_spec), "x"))


class HasArray:
    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array


TAKEN = [
    # value, spec, expected
    (np.float32([1, 2]), leaf("float32", None), [1, 2]),
    (np.float64([1, 2]), leaf("float32", None), [1, 2]),
    (np.float16([1, 2]), leaf("float64", None), [1, 2]),
    (np.array([1, 2], ">f4"), leaf("float32", None), [1, 2]),
    (np.int64([1, 2]), leaf("float32", None), [1, 2]),
    (np.int64([1, 2]), leaf("int32", None), [1, 2]),
    (np.uint8([1, 2]), leaf("int64", None), [1, 2]),
    (np.int64([1, 200]), leaf("uint8", None), [1, 200]),
    (np.array([True]), leaf("float32", None), [1]),
    (np.array([True]), leaf("int8", None), [1]),
    (np.float32([1]), leaf("complex64", None), [1]),
    (np.float32([1.5]), leaf("bfloat16", None), [1.5]),
    (1.5, leaf("float32"), 1.5),
    (3, leaf("int32"), 3),
    (True, leaf("bool"), True),
    (1e300, leaf("float32"), np.inf),
    ([1, 2], leaf("float32", 2), [1, 2]),
    ([[1, 2], [3, 4]], leaf("int64", None, 2), [[1, 2], [3, 4]]),
    ((1, 2), leaf("int8", None), [1, 2]),
    ([], leaf("int32", None), []),
    ([[]], leaf("int32", None, 0), [[]]),
    (np.float32(7), leaf("float32"), 7),
    (HasArray(np.float32([1])), leaf("float32", None), [1]),
    (np.array([np.nan, np.inf]), leaf("float32", None), [np.nan, np.inf]),
    ("text", leaf("string"), "text"),
    (["a", b"b"], leaf("string", None), ["a", b"b"]),
    (np.array(["a", "b"]), leaf("string", None), ["a", "b"]),
    (np.array([b"a"]), leaf("string", None), [b"a"]),
    (np.zeros((2, 3), np.float32), TensorSpec(None, dtypes.BY_NAME["float32"]), [[0] * 3] * 2),
]


@pytest.mark.parametrize("value, leaf_spec, expected", TAKEN)
def test_a_leaf_is_converted_as_by_a_local_model(value, leaf_spec, expected):
    array = conformed(value, leaf_spec)
    assert array.dtype == leaf_spec.dtype
    expected_array = np.array(expected, object if leaf_spec.data_type is dtypes.STRING else leaf_spec.dtype)
    assert array.shape == expected_array.shape
    assert np.array_equal(array, expected_array, equal_nan=leaf_spec.dtype.kind == "f")


REFUSED = [
    # value, spec, error, message
    (np.float32([1.5]), leaf("int32", None), errors.DTypeMismatch, "x: expected int32[None], got float32[1]"),
    (1.7, leaf("int32"), errors.DTypeMismatch, "x: expected int32[], got float64[]"),
    ([1.0], leaf("int32", None), errors.DTypeMismatch, "x: expected int32[None], got float64[1]"),
    (np.complex64([1]), leaf("float32", None), errors.DTypeMismatch, "x: expected float32[None], got complex64[1]"),
    (np.int8([1]), leaf("bool", None), errors.DTypeMismatch, "x: expected bool[None], got int8[1]"),
    (np.int64([2**31]), leaf("int32", None), errors.DTypeMismatch, "got int64[1] with integers that do not fit"),
    (np.int64([-1]), leaf("uint8", None), errors.DTypeMismatch, "got int64[1] with integers that do not fit"),
    (np.uint64([2**63]), leaf("int64", None), errors.DTypeMismatch, "got uint64[1] with integers that do not fit"),
    (2**70, leaf("int64"), errors.DTypeMismatch, "x: expected int64[], got"),
    (np.float32([1]), leaf("string", None), errors.DTypeMismatch, "x: expected string[None], got float32[1]"),
    (["a"], leaf("float32", None), errors.DTypeMismatch, "x: expected float32[None], got string[1]"),
    ([1], leaf("string", None), errors.DTypeMismatch, "got an object array[1] that holds int at [0]"),
    (np.array(["2020"], "M8[Y]"), leaf("int64", None), errors.DTypeMismatch, "x: expected int64[None]"),
    (np.zeros((2, 3)), leaf("float32", None, 4), errors.ShapeMismatch, "expected float32[None,4], got float64[2,3]"),
    (np.zeros(3), leaf("float32"), errors.ShapeMismatch, "x: expected float32[], got float64[3]"),
    (np.float32([1]), leaf("float32", 2), errors.ShapeMismatch, "x: expected float32[2], got float32[1]"),
    ([[1], [2, 3]], leaf("int32", None, None), errors.ShapeMismatch, "a list of 2 that is not a rectangular array"),
    (None, leaf("float32"), errors.StructureMismatch, "x: expected float32[], got None"),
    ({"a": 1}, leaf("float32"), errors.StructureMismatch, "x: expected float32[], got a mapping with keys ['a']"),
    (object(), leaf("float32"), errors.DTypeMismatch, "got a value of type object, which numpy keeps as an object"),
    ({1.0}, leaf("float32", None), errors.DTypeMismatch, "got a value of type set, which"),
    ((i for i in [1.0]), leaf("float32", None), errors.DTypeMismatch, "got a value of type generator, which"),
    ((i for i in "a"), leaf("string", None), errors.DTypeMismatch, "got a value of type generator, which"),
    ([1.0, None], leaf("float32", None), errors.DTypeMismatch, "got an object array[2] that holds None at [1]"),
    (["a", None], leaf("string", None), errors.DTypeMismatch, "got an object array[2] that holds None at [1]"),
    ([["a"], [None]], leaf("string", None, 1), errors.DTypeMismatch, "object array[2,1] that holds None at [1, 0]"),
    (np.array([1, 2], object), leaf("float32", None), errors.DTypeMismatch, "object array[2] that holds int at [0]"),
    ([Decimal(1)], leaf("float32", None), errors.DTypeMismatch, "got an object array[1] that holds Decimal at [0]"),
    ([["a"], ["b", "c"]], leaf("string", None, None), errors.ShapeMismatch, "it is not a rectangular array"),
    (np.array([[1], [2, 3]], object), leaf("int32", None, None), errors.ShapeMismatch, "it is not a rectangular array"),
    (np.array(["a", "b"], object), leaf("float32", None), errors.DTypeMismatch, "got string[2]"),
]


@pytest.mark.parametrize("value, leaf_spec, error, message", REFUSED)
def test_a_leaf_is_refused_by_name(value, leaf_spec, error, message):
    with pytest.raises(error) as caught:
        conformed(value, leaf_spec)
    assert message in str(caught.value)
    assert caught.value.place == "x"
    assert type(caught.value) is error


# numpy 2 only: the client also supports numpy 1, which has no such arrays.
if hasattr(np.dtypes, "StringDType"):
    STRINGS = np.dtypes.StringDType

    def test_numpys_variable_length_strings_are_strings():
        array = conformed(np.array([["a", "ü" * 20], ["", "d"]], STRINGS()), leaf("string", None, 2))
        assert array.dtype == object
        assert array.tolist() == [["a", "ü" * 20], ["", "d"]]

    def test_a_missing_numpy_string_is_refused_by_its_index():
        with pytest.raises(errors.DTypeMismatch, match=r"got an object array\[2\] that holds None at \[1\]"):
            conformed(np.array(["a", None], STRINGS(na_object=None)), leaf("string", None))

    def test_numpys_variable_length_strings_are_not_numbers():
        with pytest.raises(errors.DTypeMismatch, match=r"expected float32\[None\], got string\[1\]"):
            conformed(np.array(["a"], STRINGS()), leaf("float32", None))


ONE = leaf("int32")
CONTAINERS = [
    # value, spec, expected or the message of the refusal
    ([1, 2], (ONE, ONE), (1, 2)),
    ((1, 2), [ONE, ONE], [1, 2]),
    ({"b": 1, "a": 2}, {"a": ONE, "b": ONE}, {"a": 2, "b": 1}),
    (collections.OrderedDict(a=1), {"a": ONE}, {"a": 1}),
    ({"a": 1}, collections.OrderedDict(a=ONE), collections.OrderedDict(a=1)),
    (Pair(1, 2), Pair(ONE, ONE), (1, 2)),
    (collections.namedtuple("Other", ["first", "second"])(2, 1), Pair(ONE, ONE), (1, 2)),
    (None, None, None),
    ((), (), ()),
    ([], (), ()),
    ((1,), (ONE, ONE), "x: expected 2 items, got 1"),
    (1, (ONE, ONE), "x: expected a tuple of 2, got int"),
    (np.int32([1, 2]), (ONE, ONE), "x: expected a tuple of 2, got int32[2]"),
    ({"a": 1}, (ONE,), "x: expected a tuple of 1, got a mapping with keys ['a']"),
    ((1,), {"a": ONE}, "x: expected a mapping with keys ['a'], got a tuple of 1"),
    ({"a": 1, "b": 2}, {"a": ONE}, "x: expected keys ['a'], got keys ['a', 'b']"),
    ((1, 2), Pair(ONE, ONE), "x: expected a named tuple Pair(second, first), got a tuple of 2"),
    (1, None, "x: expected None, got int"),
    (None, (ONE,), "x: expected a tuple of 1, got None"),
    (((1, [None]),), ((ONE, [ONE]),), "x[0][1][0]: expected int32[], got None"),
    ({"a": {"b": (1,)}}, {"a": {"b": (ONE, ONE)}}, "x['a']['b']: expected 2 items, got 1"),
    (Pair({"k": "s"}, 1), Pair({"k": ONE}, ONE), "x.second['k']: expected int32[], got string[]"),
]


@pytest.mark.parametrize("value, nested_spec, expected", CONTAINERS)
def test_containers_are_converted_as_by_a_local_model(value, nested_spec, expected):
    if isinstance(expected, str):
        with pytest.raises(errors.InvalidRequest) as caught:
            conformed(value, nested_spec)
        assert str(caught.value) == expected
    else:
        found = conformed(value, nested_spec)
        assert found == expected
        assert isinstance(found, type(expected))


@pytest.mark.parametrize("value, nested_spec, expected", CONTAINERS)
def test_a_received_structure_may_have_the_same_containers(value, nested_spec, expected):
    tree, leaves = trees.flatten(value)
    arrays = Structure(tree, [np.asarray(leaf) for leaf in leaves])
    if isinstance(expected, str) and tree != spec(nested_spec).tree:
        with pytest.raises(errors.StructureMismatch) as caught:
            conform.order(tree, spec(nested_spec), "x")
        assert str(caught.value).split(", got")[0] == expected.split(", got")[0]
    elif not isinstance(expected, str):
        ordered = [arrays.leaves[index] for index in conform.order(tree, spec(nested_spec), "x")]
        assert ordered == trees.flatten(expected)[1]


class Stubborn:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("not on this device")


def test_a_value_that_cannot_become_an_array_is_refused_by_name():
    with pytest.raises(
        errors.StructureMismatch,
        match=r"x\[0\]: expected int32\[\], got a Stubborn that cannot be converted to an array",
    ):
        conformed((Stubborn(),), (ONE,))


def test_a_fitting_array_is_not_copied():
    array = np.zeros((3, 2), np.float32)
    assert conform.conform(array, spec(leaf("float32", None, 2)), "x").leaves[0] is array


@pytest.mark.parametrize(
    "value, nested_spec, message",
    [
        (np.float64([1]), leaf("float32", None), "x: expected float32[None], got float64[1]"),
        (np.float32([[1]]), leaf("float32", None), "x: expected float32[None], got float32[1,1]"),
        ((np.int32(1),), (ONE, ONE), "x: expected 2 items, got 1"),
        (([np.int32(1)], np.int64(1)), ((ONE,), ONE), "x[1]: expected int32[], got int64[]"),
    ],
)
def test_a_received_structure_is_never_cast(value, nested_spec, message):
    with pytest.raises(errors.InvalidRequest) as caught:
        conform.check(Structure.of(value), spec(nested_spec), "x")
    assert str(caught.value) == message


def test_a_received_mapping_is_reordered_to_the_specs_order():
    received = Structure.of({"b": np.int32(1), "a": np.int32(2)})
    assert [int(found) for found in conform.check(received, spec({"a": ONE, "b": ONE}), "x")] == [2, 1]


def batch_mismatch(**sizes: int) -> str | None:
    """The error of arguments with batches of these sizes; each has a leaf without a batch between two others."""
    batched = spec([leaf("int32", None, batched=True), leaf("int32", None), leaf("int32", None, batched=True)])
    parts = [
        (name, [np.zeros(size, np.int32), np.zeros(9, np.int32), np.zeros(size, np.int32)], batched)
        for name, size in sizes.items()
    ]
    try:
        conform.check_batch(parts)
    except errors.ShapeMismatch as error:
        return str(error)
    return None


def test_leaves_with_a_batch_may_differ_from_leaves_without_one():
    assert batch_mismatch(x=3, y=3) is None


def test_a_batch_size_that_differs_is_refused_by_leaf_name():
    assert batch_mismatch(x=3, y=4) == "y[0]: expected 3 examples as in x[0], got 4"
