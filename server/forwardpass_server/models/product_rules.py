"""Rules for products of tensors, convolutions and other operations on images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from forwardpass_server.models.row_kinds import Counts, Free, Kind, Other, Rows
from forwardpass_server.models.row_rules import COUNT, PARAMETERS, TIES, Rule, Step, broadcast, known, replaced, require
from forwardpass_server.models.sizes import ONE, Size

_SUMS = "sums over the batch"


def _mat_mul(step: Step) -> Kind:
    """MatMul: (a, b), two matrices."""
    return _matrix_product(step, step.attribute("transpose_a"), step.attribute("transpose_b"))


def _batch_mat_mul(step: Step) -> Kind:
    """BatchMatMul: (x, y), matrices in the last two dimensions. Those before broadcast, in newer versions."""
    adjoints = step.attribute("adj_x"), step.attribute("adj_y")
    rows = [kind for kind in step.kinds if isinstance(kind, Rows)]
    require(not any(isinstance(kind, Counts) for kind in step.kinds), COUNT)
    if any(kind.place >= -2 for kind in rows):
        return _matrix_product(step, *adjoints)
    dims = [step.dims(0), step.dims(1)]
    require(step.type != "BatchMatMul" or len(rows) == 2, TIES)
    before = [dataclasses.replace(kind, dims=kind.dims[:-2]) for kind in rows]
    result = broadcast(step, [one[:-2] for one in dims], before)
    matrix = _outer_sizes(step, *adjoints)
    return dataclasses.replace(result, dims=(*result.dims, *matrix))


def _outer_sizes(step: Step, is_first_transposed: bool, is_second_transposed: bool) -> tuple[Size, Size]:
    first, second = step.dims(0), step.dims(1)
    return first[-1 if is_first_transposed else -2], second[-2 if is_second_transposed else -1]


def _matrix_product(step: Step, is_first_transposed: bool, is_second_transposed: bool) -> Kind:
    """A product of matrices of which one has the batch as a dimension, and the other is the same for all rows."""
    index = 0 if isinstance(step.kinds[0], Rows) else 1
    rows = step.rows(index)
    step.free(1 - index)
    is_transposed = (is_first_transposed, is_second_transposed)[index]
    # The dimension over which the product sums: the columns of the first matrix, the rows of the second.
    summed = -1 if (index == 0) != is_transposed else -2
    require(rows.place != summed, _SUMS)
    dims = [step.dims(0), step.dims(1)]
    rank = max(map(len, dims))
    before = [_size_before(step, dims[0], dims[1], axis) for axis in range(-rank, -2)]
    result = (*before, *_outer_sizes(step, is_first_transposed, is_second_transposed))
    return dataclasses.replace(rows, axis=rank - 2 + index, dims=result)


def _size_before(step: Step, first: tuple[Size, ...], second: tuple[Size, ...], axis: int) -> Size:
    """One of the dimensions in front of two matrices, which broadcast."""
    present = [one[axis] for one in (first, second) if len(one) >= -axis]
    large = [size for size in present if size != ONE]
    if not large:
        return ONE
    constant = next((size for size in large if size.constant is not None), None)
    return constant or (large[0] if len(set(large)) == 1 else step.unknown(axis))


def _einsum(step: Step) -> Kind:
    arguments, _, result = step.attribute("equation").decode().replace(" ", "").partition("->")
    require(not any(isinstance(kind, Counts) for kind in step.kinds), COUNT)
    every = [step.dims(index) for index in range(len(step.kinds))]
    labels = [_labels(label, len(dims)) for label, dims in zip(arguments.split(","), every, strict=True)]
    # The dimensions of an ellipsis are counted from its end.
    count = max((sum(isinstance(one, int) for one in label) for label in labels), default=0)
    target = _labels(result, len(result.replace("...", "")) + count)
    rows = [(kind, label[kind.axis]) for kind, label in zip(step.kinds, labels, strict=True) if isinstance(kind, Rows)]
    first, batch = rows[0]
    require(batch in target, _SUMS)
    require(target.count(batch) == 1, "spreads the batch over a diagonal")
    found: dict[str | int, Size] = {}
    for kind, label, dims in zip(step.kinds, labels, every, strict=True):
        for name, size in zip(label, dims, strict=True):
            if name not in found or (size.constant is not None and size != ONE) or found[name] == ONE:
                found[name] = size
        if isinstance(kind, Rows):
            require(label[kind.axis] == batch and label.count(batch) == 1, "ties the number of rows to something else")
            require(kind.layout == first.layout, "joins rows with parts of rows")
        else:
            # Only the dimensions of an ellipsis broadcast.
            is_one = isinstance(batch, int) and batch in label and dims[label.index(batch)] == ONE
            require(is_one or batch not in label, "ties the number of rows to something else")
    found[batch] = first.dims[first.axis]
    require(set(target) <= found.keys(), "has an equation that is not looked into")
    return dataclasses.replace(first, axis=target.index(batch), dims=tuple(found[name] for name in target))


def _labels(equation: str, rank: int) -> list[str | int]:
    """The names of the dimensions of one tensor in an equation. Those of an ellipsis are numbers from the end: -1."""
    before, ellipsis, behind = equation.partition("...")
    count = rank - len(before) - len(behind)
    require("." not in before + behind and (count >= 0 if ellipsis else count == 0), "has an equation of another rank")
    return [*before, *range(-count, 0), *behind]


def _window(step: Step) -> Kind:
    """A convolution or a pooling. Each data format begins with the batch."""
    for name in ("ksize", "strides", "dilations"):
        if step.has(name):
            require(step.attribute(name)[0] == 1, "spans the batch")
    if step.has("explicit_paddings"):
        require(not any(step.attribute("explicit_paddings")[:2]), "adds rows")
    return _images(step)


def _images(step: Step) -> Rows:
    """A batch of images, and parameters. The other sizes of the result are unknown."""
    rows = step.rows(0)
    require(rows.axis == 0, "takes rows for positions")
    step.free(*range(1, len(step.kinds)))
    for axis in range(1, rows.rank):
        rows = replaced(rows, axis, step.unknown(axis))
    return rows


def _transposed_window(step: Step) -> Kind:
    """A transposed convolution: (the sizes of the result, filter, images)."""
    for name in ("strides", "dilations"):
        require(step.attribute(name)[0] == 1, "spans the batch")
    if step.has("explicit_paddings"):
        require(not any(step.attribute("explicit_paddings")[:2]), "adds rows")
    step.free(1)
    rows = step.rows(2)
    require(rows.axis == 0, "takes rows for positions")
    shape = step.values(0).items
    require(len(shape) == rows.rank and shape[0] == rows.dims[0], "fixes the number of rows")
    for axis in range(1, rows.rank):
        require(shape[axis] is None or not shape[axis].has_rows, COUNT)  # type: ignore[union-attr]
        rows = replaced(rows, axis, known(shape[axis]) or step.unknown(axis))
    return rows


def _batch_norm(step: Step) -> list[Kind]:
    require(not step.attribute("is_training"), "normalises by the statistics of the batch")
    rows = step.rows(0)
    require(rows.axis == 0, "takes rows for positions")
    require(all(isinstance(kind, Free) for kind in step.kinds[1:]), PARAMETERS)
    # The statistics of no rows at all are NaN, and what is reserved for the gradient may be anything.
    others = len(step.operation.outputs) - 1
    return [rows, *[Other(f"{step.type} ({step.operation.name}) returns statistics of the batch")] * others]


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Conv2D", "Conv3D", "DepthwiseConv2dNative"), _window),
    **dict.fromkeys(("MaxPool", "AvgPool", "MaxPool3D", "AvgPool3D"), _window),
    **dict.fromkeys(
        ("Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNativeBackpropInput"), _transposed_window
    ),
    **dict.fromkeys(("ResizeArea", "ResizeBicubic", "ResizeBilinear", "ResizeNearestNeighbor"), _images),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _images),
    **dict.fromkeys(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"), _batch_norm),
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _batch_mat_mul),
    "Einsum": _einsum,
    "MatMul": _mat_mul,
}
"""Like `row_rules.RULES`."""
