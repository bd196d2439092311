"""Arrays and structures of them: hypothesis strategies, and what compares them."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from forwardpass.wire import dtypes, trees
from forwardpass.wire.dtypes import DType
from forwardpass.wire.structures import Structure

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def arrays_of(dtype: DType) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    """Arrays of one type, of any bits, in any memory layout."""
    if dtype is dtypes.STRING:
        return shapes.flatmap(
            lambda shape: hnp.arrays(object, shape, elements=st.binary(max_size=6), fill=st.nothing())
        )
    if dtype.numpy == np.dtype(bool):
        plain = hnp.arrays(np.uint8, shapes, elements=st.integers(0, 1)).map(lambda bits: bits.astype(bool))
    else:
        size = dtype.numpy.itemsize
        plain = shapes.flatmap(
            lambda shape: st.binary(min_size=size * int(np.prod(shape)), max_size=size * int(np.prod(shape))).map(
                lambda data: np.frombuffer(data, dtype.numpy).reshape(shape)
            )
        )
    return st.one_of(
        plain, plain.map(lambda a: a.T), plain.map(_every_other), plain.map(_big_endian), plain.map(_fortran)
    )


def _every_other(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.repeat(array, 2, axis=0)[::2] if array.ndim else array


def _big_endian(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (
        array.astype(array.dtype.newbyteorder(">")) if array.dtype.kind in "iufc" and array.dtype.isbuiltin else array
    )


def _fortran(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asfortranarray(array) if array.ndim else array


any_dtype = st.sampled_from(dtypes.ALL)
any_array = any_dtype.flatmap(arrays_of)
names = st.text(min_size=1, max_size=6).filter(
    lambda name: name.encode(errors="replace") == name.encode(errors="ignore")
)

Point = collections.namedtuple("Point", ["y", "x"])


def structures(leaves: st.SearchStrategy[Any] = any_array) -> st.SearchStrategy[Any]:
    """Structures of every kind of container, a few levels deep."""
    return st.recursive(
        leaves | st.none(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(names, inner, max_size=3),
            st.dictionaries(names, inner, max_size=3).map(collections.OrderedDict),
            st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        ),
        max_leaves=8,
    )


def nested(structure: Structure) -> trees.Nested:
    """The containers with the arrays in them."""
    return structure.tree.unflatten(structure.leaves)


def same_bits(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Whether two arrays have the same shape and bits, NaN included; strings the same elements."""
    if one.shape != other.shape:
        return False
    if one.dtype == object:
        return one.ravel().tolist() == other.ravel().tolist()
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()
