"""Converts values to specs as a local model would, or raises an error that names the leaf that does not fit."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from forwardpass.wire import dtypes, errors, trees
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import StructureSpec, TensorSpec, describe_shape
from forwardpass.wire.structures import Structure
from forwardpass.wire.trees import Kind


def conform(value: trees.Nested, spec: StructureSpec, place: str) -> Structure:
    """Converts a value to a structure with the spec's containers and dtypes, and with shapes that the spec admits.

    Containers: a list may replace a tuple, and any mapping another one, in any order of keys; a named tuple needs the
    field names of the spec. Leaves: numpy arrays, Python numbers and lists, and objects with `__array__`. A leaf is
    cast if numpy calls the cast "same kind" (float64 to float32, int64 to float32, not 1.5 to int32); an integer type
    is cast if all values fit. An empty list fits any dtype.

    place: the name of the value in error messages.
    Raises StructureMismatch, DTypeMismatch or ShapeMismatch, which name the leaf under `place`.
    """
    leaves = arrange(value, spec.tree, place)
    for index, (leaf, leaf_spec) in enumerate(zip(leaves, spec.leaves, strict=True)):
        # Most leaves fit unchanged. Only the others need their path, which is slow to compute.
        if not _fits(leaf, leaf_spec):
            leaves[index] = conform_leaf(leaf, leaf_spec, spec.tree.paths(place)[index])
    return Structure(spec.tree, leaves, spec.data_types)


def _fits(value: Any, spec: TensorSpec) -> bool:
    # An object array may hold other objects than strings: its elements are checked in `conform_leaf`.
    return (
        type(value) is np.ndarray
        and value.dtype == spec.dtype
        and spec.admits_shape(value.shape)
        and spec.data_type is not dtypes.STRING
    )


def arrange(value: trees.Nested, tree: trees.TreeDef, place: str) -> list[Any]:
    """The leaves of a value, in the order of the tree. Rules for containers and errors: see `conform`."""
    leaves: list[Any] = []
    _arrange(value, tree, place, leaves)
    return leaves


def _arrange(value: trees.Nested, tree: trees.TreeDef, place: str, leaves: list[Any]) -> None:
    if tree.kind is Kind.LEAF:
        leaves.append(value)
        return
    values = items(value, tree, place)
    if tree.is_flat:
        leaves.extend(values)
        return
    for index, child in enumerate(tree.children):
        _arrange(values[index], child, tree.child_path(place, index), leaves)


def check(structure: Structure, spec: StructureSpec, place: str) -> Sequence[Array]:
    """The leaves of a received structure in the spec's order. Checked like `conform`, but never cast.

    Raises StructureMismatch, DTypeMismatch or ShapeMismatch, which name the leaf under `place`.
    """
    leaves = structure.leaves
    if structure.tree is not spec.tree and structure.tree != spec.tree:
        leaves = [leaves[index] for index in order(structure.tree, spec, place)]
    for index, (leaf, leaf_spec) in enumerate(zip(leaves, spec.leaves, strict=True)):
        if leaf.dtype != leaf_spec.dtype:
            error: type[errors.InvalidRequest] = errors.DTypeMismatch
        elif not leaf_spec.admits_shape(leaf.shape):
            error = errors.ShapeMismatch
        else:
            continue
        # A received object array holds strings only. There may be a million: they are not checked one by one.
        found = f"string{describe_shape(leaf.shape)}" if leaf.dtype == object else kind_of(leaf)
        raise error(place=spec.tree.paths(place)[index], expected=str(leaf_spec), found=found)
    return leaves


def order(found: trees.TreeDef, spec: StructureSpec, place: str) -> list[int]:
    """For each leaf of the spec, the index of the leaf of a received tree. Rules for containers: see `conform`.

    Does not build the received containers. Raises StructureMismatch.
    """
    indices: list[int] = []
    _order(found, spec.tree, place, 0, indices, iter(spec.leaves))
    return indices


def _order(
    found: trees.TreeDef,
    wanted: trees.TreeDef,
    place: str,
    first: int,
    indices: list[int],
    specs: Iterator[TensorSpec],
) -> None:
    """first: the index of the first leaf below `found`."""
    if wanted.kind is Kind.LEAF:
        leaf_spec = next(specs)
        if found.kind is not Kind.LEAF:
            raise errors.StructureMismatch(place=place, expected=str(leaf_spec), found=_kind_of_tree(found))
        indices.append(first)
        return
    matching = _matching_items(found, wanted, place)
    starts = list(itertools.accumulate((child.num_leaves for child in found.children), initial=first))
    for index, item in enumerate(matching):
        child = wanted.children[index]
        _order(found.children[item], child, wanted.child_path(place, index), starts[item], indices, specs)


def _matching_items(found: trees.TreeDef, wanted: trees.TreeDef, place: str) -> Sequence[int]:
    """For each item of the wanted container, the index of the item of the received one."""
    is_mapping = found.kind in (Kind.DICT, Kind.ORDERED_DICT)
    is_sequence = found.kind in (Kind.TUPLE, Kind.LIST, Kind.NAMED_TUPLE)
    if wanted.kind is Kind.NONE:
        fits, expected = found.kind is Kind.NONE, "None"
    elif wanted.kind is Kind.NAMED_TUPLE:
        fits = found.kind is Kind.NAMED_TUPLE and _are_same(found.names, wanted.names)
        expected = f"a named tuple {wanted.type_name}({_listed(wanted.names)})"
    elif wanted.kind in (Kind.DICT, Kind.ORDERED_DICT):
        fits = is_mapping and _are_same(found.names, wanted.names)
        expected = f"{'' if is_mapping else 'a mapping with '}keys {_quoted(wanted.names)}"
    else:
        fits = is_sequence and len(found.children) == len(wanted.children)
        expected = (
            f"{len(wanted.children)} items" if is_sequence else f"a {wanted.kind.value} of {len(wanted.children)}"
        )
    if not fits:
        raise errors.StructureMismatch(place=place, expected=expected, found=_found(found, wanted))
    if not wanted.names or found.names == wanted.names:
        return range(len(wanted.children))
    indices = {name: index for index, name in enumerate(found.names)}
    return [indices[name] for name in wanted.names]


def _are_same(found: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether two sequences hold the same names, in any order."""
    return len(found) == len(wanted) and set(found) == set(wanted)


# Names in an error message, which is cut after some kilobytes. A received container may have 65,536 names.
_LISTED = 100


def _listed(names: Sequence[str]) -> str:
    """The names of a container for an error message."""
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _quoted(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return f"{list(names[:_LISTED])}" + (f" and {rest} more" if rest > 0 else "")


def _found(found: trees.TreeDef, wanted: trees.TreeDef) -> str:
    if wanted.kind in (Kind.TUPLE, Kind.LIST) and found.kind in (Kind.TUPLE, Kind.LIST, Kind.NAMED_TUPLE):
        return str(len(found.children))
    if wanted.kind in (Kind.DICT, Kind.ORDERED_DICT) and found.kind in (Kind.DICT, Kind.ORDERED_DICT):
        return f"keys {_quoted(found.names)}"
    return _kind_of_tree(found)


def _kind_of_tree(tree: trees.TreeDef) -> str:
    """`kind_of` for a tree."""
    if tree.kind is Kind.NONE:
        return "None"
    if tree.kind is Kind.LEAF:
        return "an array"
    if tree.kind is Kind.NAMED_TUPLE:
        return f"{tree.type_name}({_listed(tree.names)})"
    if tree.names:
        return f"a mapping with keys {_quoted(tree.names)}"
    return f"a {tree.kind.value} of {len(tree.children)}"


def check_batch(parts: Sequence[tuple[str, Sequence[Array], StructureSpec]]) -> None:
    """Checks that all leaves marked `batched` have the same first dimension. Raises ShapeMismatch.

    parts: (place, leaves, spec) for each argument of one call; the leaves already fit their spec.
    """
    first: tuple[str, int] | None = None
    for place, leaves, spec in parts:
        for index, (leaf, leaf_spec) in enumerate(zip(leaves, spec.leaves, strict=True)):
            if not leaf_spec.batched or not leaf.ndim:
                continue
            if first is None:
                first = spec.tree.paths(place)[index], leaf.shape[0]
            elif leaf.shape[0] != first[1]:
                raise errors.ShapeMismatch(
                    place=spec.tree.paths(place)[index],
                    expected=f"{first[1]} examples as in {first[0]}",
                    found=f"{leaf.shape[0]}",
                )


def items(value: trees.Nested, tree: trees.TreeDef, place: str) -> Sequence[trees.Nested]:
    """The items of a container in the order of the tree's children. Raises StructureMismatch for another container."""
    kind = tree.kind
    if kind is Kind.NONE:
        if value is not None:
            raise errors.StructureMismatch(place=place, expected="None", found=kind_of(value))
        return ()
    if kind is Kind.NAMED_TUPLE:
        if not trees.is_named_tuple(value) or set(value._fields) != set(tree.names):
            raise errors.StructureMismatch(
                place=place, expected=f"a named tuple {tree.type_name}({', '.join(tree.names)})", found=kind_of(value)
            )
        return [getattr(value, name) for name in tree.names]
    if kind in (Kind.DICT, Kind.ORDERED_DICT):
        if not isinstance(value, Mapping):
            raise errors.StructureMismatch(
                place=place, expected=f"a mapping with keys {list(tree.names)}", found=kind_of(value)
            )
        if set(value) != set(tree.names):
            raise errors.StructureMismatch(
                place=place, expected=f"keys {list(tree.names)}", found=f"keys {list(value)}"
            )
        return [value[name] for name in tree.names]
    if not isinstance(value, (tuple, list)):
        raise errors.StructureMismatch(
            place=place, expected=f"a {kind.value} of {len(tree.children)}", found=kind_of(value)
        )
    if len(value) != len(tree.children):
        raise errors.StructureMismatch(place=place, expected=f"{len(tree.children)} items", found=f"{len(value)}")
    return value


def conform_leaf(value: Any, spec: TensorSpec, place: str) -> Array:
    """Converts one value to an array of the spec's dtype and an admitted shape. Rules and errors: see `conform`."""
    array = value if type(value) is np.ndarray else _as_array(value, spec, place)
    if array.dtype == object:
        _check_objects(array, spec, place)
    if not spec.admits_shape(array.shape):
        raise errors.ShapeMismatch(place=place, expected=str(spec), found=_describe(array))
    if array.dtype != spec.dtype:
        array = _cast(array, spec, place)
    return array


def _check_objects(array: Array, spec: TensorSpec, place: str) -> None:
    """Raises DTypeMismatch for an object array with other elements than strings, ShapeMismatch for ragged sequences."""
    foreign = dtypes.foreign_object(array)
    if not foreign:
        return
    is_ragged = array.ndim and all(isinstance(element, (list, tuple, np.ndarray)) for element in array.flat)
    if is_ragged:
        found = f"{_describe(array)}: it is not a rectangular array"
        raise errors.ShapeMismatch(place=place, expected=str(spec), found=found)
    raise errors.DTypeMismatch(place=place, expected=str(spec), found=_describe(array))


def _as_array(value: Any, spec: TensorSpec, place: str) -> Array:
    if value is None or isinstance(value, Mapping):
        raise errors.StructureMismatch(place=place, expected=str(spec), found=kind_of(value))
    try:
        array = np.asarray(value, object if spec.data_type is dtypes.STRING and _is_plain(value) else None)
    except Exception as error:  # The value's own __array__ may raise anything.
        if _is_plain(value):
            raise errors.ShapeMismatch(
                place=place, expected=str(spec), found=f"{kind_of(value)} that is not a rectangular array"
            ) from None
        raise errors.StructureMismatch(
            place=place,
            expected=str(spec),
            found=f"a {type(value).__name__} that cannot be converted to an array: {error}",
        ) from error
    if not array.size and _is_plain(value):
        return array.astype(spec.dtype)
    return array


def _is_plain(value: Any) -> bool:
    return isinstance(value, (list, tuple, str, bytes))


def _cast(array: Array, spec: TensorSpec, place: str) -> Array:
    target = spec.dtype
    is_string = array.dtype.kind in dtypes.STRING_KINDS
    if is_string != (spec.data_type is dtypes.STRING):
        raise _dtype_mismatch(array, spec, place)
    if is_string:
        strings = array.astype(object)
        if array.dtype.kind == "T":
            # A StringDType may hold another object for missing values.
            _check_objects(strings, spec, place)
        return strings
    if array.dtype.newbyteorder("=") == target:
        return array.astype(target)
    if not can_cast(array.dtype, spec.data_type):
        raise _dtype_mismatch(array, spec, place)
    if array.dtype.kind in "iu" and target.kind in "iu" and array.size:
        low, high = array.min(), array.max()
        bounds = np.iinfo(target)
        if int(low) < bounds.min or int(high) > bounds.max:
            raise errors.DTypeMismatch(
                place=place, expected=str(spec), found=f"{_describe(array)} with integers that do not fit"
            )
    with np.errstate(over="ignore"):  # A float that is too large becomes infinite, as in a local model.
        return array.astype(target)


def can_cast(source: np.dtype[Any], target: dtypes.DType) -> bool:
    """Whether arrays of a dtype are cast to an element type: see `conform`."""
    if target is dtypes.BFLOAT16:
        return source.kind in "biuf"
    if source == dtypes.BFLOAT16.numpy:
        return target.numpy.kind in "fc"
    if source.kind in "iu" and target.numpy.kind in "iu":
        return True  # `_cast` checks the values. A list of Python integers is int64 and may stand for uint8.
    return source.kind in "biufc" and np.can_cast(source, target.numpy, "same_kind")


def _dtype_mismatch(array: Array, spec: TensorSpec, place: str) -> errors.DTypeMismatch:
    return errors.DTypeMismatch(place=place, expected=str(spec), found=_describe(array))


def _describe(array: Array) -> str:
    if array.dtype == object:
        foreign = dtypes.foreign_object(array)
        if foreign and not array.ndim:
            return f"a value of type {foreign}, which numpy keeps as an object"
        if foreign:
            return f"an object array{describe_shape(array.shape)} that holds {foreign}"
    name = "string" if array.dtype.kind in dtypes.STRING_KINDS + "O" else str(array.dtype)
    return f"{name}{describe_shape(array.shape)}"


def kind_of(value: Any) -> str:
    """The kind of a value for an error message: its type and shape or length, none of its contents."""
    if value is None:
        return "None"
    if trees.is_named_tuple(value):
        return f"{type(value).__name__}({', '.join(value._fields)})"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, collections.abc.Mapping):
        return f"a mapping with keys {list(value)}"
    if isinstance(value, (np.ndarray, np.generic)):
        return _describe(np.asarray(value))
    return type(value).__name__
