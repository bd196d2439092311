"""Whether a model treats each row of a batch for itself, so that calls may share one.

Two things must say so. The graph: each of its operations is known to keep rows apart, for whatever inputs. And a probe:
rows of random numbers have the same predictions alone, together, and in another order. The probe alone would prove
nothing; it guards against an error in the rules.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import convert_to_constants

from forwardpass.wire.description import Function, ModelSpec
from forwardpass.wire.dtypes import Array
from forwardpass_server.models import examples, probing
from forwardpass_server.models.examples import Examples, Runs, Shape


class _Inseparable(Exception):
    """An operation that mixes rows, or may: the message says which and why."""


class _Kind(enum.Enum):
    """How a tensor depends on the batch."""

    FREE = "does not depend on it"
    ROWS = "its first dimension is the batch, each row made of that row alone"
    COUNT = "the number of rows, a scalar"
    SHAPE = "a vector, the number of rows first and nothing of it behind"


def reason_against(
    execution: Runs, concrete: Any, spec: ModelSpec, weights: Sequence[Array], found: Examples | None = None
) -> str:
    """Why concurrent calls of predict_on_batch cannot share a batch; "" where they can.

    concrete: predict_on_batch for inference. weights: of which the probe may make use.
    found: examples for the probe; None for those that `examples.find` finds.
    """
    for leaf, path in zip(spec.x.leaves, spec.x.tree.paths("x"), strict=True):
        if not leaf.shape or leaf.shape[0] is not None:
            return f"{path} has no batch dimension of free size: {leaf}"
    for leaf, path in zip(spec.predictions.leaves, spec.predictions.tree.paths("predictions"), strict=True):
        if not leaf.shape or leaf.shape[0] is not None:
            return f"{path} has no batch dimension of free size: {leaf}"
    if not spec.x.leaves or not spec.predictions.leaves:
        return "x or the predictions hold no array"
    try:
        _check_graph(concrete, len(weights), len(spec.x.leaves))
    except _Inseparable as error:
        return str(error)
    except Exception as error:  # TensorFlow's own machinery: a graph that it cannot take apart cannot be judged.
        return f"the graph cannot be judged: {type(error).__name__}"
    return _probe(execution, found or examples.find(execution, spec, weights), weights)


def _check_graph(concrete: Any, weights: int, inputs: int) -> None:
    # Functions that the graph calls stand in their callers' place afterwards.
    definition = convert_to_constants._run_inline_graph_optimization(concrete, False, aggressive_inlining=True)
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(definition, name="")
    kinds: dict[str, _Kind] = {}
    rows = {tensor.name for tensor in concrete.inputs[weights : weights + inputs]}
    for operation in graph.get_operations():
        if operation.type == "Placeholder":
            name = operation.outputs[0].name
            kinds[name] = _Kind.ROWS if name in rows else _Kind.FREE
            continue
        found = [kinds[tensor.name] for tensor in operation.inputs]
        try:
            results = _results(operation, found)
        except _Inseparable as error:
            raise _Inseparable(f"{operation.type} ({operation.name}) {error}") from None
        for tensor, kind in zip(operation.outputs, results, strict=True):
            if kind is _Kind.ROWS and (tensor.shape.rank is None or not tensor.shape.rank):
                raise _Inseparable(f"{operation.type} ({operation.name}) has a result of unknown rank")
            kinds[tensor.name] = kind
    for tensor in concrete.outputs:
        if kinds[tensor.name] is not _Kind.ROWS:
            raise _Inseparable(f"a prediction {kinds[tensor.name].value}")


def _results(operation: Any, kinds: Sequence[_Kind]) -> list[_Kind]:
    """How the results of an operation depend on the batch."""
    if all(kind is _Kind.FREE for kind in kinds):
        if operation.op_def.is_stateful:
            raise _Inseparable("has an effect or a state")
        return [_Kind.FREE] * len(operation.outputs)
    rule = _RULES.get(operation.type)
    if rule is None:
        raise _Inseparable("is not known to keep rows apart")
    kind = rule(operation, kinds)
    if isinstance(kind, list):
        return kind
    return [kind] * len(operation.outputs)


Rule = Callable[[Any, Sequence[_Kind]], Any]


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _Inseparable(reason)


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


def _unary(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(kinds[0] is _Kind.ROWS, "works on the number of rows")
    return _Kind.ROWS


def _pass(operation: Any, kinds: Sequence[_Kind]) -> list[_Kind]:
    return list(kinds)


def _cast(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    if kinds[0] is not _Kind.ROWS:
        _require(operation.get_attr("DstT") in (tf.int32, tf.int64), "works on the number of rows")
    return kinds[0]


def _elementwise(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    """Any number of arguments that broadcast."""
    ranks = [_rank(tensor) for tensor in operation.inputs]
    for kind, rank, tensor in zip(kinds, ranks, operation.inputs, strict=True):
        _require(kind in (_Kind.ROWS, _Kind.FREE), "works on the number of rows")
        if kind is _Kind.ROWS:
            _require(rank == max(ranks), "broadcasts the batch along another dimension")
        else:
            _require(rank < max(ranks) or tensor.shape[0] == 1, "ties the number of rows to a constant")
    return _Kind.ROWS


def _only_first(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    """A batch of data, and parameters that are the same for all of it."""
    _require(kinds[0] is _Kind.ROWS, "works on the number of rows, or uses rows as parameters")
    _require(all(kind is _Kind.FREE for kind in kinds[1:]), "uses rows as parameters")
    return _Kind.ROWS


def _bias_add(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(_rank(operation.inputs[0]) >= 2, "adds along the batch")
    return _only_first(operation, kinds)


def _mat_mul(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(not operation.get_attr("transpose_a"), "sums over the batch")
    return _only_first(operation, kinds)


def _batch_mat_mul(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    ranks = [_rank(tensor) for tensor in operation.inputs]
    if kinds[0] is _Kind.ROWS and ranks[0] == 2:
        _require(not operation.get_attr("adj_x") and ranks[1] == 2, "sums over the batch, or repeats it")
        return _only_first(operation, kinds)
    _require(max(ranks) >= 3, "multiplies along the batch")
    # The dimensions before the last two broadcast.
    return _elementwise(operation, kinds)


def _pool(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(operation.get_attr("ksize")[0] == 1 and operation.get_attr("strides")[0] == 1, "pools over the batch")
    return _only_first(operation, kinds)


def _batch_norm(operation: Any, kinds: Sequence[_Kind]) -> list[_Kind]:
    _require(not operation.get_attr("is_training"), "normalises by the statistics of the batch")
    return [_only_first(operation, kinds)] + [_Kind.FREE] * (len(operation.outputs) - 1)


def _softmax(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(_rank(operation.inputs[0]) >= 2, "works along the batch")
    return _only_first(operation, kinds)


def _along_axes(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    """The second argument names the axes."""
    _require(0 not in _axes(operation.inputs[1], _rank(operation.inputs[0])), "works along the batch")
    return _only_first(operation, kinds)


def _expand_dims(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(0 not in _axes(operation.inputs[1], _rank(operation.inputs[0]) + 1), "moves the batch")
    return _only_first(operation, kinds)


def _squeeze(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    rank = _rank(operation.inputs[0])
    axes = {axis % rank for axis in operation.get_attr("squeeze_dims")}
    _require(bool(axes) and 0 not in axes, "may drop the batch")
    return _only_first(operation, kinds)


def _reshape(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(kinds[0] is _Kind.ROWS, "works on the number of rows")
    if kinds[1] is _Kind.FREE:
        _require(int(np.ravel(_static(operation.inputs[1]))[0]) == -1, "fixes the number of rows")
    else:
        _require(kinds[1] is _Kind.SHAPE, "takes its shape from the batch")
    sizes = []
    for tensor in (operation.inputs[0], operation.outputs[0]):
        _require(_rank(tensor) >= 1 and None not in tensor.shape[1:].as_list(), "has rows of unknown size")
        sizes.append(math.prod(tensor.shape[1:].as_list()))
    _require(sizes[0] == sizes[1], "cuts rows in pieces, or joins them")
    return _Kind.ROWS


def _transpose(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(int(_static(operation.inputs[1])[0]) == 0, "moves the batch")
    return _only_first(operation, kinds)


def _concat(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    *parts, axis = kinds
    if parts[0] is _Kind.SHAPE:
        _require(all(part is _Kind.FREE for part in parts[1:]), "uses the number of rows twice")
        return _Kind.SHAPE
    _require(axis is _Kind.FREE and all(part is _Kind.ROWS for part in parts), "joins rows with something else")
    _require(0 not in _axes(operation.inputs[-1], _rank(operation.inputs[0])), "joins along the batch")
    return _Kind.ROWS


def _pack(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    if kinds[0] is _Kind.COUNT:
        _require(all(kind is _Kind.FREE for kind in kinds[1:]), "uses the number of rows twice")
        return _Kind.SHAPE
    _require(all(kind is _Kind.ROWS for kind in kinds), "joins rows with something else")
    _require(operation.get_attr("axis") % (_rank(operation.inputs[0]) + 1) != 0, "moves the batch")
    return _Kind.ROWS


def _unpack(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(operation.get_attr("axis") % _rank(operation.inputs[0]) != 0, "takes the batch apart")
    return _only_first(operation, kinds)


def _split(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    """Split: (axis, value)."""
    _require(kinds[1] is _Kind.ROWS, "works on the number of rows")
    _require(0 not in _axes(operation.inputs[0], _rank(operation.inputs[1])), "splits the batch")
    return _Kind.ROWS


def _split_v(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    """SplitV: (value, sizes, axis)."""
    _require(0 not in _axes(operation.inputs[2], _rank(operation.inputs[0])), "splits the batch")
    return _only_first(operation, kinds)


def _shape(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(kinds[0] is _Kind.ROWS, "works on the number of rows")
    return _Kind.SHAPE


def _strided_slice(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    data = kinds[0]
    begin, _, strides = (np.ravel(_static(tensor)).tolist() for tensor in operation.inputs[1:])
    masks = {
        name: operation.get_attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    _require(not masks["ellipsis"] and not masks["new_axis"] & 1, "slices in a way that is not looked into")
    if data is _Kind.SHAPE:
        _require(strides == [1] and not masks["new_axis"], "uses the number of rows")
        first = 0 if masks["begin"] & 1 else begin[0]
        if first > 0:
            return _Kind.FREE
        _require(first == 0, "uses the number of rows")
        return _Kind.COUNT if masks["shrink_axis"] & 1 else _Kind.SHAPE
    _require(data is _Kind.ROWS, "works on the number of rows")
    whole = masks["begin"] & masks["end"] & 1 and strides[0] == 1 and not masks["shrink_axis"] & 1
    _require(bool(whole), "takes some rows and leaves others")
    return _Kind.ROWS


def _gather(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    """GatherV2: (parameters, indices, axis)."""
    _require(not operation.get_attr("batch_dims"), "gathers in a way that is not looked into")
    axes = _axes(operation.inputs[2], max(_rank(operation.inputs[0]), 1))
    if kinds[1] is _Kind.ROWS:
        _require(kinds[0] is _Kind.FREE, "uses rows as parameters")
        _require(axes == {0}, "moves the batch")
        return _Kind.ROWS
    _require(0 not in axes, "takes rows by their number")
    return _only_first(operation, kinds)


def _one_hot(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(operation.get_attr("axis") != 0, "moves the batch")
    return _only_first(operation, kinds)


def _fill(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(kinds[0] is _Kind.SHAPE and kinds[1] is _Kind.FREE, "works on the number of rows")
    return _Kind.ROWS


def _broadcast_to(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    tensor, rank = operation.inputs[0], _rank(operation.outputs[0])
    _require(kinds[1] is _Kind.SHAPE, "fixes the number of rows")
    if kinds[0] is _Kind.ROWS:
        _require(_rank(tensor) == rank, "moves the batch")
    else:
        _require(kinds[0] is _Kind.FREE and (_rank(tensor) < rank or tensor.shape[0] == 1), "ties the number of rows")
    return _Kind.ROWS


def _tile(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(int(_static(operation.inputs[1])[0]) == 1, "repeats the batch")
    return _only_first(operation, kinds)


def _pad(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    _require(not np.any(_static(operation.inputs[1])[0]), "adds rows")
    return _only_first(operation, kinds)


def _top_k(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    return _softmax(operation, kinds)


def _einsum(operation: Any, kinds: Sequence[_Kind]) -> _Kind:
    arguments, _, result = operation.get_attr("equation").decode().replace(" ", "").partition("->")
    labels = arguments.split(",")
    _require("." not in arguments + result and bool(result), "has an equation that is not looked into")
    batch = {label[0] for label, kind in zip(labels, kinds, strict=True) if kind is _Kind.ROWS}
    _require(batch == {result[0]}, "sums over the batch, or moves it")
    for label, kind in zip(labels, kinds, strict=True):
        _require(kind in (_Kind.ROWS, _Kind.FREE), "works on the number of rows")
        count = label.count(result[0])
        _require(count == (1 if kind is _Kind.ROWS else 0), "ties the number of rows to something else")
    return _Kind.ROWS


_ELEMENTWISE_OF_ONE = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Ceil CheckNumerics Conj Cos Cosh Digamma Elu EnsureShape Erf Erfc Exp Expm1 "
    "Floor Imag Inv IsFinite IsInf IsNan LeakyRelu Lgamma Log Log1p LogicalNot Neg OnesLike PreventGradient "
    "Real Reciprocal Relu Relu6 Rint Round Rsqrt Selu Sigmoid Sign Sin Sinh Snapshot Softplus Softsign Sqrt Square "
    "StopGradient Tan Tanh ZerosLike AsString StringLower StringUpper StringToNumber StringToHashBucketFast "
    "StringToHashBucketStrong StringLength"
)
_ELEMENTWISE_OF_MANY = (
    "Add AddN AddV2 ApproximateEqual Atan2 BitwiseAnd BitwiseOr BitwiseXor ClipByValue Complex Div DivNoNan Equal "
    "FloorDiv FloorMod Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr Maximum Minimum Mod Mul MulNoNan "
    "NotEqual Pow RealDiv SelectV2 SquaredDifference Sub TruncateDiv TruncateMod Xdivy Xlog1py Xlogy"
)
_REDUCTIONS = "All Any ArgMax ArgMin Cumprod Cumsum Max Mean Min Prod ReverseV2 Sum"

_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE_OF_ONE.split(), _unary),
    **dict.fromkeys(_ELEMENTWISE_OF_MANY.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _along_axes),
    **dict.fromkeys(
        ("Conv2D", "Conv3D", "DepthwiseConv2dNative", "ResizeBilinear", "ResizeNearestNeighbor"), _only_first
    ),
    **dict.fromkeys(("MaxPool", "AvgPool", "MaxPool3D", "AvgPool3D"), _pool),
    **dict.fromkeys(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"), _batch_norm),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _batch_mat_mul),
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _pad),
    **dict.fromkeys(("Identity", "IdentityN"), _pass),
    "BiasAdd": _bias_add,
    "BroadcastTo": _broadcast_to,
    "Cast": _cast,
    "ConcatV2": _concat,
    "Einsum": _einsum,
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
    "TopKV2": _top_k,
    "Transpose": _transpose,
    "Unpack": _unpack,
}

# Rows of the two batches that the probe joins.
_PROBE_ROWS = (3, 2)


def _probe(execution: Runs, found: Examples, weights: Sequence[Array]) -> str:
    """Runs rows alone, together, and in another order, with each size of the other free dimensions in turn."""
    for shape in found.shapes:
        try:
            reason = _difference(execution, found, shape, weights)
        except Exception as error:  # The model may want other inputs than random ones.
            return f"the model refused the inputs of the probe: {type(error).__name__}"
        if reason:
            return reason
    return ""


def _difference(execution: Runs, found: Examples, shape: Shape, weights: Sequence[Array]) -> str:
    rng = np.random.default_rng(0)
    first, second = (found.x(rng, dataclasses.replace(shape, rows=rows)) for rows in _PROBE_ROWS)
    joined = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    order = rng.permutation(sum(_PROBE_ROWS))

    def predict(x: Sequence[Array]) -> list[Array]:
        return execution.run(Function.PREDICT_ON_BATCH, False, [*weights, *x])

    alone = [np.concatenate(pair) for pair in zip(predict(first), predict(second), strict=True)]
    together = predict(joined)
    shuffled = predict([leaf[order] for leaf in joined])
    for leaf, one, two, three in zip(found.spec.predictions.leaves, alone, together, shuffled, strict=True):
        if not (probing.agree(one, two, leaf) and probing.agree(one[order], three, leaf)):
            return "rows had other predictions together than alone"
    return ""
