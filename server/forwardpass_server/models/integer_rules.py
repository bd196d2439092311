"""Computations of shapes and axes: small tensors of whole numbers, of which each number is known as a `Size`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from forwardpass_server.models import sizes, slices
from forwardpass_server.models.row_kinds import Free, Kind, Rows, Values, of_values, values_of
from forwardpass_server.models.sizes import ONE, Number, Size

LARGEST = 64
"""The most numbers of a tensor that are looked at."""

_WHOLE = ("int32", "int64")


def is_small(tensor: Any) -> bool:
    """Whether a tensor holds few whole numbers, of a type that shapes have."""
    count = tensor.shape.num_elements()
    return tensor.dtype.name in _WHOLE and count is not None and count <= LARGEST


def of_constant(values: np.ndarray[Any, Any]) -> Values:
    """The numbers of a constant."""
    return Values(values.shape, tuple(Size(int(item)) for item in values.ravel()))


def results(operation: Any, kinds: list[Kind]) -> list[Kind] | None:
    """The results of an operation on whole numbers, or on the shape of a tensor; None where it is no such operation.

    Raises Inseparable where the operation does not fit its arguments.
    """
    if any(tensor.dtype.name not in _WHOLE for tensor in operation.outputs):
        return None
    if operation.type in ("Shape", "Size"):
        kind = kinds[0]
        if not isinstance(kind, Rows | Free) or kind.dims is None:
            return None
        total = Values((), (sizes.product(kind.dims),))
        return [of_values(Values((len(kind.dims),), kind.dims) if operation.type == "Shape" else total)]
    rule = _RULES.get(operation.type)
    values = [values_of(kind) for kind in kinds]
    if rule is None or any(one is None for one in values):
        return None
    try:
        found = rule(operation, [one.array for one in values if one is not None])
    except (IndexError, ValueError, TypeError):
        return None
    arrays = found if isinstance(found, list) else [found]
    if any(array.size > LARGEST for array in arrays):
        return None
    return [of_values(Values.of(array)) for array in arrays]


def _array(items: Any, shape: Any) -> np.ndarray[Any, Any]:
    array = np.empty(math.prod(shape), object)
    array[:] = list(items)
    return array.reshape(shape)


def _constants(array: np.ndarray[Any, Any]) -> list[int]:
    found = Values.of(array).constants
    if found is None:
        raise ValueError("not constant")
    return found


def _constant(array: np.ndarray[Any, Any]) -> int:
    (value,) = _constants(array)
    return value


def _each(compute: Callable[..., Number]) -> Callable[..., Any]:
    def rule(operation: Any, arguments: list[Any]) -> Any:
        wide = np.broadcast_arrays(*arguments)
        return _array((compute(*items) for items in zip(*(one.ravel() for one in wide), strict=True)), wide[0].shape)

    return rule


def _same(operation: Any, arguments: list[Any]) -> Any:
    return arguments[0]


def _pack(operation: Any, arguments: list[Any]) -> Any:
    return np.stack(arguments, operation.get_attr("axis"))


def _concat(operation: Any, arguments: list[Any]) -> Any:
    return np.concatenate(arguments[:-1], _constant(arguments[-1]))


def _reshape(operation: Any, arguments: list[Any]) -> Any:
    return arguments[0].reshape(_constants(arguments[1]))


def _expand_dims(operation: Any, arguments: list[Any]) -> Any:
    return np.expand_dims(arguments[0], _constant(arguments[1]))


def _squeeze(operation: Any, arguments: list[Any]) -> Any:
    return np.squeeze(arguments[0], tuple(operation.get_attr("squeeze_dims")) or None)


def _gather(operation: Any, arguments: list[Any]) -> Any:
    if operation.get_attr("batch_dims"):
        raise ValueError("not looked into")
    parameters, indices, axis = arguments
    taken = np.asarray(_constants(indices), np.int64).reshape(indices.shape)
    if (taken < 0).any():
        raise ValueError("an index that TensorFlow refuses")
    return np.take(parameters, taken, _constant(axis))


def _strided_slice(operation: Any, arguments: list[Any]) -> Any:
    value, *bounds = arguments
    begin, end, stride = (_constants(one) for one in bounds)
    taken: list[Any] = []
    for part in slices.parts(value.ndim, len(begin), slices.Masks.of(operation)):
        if part.axis is None:
            taken.append(None)
        elif part.index is None:
            taken.append(slice(None))
        elif part.is_dropped:
            taken.append(begin[part.index])
        else:
            first = None if part.begins_free else begin[part.index]
            taken.append(slice(first, None if part.ends_free else end[part.index], stride[part.index]))
    found = value[tuple(taken)]
    return found if isinstance(found, np.ndarray) else _array([found], ())


def _slice(operation: Any, arguments: list[Any]) -> Any:
    value, begin, size = arguments[0], _constants(arguments[1]), _constants(arguments[2])
    bounds = zip(begin, size, strict=True)
    return value[tuple(slice(first, None if count == -1 else first + count) for first, count in bounds)]


def _split(operation: Any, arguments: list[Any]) -> Any:
    return np.split(arguments[1], operation.get_attr("num_split"), _constant(arguments[0]))


def _split_v(operation: Any, arguments: list[Any]) -> Any:
    value, counts, axis = arguments[0], _constants(arguments[1]), _constant(arguments[2])
    rest = value.shape[axis] - sum(count for count in counts if count != -1)
    counts = [rest if count == -1 else count for count in counts]
    if sum(counts) != value.shape[axis]:
        raise ValueError("sizes that TensorFlow refuses")
    return np.split(value, np.cumsum(counts)[:-1], axis)


def _unpack(operation: Any, arguments: list[Any]) -> Any:
    parts = np.moveaxis(arguments[0], operation.get_attr("axis"), 0)
    return [_array(part.ravel() if isinstance(part, np.ndarray) else [part], np.shape(part)) for part in parts]


def _folded(compute: Callable[[Number, Number], Number], first: Number = None) -> Callable[..., Any]:
    def rule(operation: Any, arguments: list[Any]) -> Any:
        value, axes = arguments[0], tuple(_constants(arguments[1]))
        if sorted(axis % value.ndim for axis in axes) != list(range(value.ndim)) or operation.get_attr("keep_dims"):
            raise ValueError("not looked into")
        items = value.ravel().tolist()
        if first is None and not items:
            raise ValueError("the largest of nothing")
        result = items[0] if first is None else first
        for item in items[1:] if first is None else items:
            result = compute(result, item)
        return _array([result], ())

    return rule


def _range(operation: Any, arguments: list[Any]) -> Any:
    start, limit, step = (_constant(one) for one in arguments)
    numbers = range(start, limit, step)
    if len(numbers) > LARGEST:
        raise ValueError("too many")
    return _array(map(Size, numbers), (len(numbers),))


def _fill(operation: Any, arguments: list[Any]) -> Any:
    shape = _constants(arguments[0])
    if math.prod(shape) > LARGEST:
        raise ValueError("too many")
    return _array([arguments[1].item()] * math.prod(shape), shape)


def _like(number: int) -> Callable[..., Any]:
    return lambda operation, arguments: _array([Size(number)] * arguments[0].size, arguments[0].shape)


def _transpose(operation: Any, arguments: list[Any]) -> Any:
    return np.transpose(arguments[0], _constants(arguments[1]))


def _reverse(operation: Any, arguments: list[Any]) -> Any:
    return np.flip(arguments[0], tuple(_constants(arguments[1])))


def _invert(operation: Any, arguments: list[Any]) -> Any:
    order = _constants(arguments[0])
    if sorted(order) != list(range(len(order))):
        raise ValueError("no permutation")
    return _array(map(Size, np.argsort(order).tolist()), (len(order),))


_RULES: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("Add", "AddV2"), _each(sizes.add)),
    "Cast": _same,
    "ConcatV2": _concat,
    "ExpandDims": _expand_dims,
    "Fill": _fill,
    "FloorDiv": _each(sizes.floor_divide),
    "FloorMod": _each(sizes.remainder),
    "GatherV2": _gather,
    "InvertPermutation": _invert,
    "Max": _folded(sizes.maximum),
    "Maximum": _each(sizes.maximum),
    "Min": _folded(sizes.minimum),
    "Minimum": _each(sizes.minimum),
    "Mul": _each(sizes.multiply),
    "Neg": _each(sizes.negate),
    "OnesLike": _like(1),
    "Pack": _pack,
    "Prod": _folded(sizes.multiply, ONE),
    "Range": _range,
    "Reshape": _reshape,
    "ReverseV2": _reverse,
    "Slice": _slice,
    "Split": _split,
    "SplitV": _split_v,
    "Squeeze": _squeeze,
    "StridedSlice": _strided_slice,
    "Sub": _each(sizes.subtract),
    "Sum": _folded(sizes.add, Size(0)),
    "Transpose": _transpose,
    "Unpack": _unpack,
    "ZerosLike": _like(0),
}
