"""How the operations of a graph treat the rows of a batch: a rule for each one that is known to keep rows apart."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf


class Inseparable(Exception):
    """An operation mixes rows, or may mix them. The message says why."""


class Kind(enum.Enum):
    """How a tensor depends on the batch."""

    FREE = "does not depend on it"
    ROWS = "its first dimension is the batch, each row made of that row alone"
    COUNT = "the number of rows, a scalar"
    SHAPE = "a vector that begins with the number of rows, and does not depend on it otherwise"
    OTHER = "depends on it in a way that no rule describes"


def results(operation: Any, kinds: Sequence[Kind]) -> list[Kind]:
    """How the results of an operation depend on the batch.

    kinds: of its inputs.
    Raises Inseparable.
    """
    if all(kind is Kind.FREE for kind in kinds):
        # A result that is not the same in each run would be shared by all callers of a batch.
        _require(not operation.op_def.is_stateful, "has an effect or a state")
        _require(
            all(attribute.type not in ("func", "list(func)") for attribute in operation.op_def.attr),
            "calls a function that is not inlined",
        )
        return [Kind.FREE] * len(operation.outputs)
    rule = RULES.get(operation.type)
    if rule is None:
        raise Inseparable("is not known to keep rows apart")
    kind = rule(operation, kinds)
    found = kind if isinstance(kind, list) else [kind] * len(operation.outputs)
    for tensor, one in zip(operation.outputs, found, strict=True):
        if one is Kind.ROWS:
            _require(bool(tensor.shape.rank), "has a result of unknown rank")
            _require(tensor.shape[0] is None, "fixes the number of rows")
    return found


Rule = Callable[[Any, Sequence[Kind]], Any]


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Inseparable(reason)


def _static(tensor: Any) -> Any:
    """The value of a tensor that the graph fixes."""
    value = tf.get_static_value(tensor)
    _require(value is not None, "takes its axes or shape from a computation")
    return value


def _rank(tensor: Any) -> int:
    _require(tensor.shape.rank is not None, "has an argument of unknown rank")
    return int(tensor.shape.rank)


def _axes(tensor: Any, rank: int) -> set[int]:
    return {int(axis) % rank for axis in np.ravel(_static(tensor))}


def _unary(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(kinds[0] is Kind.ROWS, "works on the number of rows")
    return Kind.ROWS


def _pass(operation: Any, kinds: Sequence[Kind]) -> list[Kind]:
    return list(kinds)


def _cast(operation: Any, kinds: Sequence[Kind]) -> Kind:
    if kinds[0] is not Kind.ROWS:
        _require(operation.get_attr("DstT") in (tf.int32, tf.int64), "works on the number of rows")
    return kinds[0]


def _elementwise(operation: Any, kinds: Sequence[Kind]) -> Kind:
    """Any number of arguments that broadcast."""
    ranks = [_rank(tensor) for tensor in operation.inputs]
    for kind, rank, tensor in zip(kinds, ranks, operation.inputs, strict=True):
        _require(kind in (Kind.ROWS, Kind.FREE), "works on the number of rows")
        if kind is Kind.ROWS:
            _require(rank == max(ranks), "broadcasts the batch along another dimension")
        else:
            _require(rank < max(ranks) or tensor.shape[0] == 1, "ties the number of rows to a constant")
    return Kind.ROWS


def _same_shape(operation: Any, kinds: Sequence[Kind]) -> Kind:
    """Any number of arguments of one shape: nothing broadcasts."""
    _require(all(kind is Kind.ROWS for kind in kinds), "ties the number of rows to a constant")
    return Kind.ROWS


def _clip(operation: Any, kinds: Sequence[Kind]) -> Kind:
    """ClipByValue: (value, minimum, maximum), of one shape or the last two scalars."""
    for kind, tensor in zip(kinds, operation.inputs, strict=True):
        _require(
            kind is Kind.ROWS or (kind is Kind.FREE and _rank(tensor) == 0), "ties the number of rows to a constant"
        )
    _require(kinds[0] is Kind.ROWS, "ties the number of rows to a constant")
    return Kind.ROWS


def _ensure_shape(operation: Any, kinds: Sequence[Kind]) -> Kind:
    shape = tf.TensorShape(operation.get_attr("shape"))
    _require(shape.rank is None or (shape.rank > 0 and shape[0] is None), "fixes the number of rows")
    return _unary(operation, kinds)


def _only_first(operation: Any, kinds: Sequence[Kind]) -> Kind:
    """A batch of data, and parameters that are the same for all of it."""
    _require(kinds[0] is Kind.ROWS, "works on the number of rows, or uses rows as parameters")
    _require(all(kind is Kind.FREE for kind in kinds[1:]), "uses rows as parameters")
    return Kind.ROWS


def _bias_add(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(_rank(operation.inputs[0]) >= 2, "adds along the batch")
    return _only_first(operation, kinds)


def _mat_mul(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(not operation.get_attr("transpose_a"), "sums over the batch")
    return _only_first(operation, kinds)


def _batch_mat_mul(operation: Any, kinds: Sequence[Kind]) -> Kind:
    ranks = [_rank(tensor) for tensor in operation.inputs]
    if kinds[0] is Kind.ROWS and ranks[0] == 2:
        _require(not operation.get_attr("adj_x") and ranks[1] == 2, "sums over the batch, or repeats it")
        return _only_first(operation, kinds)
    _require(max(ranks) >= 3, "multiplies along the batch")
    # The dimensions before the last two broadcast, but not in the first version of the operation.
    return (_same_shape if operation.type == "BatchMatMul" else _elementwise)(operation, kinds)


def _window(operation: Any, kinds: Sequence[Kind]) -> Kind:
    """A convolution or a pooling. Each data format begins with the batch."""
    for name in ("ksize", "strides", "dilations"):
        if _has_attribute(operation, name):
            _require(operation.get_attr(name)[0] == 1, "spans the batch")
    if _has_attribute(operation, "explicit_paddings"):
        _require(not any(operation.get_attr("explicit_paddings")[:2]), "adds rows")
    return _only_first(operation, kinds)


def _has_attribute(operation: Any, name: str) -> bool:
    return any(attribute.name == name for attribute in operation.op_def.attr)


def _batch_norm(operation: Any, kinds: Sequence[Kind]) -> list[Kind]:
    _require(not operation.get_attr("is_training"), "normalises by the statistics of the batch")
    # The statistics of no rows at all are NaN, and what is reserved for the gradient may be anything.
    return [_only_first(operation, kinds)] + [Kind.OTHER] * (len(operation.outputs) - 1)


def _along_last(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(_rank(operation.inputs[0]) >= 2, "works along the batch")
    return _only_first(operation, kinds)


def _along_axes(operation: Any, kinds: Sequence[Kind]) -> Kind:
    """The second argument names the axes."""
    _require(0 not in _axes(operation.inputs[1], _rank(operation.inputs[0])), "works along the batch")
    return _only_first(operation, kinds)


def _expand_dims(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(0 not in _axes(operation.inputs[1], _rank(operation.inputs[0]) + 1), "moves the batch")
    return _only_first(operation, kinds)


def _squeeze(operation: Any, kinds: Sequence[Kind]) -> Kind:
    rank = _rank(operation.inputs[0])
    axes = {axis % rank for axis in operation.get_attr("squeeze_dims")}
    _require(bool(axes) and 0 not in axes, "may drop the batch")
    return _only_first(operation, kinds)


def _reshape(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(kinds[0] is Kind.ROWS, "works on the number of rows")
    if kinds[1] is Kind.FREE:
        _require(np.ravel(_static(operation.inputs[1])).tolist()[:1] == [-1], "fixes the number of rows")
    else:
        _require(kinds[1] is Kind.SHAPE, "takes its shape from the batch")
    sizes = []
    for tensor in (operation.inputs[0], operation.outputs[0]):
        _require(_rank(tensor) >= 1 and None not in tensor.shape[1:].as_list(), "has rows of unknown size")
        sizes.append(math.prod(tensor.shape[1:].as_list()))
    _require(sizes[0] > 0, "has rows without numbers, whose number it cannot keep")
    _require(sizes[0] == sizes[1], "cuts rows in pieces, or joins them")
    return Kind.ROWS


def _transpose(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(int(_static(operation.inputs[1])[0]) == 0, "moves the batch")
    return _only_first(operation, kinds)


def _concat(operation: Any, kinds: Sequence[Kind]) -> Kind:
    *parts, axis = kinds
    if parts[0] is Kind.SHAPE:
        _require(all(kind is Kind.FREE for kind in (*parts[1:], axis)), "uses the number of rows twice")
        return Kind.SHAPE
    _require(axis is Kind.FREE and all(part is Kind.ROWS for part in parts), "joins rows with something else")
    _require(0 not in _axes(operation.inputs[-1], _rank(operation.inputs[0])), "joins along the batch")
    return Kind.ROWS


def _pack(operation: Any, kinds: Sequence[Kind]) -> Kind:
    if kinds[0] is Kind.COUNT:
        _require(all(kind is Kind.FREE for kind in kinds[1:]), "uses the number of rows twice")
        return Kind.SHAPE
    _require(all(kind is Kind.ROWS for kind in kinds), "joins rows with something else")
    _require(operation.get_attr("axis") % (_rank(operation.inputs[0]) + 1) != 0, "moves the batch")
    return Kind.ROWS


def _unpack(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(operation.get_attr("axis") % _rank(operation.inputs[0]) != 0, "takes the batch apart")
    return _only_first(operation, kinds)


def _split(operation: Any, kinds: Sequence[Kind]) -> Kind:
    """Split: (axis, value)."""
    _require(kinds[1] is Kind.ROWS, "works on the number of rows")
    _require(0 not in _axes(operation.inputs[0], _rank(operation.inputs[1])), "splits the batch")
    return Kind.ROWS


def _split_v(operation: Any, kinds: Sequence[Kind]) -> Kind:
    """SplitV: (value, sizes, axis)."""
    _require(0 not in _axes(operation.inputs[2], _rank(operation.inputs[0])), "splits the batch")
    return _only_first(operation, kinds)


def _shape(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(kinds[0] is Kind.ROWS, "works on the number of rows")
    return Kind.SHAPE


def _strided_slice(operation: Any, kinds: Sequence[Kind]) -> Kind:
    data = kinds[0]
    begin, end, strides = (np.ravel(_static(tensor)).tolist() for tensor in operation.inputs[1:])
    masks = {
        name: operation.get_attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    _require(bool(begin) and not masks["ellipsis"], "slices in a way that is not looked into")
    _require(not masks["new_axis"] & 1, "moves the batch")
    if data is Kind.SHAPE:
        _require(len(begin) == 1 and strides == [1], "uses the number of rows")
        return _slice_of_shape(operation.inputs[0], begin[0], end[0], masks)
    _require(data is Kind.ROWS, "works on the number of rows")
    whole = masks["begin"] & masks["end"] & 1 and strides[0] == 1 and not masks["shrink_axis"] & 1
    _require(bool(whole), "takes some rows and leaves others")
    return Kind.ROWS


def _slice_of_shape(shape: Any, begin: int, end: int, masks: Mapping[str, int]) -> Kind:
    """What a slice of a SHAPE is, by whether it holds the number of rows."""
    _require(shape.shape.rank == 1 and shape.shape[0] is not None, "takes a part of a shape of unknown rank")
    size = int(shape.shape[0])
    if masks["shrink_axis"] & 1:
        # For a dimension that is dropped TensorFlow ignores the masks of its begin and end.
        position = begin + size if begin < 0 else begin
        _require(0 <= position < size, "takes a dimension that is not there")
        return Kind.FREE if position else Kind.COUNT
    taken = range(size)[None if masks["begin"] & 1 else begin : None if masks["end"] & 1 else end]
    return Kind.SHAPE if 0 in taken else Kind.FREE


def _gather(operation: Any, kinds: Sequence[Kind]) -> Kind:
    """GatherV2: (parameters, indices, axis)."""
    _require(not operation.get_attr("batch_dims"), "gathers in a way that is not looked into")
    axes = _axes(operation.inputs[2], max(_rank(operation.inputs[0]), 1))
    if kinds[1] is Kind.ROWS:
        _require(kinds[0] is Kind.FREE, "uses rows as parameters")
        _require(axes == {0}, "moves the batch")
        return Kind.ROWS
    _require(0 not in axes, "takes rows by their number")
    return _only_first(operation, kinds)


def _one_hot(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(operation.get_attr("axis") != 0, "moves the batch")
    return _only_first(operation, kinds)


def _fill(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(kinds[0] is Kind.SHAPE and kinds[1] is Kind.FREE, "works on the number of rows")
    return Kind.ROWS


def _broadcast_to(operation: Any, kinds: Sequence[Kind]) -> Kind:
    tensor, rank = operation.inputs[0], _rank(operation.outputs[0])
    _require(kinds[1] is Kind.SHAPE, "fixes the number of rows")
    if kinds[0] is Kind.ROWS:
        _require(_rank(tensor) == rank, "moves the batch")
    else:
        _require(kinds[0] is Kind.FREE and (_rank(tensor) < rank or tensor.shape[0] == 1), "ties the number of rows")
    return Kind.ROWS


def _tile(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(int(_static(operation.inputs[1])[0]) == 1, "repeats the batch")
    return _only_first(operation, kinds)


def _pad(operation: Any, kinds: Sequence[Kind]) -> Kind:
    _require(not np.any(_static(operation.inputs[1])[0]), "adds rows")
    return _only_first(operation, kinds)


def _einsum(operation: Any, kinds: Sequence[Kind]) -> Kind:
    arguments, _, result = operation.get_attr("equation").decode().replace(" ", "").partition("->")
    labels = arguments.split(",")
    _require("." not in arguments + result and bool(result), "has an equation that is not looked into")
    batch = {label[0] for label, kind in zip(labels, kinds, strict=True) if kind is Kind.ROWS}
    _require(batch == {result[0]}, "sums over the batch, or moves it")
    for label, kind in zip(labels, kinds, strict=True):
        _require(kind in (Kind.ROWS, Kind.FREE), "works on the number of rows")
        count = label.count(result[0])
        _require(count == (1 if kind is Kind.ROWS else 0), "ties the number of rows to something else")
    _require(result.count(result[0]) == 1, "spreads the batch over a diagonal")
    return Kind.ROWS


_ELEMENTWISE_OF_ONE = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Ceil CheckNumerics Conj Cos Cosh Digamma Elu Erf Erfc Exp Expm1 "
    "Floor Imag Inv IsFinite IsInf IsNan LeakyRelu Lgamma Log Log1p LogicalNot Neg OnesLike PreventGradient "
    "Real Reciprocal Relu Relu6 Rint Round Rsqrt Selu Sigmoid Sign Sin Sinh Snapshot Softplus Softsign Sqrt Square "
    "StopGradient Tan Tanh ZerosLike AsString StringLower StringUpper StringToNumber StringToHashBucketFast "
    "StringToHashBucketStrong StringLength"
)
_ELEMENTWISE_OF_MANY = (
    "Add AddV2 Atan2 BitwiseAnd BitwiseOr BitwiseXor Complex Div DivNoNan Equal "
    "FloorDiv FloorMod Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr Maximum Minimum Mod Mul MulNoNan "
    "NotEqual Pow RealDiv SelectV2 SquaredDifference Sub TruncateDiv TruncateMod Xdivy Xlog1py Xlogy"
)
_REDUCTIONS = "All Any ArgMax ArgMin Cumprod Cumsum Max Mean Min Prod ReverseV2 Sum"

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE_OF_ONE.split(), _unary),
    **dict.fromkeys(_ELEMENTWISE_OF_MANY.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _along_axes),
    **dict.fromkeys(("AddN", "ApproximateEqual"), _same_shape),
    **dict.fromkeys(("Conv2D", "Conv3D", "DepthwiseConv2dNative"), _window),
    **dict.fromkeys(("MaxPool", "AvgPool", "MaxPool3D", "AvgPool3D"), _window),
    **dict.fromkeys(("ResizeBilinear", "ResizeNearestNeighbor"), _only_first),
    **dict.fromkeys(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"), _batch_norm),
    **dict.fromkeys(("Softmax", "LogSoftmax", "TopKV2"), _along_last),
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _batch_mat_mul),
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _pad),
    **dict.fromkeys(("Identity", "IdentityN"), _pass),
    "BiasAdd": _bias_add,
    "BroadcastTo": _broadcast_to,
    "Cast": _cast,
    "ClipByValue": _clip,
    "ConcatV2": _concat,
    "Einsum": _einsum,
    "EnsureShape": _ensure_shape,
    "ExpandDims": _expand_dims,
    "Fill": _fill,
    "GatherV2": _gather,
    "MatMul": _mat_mul,
    "OneHot": _one_hot,
    "Pack": _pack,
    "Reshape": _reshape,
    "Shape": _shape,
    "Split": _split,
    "SplitV": _split_v,
    "Squeeze": _squeeze,
    "StridedSlice": _strided_slice,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unpack": _unpack,
}
