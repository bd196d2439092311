"""How the operations of a graph treat the rows of a batch: a rule for each one that is known to keep rows apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from forwardpass_server.models import sizes
from forwardpass_server.models.row_kinds import (
    Counts,
    Dims,
    Free,
    Inseparable,
    Kind,
    Rows,
    Values,
    values_of,
)
from forwardpass_server.models.sizes import ONE, Size

ALONG = "works along the batch"
COUNT = "works on the number of rows"
PARAMETERS = "uses rows as parameters"
TIES = "ties the number of rows to a constant"
UNKNOWN_RANK = "has an argument of unknown rank"


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One operation, and the kinds of its arguments. name: tells it from all others, also from those of functions."""

    operation: Any
    kinds: Sequence[Kind]
    name: str

    @property
    def type(self) -> str:
        """The type of the operation."""
        return str(self.operation.type)

    def has(self, name: str) -> bool:
        """Whether the operation has an attribute."""
        return any(attribute.name == name for attribute in self.operation.op_def.attr)

    def attribute(self, name: str) -> Any:
        """The value of an attribute."""
        return self.operation.get_attr(name)

    def rows(self, index: int = 0) -> Rows:
        """An argument that must hold rows. Raises Inseparable."""
        kind = self.kinds[index]
        if isinstance(kind, Rows):
            return kind
        raise Inseparable(TIES if isinstance(kind, Free) else COUNT)

    def free(self, *indices: int) -> None:
        """Refuses arguments that depend on the batch."""
        for index in indices:
            require(isinstance(self.kinds[index], Free), PARAMETERS)

    def dims(self, index: int) -> Dims:
        """The sizes of an argument. Raises Inseparable for an unknown rank."""
        kind = self.kinds[index]
        dims = kind.dims if isinstance(kind, Rows | Free) else None
        if dims is None:
            raise Inseparable(UNKNOWN_RANK)
        return dims

    def values(self, index: int) -> Values:
        """The whole numbers of an argument. Raises Inseparable where they are unknown."""
        found = values_of(self.kinds[index])
        if found is None:
            raise Inseparable("takes its axes or shape from a computation")
        return found

    def numbers(self, index: int) -> list[int]:
        """The whole numbers of an argument, all of them known. Raises Inseparable."""
        found = self.values(index).constants
        if found is None:
            raise Inseparable("takes its axes or shape from a computation")
        return found

    def axes(self, index: int, rank: int) -> list[int]:
        """Axes that an argument names, counted from the front. Raises Inseparable."""
        return [axis_of(axis, rank) for axis in self.numbers(index)]

    def axis(self, index: int, rank: int) -> int:
        """One axis that an argument names. Raises Inseparable."""
        axes = self.axes(index, rank)
        require(len(axes) == 1, "names several axes where one is expected")
        return axes[0]

    def unknown(self, place: object) -> Size:
        """A size that this operation computes."""
        return sizes.unknown(f"{self.name}[{place}]")


Rule = Callable[[Step], Kind | Sequence[Kind]]


def require(condition: object, reason: str) -> None:
    """Raises Inseparable for this reason unless the condition holds."""
    if not condition:
        raise Inseparable(reason)


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    require(-rank <= axis < rank, "names an axis that is not there")
    return axis % rank


def replaced(rows: Rows, axis: int, size: Size) -> Rows:
    """The same tensor with another size of one dimension that is not the batch."""
    return dataclasses.replace(rows, dims=(*rows.dims[:axis], size, *rows.dims[axis + 1 :]))


def without(rows: Rows, axes: Sequence[int]) -> Rows:
    """The same tensor without some dimensions, the batch not among them."""
    require(rows.axis not in axes, ALONG)
    dims = tuple(size for axis, size in enumerate(rows.dims) if axis not in axes)
    return dataclasses.replace(rows, axis=rows.axis - sum(axis < rows.axis for axis in set(axes)), dims=dims)


def inserted(rows: Rows, axis: int, size: Size) -> Rows:
    """The same tensor with one more dimension in front of this one."""
    dims = (*rows.dims[:axis], size, *rows.dims[axis:])
    return dataclasses.replace(rows, axis=rows.axis + (axis <= rows.axis), dims=dims)


def known(size: Size | None) -> Size | None:
    """A size that may stand in the shape of a tensor beside its batch; None where it is unknown or depends on B."""
    return None if size is None or size.has_rows or size.factor < 0 else size


def broadcast(step: Step, dims: Sequence[Dims], rows: Sequence[Rows]) -> Rows:
    """The result of arguments of these sizes that broadcast, among them some that hold rows, all in one place."""
    rank = max(map(len, dims))
    place, layout = rows[0].place, rows[0].layout
    for one in rows:
        require(one.place == place, "broadcasts the batch along another dimension")
        require(one.layout == layout, "joins rows with parts of rows")
    found = []
    for axis in range(-rank, 0):
        present = [one[axis] for one in dims if len(one) >= -axis]
        if axis == place:
            holds = rows[0].dims[place]
            require(all(size in (holds, ONE) for size in present), TIES)
            require(sum(size == holds for size in present) == len(rows), TIES)
            found.append(holds)
        else:
            found.append(_broadcast_size(step, axis, [size for size in present if size != ONE]))
    return Rows(rank + place, tuple(found), *layout)


def _broadcast_size(step: Step, axis: int, present: Sequence[Size]) -> Size:
    constant = next((size for size in present if size.constant is not None), None)
    if constant is not None or not present:
        return constant or ONE
    return present[0] if all(size == present[0] for size in present) else step.unknown(axis)


def _unary(step: Step) -> Kind:
    return step.rows()


def _elementwise(step: Step) -> Kind:
    """Any number of arguments that broadcast."""
    require(not any(isinstance(kind, Counts) for kind in step.kinds), COUNT)
    dims = [step.dims(index) for index in range(len(step.kinds))]
    return broadcast(step, dims, [kind for kind in step.kinds if isinstance(kind, Rows)])


def _same_shape(step: Step) -> Kind:
    """Any number of arguments of one shape: nothing broadcasts."""
    parts = [step.rows(index) for index in range(len(step.kinds))]
    return _alike(parts)


def _same_or_scalars(step: Step) -> Kind:
    """Any number of arguments of one shape, or scalars."""
    parts = []
    for index, kind in enumerate(step.kinds):
        if not isinstance(kind, Free) or step.dims(index):
            parts.append(step.rows(index))
    require(parts, TIES)
    return _alike(parts)


def _alike(parts: Sequence[Rows]) -> Rows:
    first = parts[0]
    for part in parts:
        is_alike = (part.axis, part.layout, part.rank) == (first.axis, first.layout, first.rank)
        require(is_alike, "joins rows with something else")
    return first


def _clip(step: Step) -> Kind:
    """ClipByValue: (value, minimum, maximum), of one shape or the last two scalars."""
    step.rows(0)
    return _same_or_scalars(step)


def _only_first(step: Step) -> Kind:
    """A batch of data, and parameters that are the same for all of it."""
    rows = step.rows(0)
    step.free(*range(1, len(step.kinds)))
    return rows


def _bias_add(step: Step) -> Kind:
    rows = _only_first(step)
    assert isinstance(rows, Rows)
    channels = 1 if step.attribute("data_format") == b"NCHW" else rows.rank - 1
    require(rows.axis != channels, "adds along the batch")
    return rows


def _along_last(step: Step) -> Kind:
    return _along_last_of(step, 1)


def _along_last_of(step: Step, count: int) -> Rows:
    """Works on the last dimensions. Rows stand in another one."""
    rows = step.rows(0)
    require(rows.place < -count, ALONG)
    step.free(*range(1, len(step.kinds)))
    return rows


def _fourier(step: Step) -> Kind:
    count = 3 if "3D" in step.type else 2 if "2D" in step.type else 1
    rows = _along_last_of(step, count)
    if "RFFT" not in step.type:
        return rows
    for axis in range(rows.rank - count, rows.rank):
        rows = replaced(rows, axis, step.unknown(axis))
    return rows


def _top(step: Step) -> Kind:
    """TopKV2: (input, k)."""
    rows = _along_last_of(step, 1)
    values = values_of(step.kinds[1])
    size = known(values.items[0]) if values and values.items else None
    return replaced(rows, rows.rank - 1, size or step.unknown(0))


def _matrices(step: Step) -> Kind:
    return _along_last_of(step, 2)


def _reduction(step: Step) -> Kind:
    """Reductions: (input, axes)."""
    rows = step.rows(0)
    axes = step.axes(1, rows.rank)
    require(rows.axis not in axes, ALONG)
    if step.attribute("keep_dims"):
        return dataclasses.replace(
            rows, dims=tuple(ONE if axis in axes else size for axis, size in enumerate(rows.dims))
        )
    return without(rows, axes)


def _best(step: Step) -> Kind:
    """ArgMax, ArgMin: (input, axis)."""
    rows = step.rows(0)
    return without(rows, step.axes(1, rows.rank))


def _scan(step: Step) -> Kind:
    """Cumsum and the like, ReverseV2: (input, axes)."""
    rows = step.rows(0)
    require(rows.axis not in step.axes(1, rows.rank), ALONG)
    return rows


def _roll(step: Step) -> Kind:
    """Roll: (input, shift, axes)."""
    rows = step.rows(0)
    step.free(1)
    require(rows.axis not in step.axes(2, rows.rank), ALONG)
    return rows


def _reverse_sequence(step: Step) -> Kind:
    """ReverseSequence: (input, lengths), one length for each entry of one dimension."""
    rows, lengths = step.rows(0), step.rows(1)
    require(rows.axis == axis_of(step.attribute("batch_dim"), rows.rank), ALONG)
    require(rows.axis != axis_of(step.attribute("seq_dim"), rows.rank), ALONG)
    require(lengths.rank == 1 and lengths.layout == rows.layout, TIES)
    return rows


def _one_hot(step: Step) -> Kind:
    """OneHot: (indices, depth, on, off)."""
    rows = step.rows(0)
    step.free(1, 2, 3)
    axis = step.attribute("axis")
    values = values_of(step.kinds[1])
    size = known(values.items[0]) if values and values.items else None
    return inserted(rows, rows.rank if axis == -1 else axis_of(axis, rows.rank + 1), size or step.unknown(0))


def _find(step: Step) -> Kind:
    """LookupTableFindV2: (table, keys, default). A graph that changes a table is refused."""
    rows = step.rows(1)
    step.free(0, 2)
    return rows


def _count_classes(step: Step) -> Kind:
    """DenseBincount: (classes, number of classes, weights)."""
    rows = step.rows(0)
    require(rows.rank == 2 and rows.axis == 0, ALONG)
    step.free(2)
    require(step.dims(2) == (Size(0),), "weighs rows by a constant")
    size = known(_number_of_classes(step))
    require(size, "makes a result whose size depends on rows")
    assert size is not None
    return replaced(rows, 1, size)


def _number_of_classes(step: Step) -> Size | None:
    """The second argument; also where it is the smaller of n and the larger of n and something else: n."""
    values = values_of(step.kinds[1])
    if values is not None:
        return values.items[0]
    if isinstance(step.kinds[1], Free):
        return step.unknown(1)
    least = _bounds(step.operation.inputs[1], "Minimum")
    for number, other in least:
        if any(number <= bound for bound, _ in _bounds(other, "Maximum")):
            return Size(number)
    return None


def _bounds(tensor: Any, bound: str) -> list[tuple[int, Any]]:
    """The constants among the two arguments of a Minimum or Maximum, each with the other argument."""
    if tensor.op.type != bound:
        return []
    pairs = [tuple(tensor.op.inputs), tuple(tensor.op.inputs)[::-1]]
    found = [(tf.get_static_value(one), other) for one, other in pairs if one.op.type == "Const"]
    return [(int(value), other) for value, other in found if value is not None and value.ndim == 0]


_ELEMENTWISE_OF_ONE = (
    "Abs Acos Acosh Angle Asin Asinh AsString Atan Atanh BesselI0 BesselI0e BesselI1 BesselI1e Bucketize Ceil "
    "CheckNumerics ComplexAbs Conj Cos Cosh Digamma Elu Erf Erfc Erfinv Exp Expm1 Floor Imag Inv Invert IsFinite "
    "IsInf IsNan LeakyRelu Lgamma Log Log1p LogicalNot Ndtri Neg OnesLike Real Reciprocal Relu Relu6 Rint Round "
    "Rsqrt Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Square StaticRegexFullMatch StaticRegexReplace "
    "StringLength StringLower StringStrip StringToHashBucket StringToHashBucketFast StringToHashBucketStrong "
    "StringToNumber StringUpper Tan Tanh ZerosLike"
)
_ELEMENTWISE_OF_MANY = (
    "Add AddV2 Atan2 BitwiseAnd BitwiseOr BitwiseXor Complex Div DivNoNan Equal "
    "FloorDiv FloorMod Greater GreaterEqual LeftShift Less LessEqual LogicalAnd LogicalOr Maximum Minimum Mod Mul "
    "MulNoNan NextAfter NotEqual Pow RealDiv RightShift SelectV2 SquaredDifference Sub TruncateDiv TruncateMod Xdivy "
    "Xlog1py Xlogy"
)
_REDUCTIONS = "All Any Max Mean Min Prod Sum EuclideanNorm"
_SCANS = "Cumprod Cumsum CumulativeLogsumexp ReverseV2"
_FOURIER = "FFT FFT2D FFT3D IFFT IFFT2D IFFT3D RFFT RFFT2D RFFT3D IRFFT IRFFT2D IRFFT3D"

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE_OF_ONE.split(), _unary),
    **dict.fromkeys(_ELEMENTWISE_OF_MANY.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(_SCANS.split(), _scan),
    **dict.fromkeys(_FOURIER.split(), _fourier),
    **dict.fromkeys(("AddN", "ApproximateEqual"), _same_shape),
    **dict.fromkeys(("ArgMax", "ArgMin"), _best),
    **dict.fromkeys(("LogSoftmax", "Softmax", "RGBToHSV", "HSVToRGB"), _along_last),
    **dict.fromkeys(("FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVars", "RegexReplace"), _only_first),
    "BiasAdd": _bias_add,
    "Cast": _unary,
    "ClipByValue": _clip,
    "DenseBincount": _count_classes,
    "EnsureShape": _unary,
    "LookupTableFindV2": _find,
    "MatrixBandPart": _matrices,
    "OneHot": _one_hot,
    "ReverseSequence": _reverse_sequence,
    "Roll": _roll,
    "StringJoin": _same_or_scalars,
    "TopKV2": _top,
}
"""By type of operation. A rule is asked for operations of which an argument depends on the batch, and none is an Other,
apart from those in `LENIENT`. It gives one kind for all results, or one for each. Sizes of dimensions that TensorFlow
infers replace those that a rule does not know."""

LENIENT = frozenset({"DenseBincount"})
"""The operations whose rules are asked although an argument depends on the batch in a way that no rule describes."""
