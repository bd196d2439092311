"""Rules for operations that move, join, cut or repeat parts of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from forwardpass_server.models import sizes, slices
from forwardpass_server.models.row_kinds import Counts, Dims, Free, Inseparable, Kind, Rows, values_of
from forwardpass_server.models.row_rules import (
    COUNT,
    PARAMETERS,
    TIES,
    Rule,
    Step,
    axis_of,
    inserted,
    known,
    replaced,
    require,
    without,
)
from forwardpass_server.models.sizes import ONE, UNKNOWN, Size, product

_PIECES = "cuts rows in pieces, or joins them"


def _reshape(step: Step) -> Kind:
    """Reshape: (tensor, shape). The numbers keep their order, so the parts of a row are known from the sizes alone."""
    rows = step.rows(0)
    dims = _reshaped(rows, step.values(1).items)
    before = product(rows.dims[: rows.axis]).times(rows.outer)
    behind = rows.inner.times(product(rows.dims[rows.axis + 1 :]))
    places = [axis for axis, size in enumerate(dims) if size.has_rows]
    require(len(places) == 1, "fixes the number of rows" if not places else "uses the number of rows twice")
    axis = places[0]
    outer, inner = before.divided(product(dims[:axis])), behind.divided(product(dims[axis + 1 :]))
    if outer is None or inner is None or outer.times(sizes.ROWS).times(inner) != dims[axis]:
        raise Inseparable(_PIECES)
    return dataclasses.replace(rows, axis=axis, dims=dims, outer=outer, inner=inner)


def _reshaped(rows: Rows, shape: Sequence[Size | None]) -> Dims:
    """The sizes that a shape asks for, with the size that follows from the others."""
    dims = []
    for size in shape:
        if size is None:
            raise Inseparable(COUNT)
        require(size == UNKNOWN or size.factor >= 0, "asks for a negative size")
        dims.append(size)
    require(product(rows.dims).factor, "has rows without numbers, whose number it cannot keep")
    require(all(size.factor for size in dims), "has rows without numbers, whose number it cannot keep")
    free = [axis for axis, size in enumerate(dims) if size == UNKNOWN]
    require(len(free) <= 1, "asks for several sizes that follow from the others")
    if not free:
        return tuple(dims)
    rest = product(rows.dims).divided(product(size for size in dims if size != UNKNOWN))
    if rest is None:
        raise Inseparable(_PIECES)
    dims[free[0]] = rest
    return tuple(dims)


def _transpose(step: Step) -> Kind:
    """Transpose: (tensor, order)."""
    rows = step.rows(0)
    order = step.axes(1, rows.rank)
    require(sorted(order) == list(range(rows.rank)), "names an axis twice")
    return dataclasses.replace(rows, axis=order.index(rows.axis), dims=tuple(rows.dims[axis] for axis in order))


def _expand_dims(step: Step) -> Kind:
    rows = step.rows(0)
    return inserted(rows, step.axis(1, rows.rank + 1), ONE)


def _squeeze(step: Step) -> Kind:
    rows = step.rows(0)
    axes = [axis_of(axis, rows.rank) for axis in step.attribute("squeeze_dims")]
    require(axes and rows.axis not in axes, "may drop the batch")
    return without(rows, axes)


def _alike(step: Step, indices: Sequence[int]) -> list[Rows]:
    """Arguments that hold rows in the same places."""
    parts = [kind for index in indices if isinstance(kind := step.kinds[index], Rows)]
    require(len(parts) == len(indices), "joins rows with something else")
    for part in parts:
        is_alike = (part.axis, part.rank, part.layout) == (parts[0].axis, parts[0].rank, parts[0].layout)
        require(is_alike, "joins rows with something else")
    return parts


def _agreed(step: Step, parts: Sequence[Rows]) -> Rows:
    """One of several tensors of one shape, with all sizes that are known of any."""
    dims = []
    for axis, present in enumerate(zip(*(part.dims for part in parts), strict=True)):
        constant = next((size for size in present if size.constant is not None), None)
        dims.append(constant or (present[0] if len(set(present)) == 1 else step.unknown(axis)))
    return dataclasses.replace(parts[0], dims=tuple(dims))


def _concat(step: Step) -> Kind:
    """ConcatV2: (parts..., axis)."""
    count = len(step.kinds) - 1
    require(isinstance(step.kinds[-1], Free), COUNT)
    parts = _alike(step, range(count))
    axis = step.axis(count, parts[0].rank)
    require(axis != parts[0].axis, "joins along the batch")
    total: Size | None = Size(0)
    for part in parts:
        total = sizes.add(total, part.dims[axis])
    parts = [replaced(part, axis, ONE) for part in parts]
    return replaced(_agreed(step, parts), axis, known(total) or step.unknown("axis"))


def _pack(step: Step) -> Kind:
    parts = _alike(step, range(len(step.kinds)))
    axis = axis_of(step.attribute("axis"), parts[0].rank + 1)
    return inserted(_agreed(step, parts), axis, Size(len(parts)))


def _unpack(step: Step) -> Kind:
    rows = step.rows(0)
    axis = axis_of(step.attribute("axis"), rows.rank)
    require(axis != rows.axis, "takes the batch apart")
    return without(rows, [axis])


def _split(step: Step) -> Kind:
    """Split: (axis, value)."""
    rows = step.rows(1)
    axis = step.axis(0, rows.rank)
    require(axis != rows.axis, "splits the batch")
    part = rows.dims[axis].divided(Size(step.attribute("num_split")))
    return replaced(rows, axis, part or step.unknown("axis"))


def _split_v(step: Step) -> Sequence[Kind]:
    """SplitV: (value, sizes, axis)."""
    rows = step.rows(0)
    step.free(1)
    axis = step.axis(2, rows.rank)
    require(axis != rows.axis, "splits the batch")
    values = values_of(step.kinds[1])
    items = values.items if values else [None] * step.attribute("num_split")
    return [replaced(rows, axis, known(item) or step.unknown(index)) for index, item in enumerate(items)]


def _strided_slice(step: Step) -> Kind:
    """StridedSlice: (value, begin, end, strides)."""
    rows = step.rows(0)
    masks = slices.Masks.of(step.operation)
    count = next((len(found.items) for index in (1, 2, 3) if (found := values_of(step.kinds[index]))), None)
    require(count is not None, "takes its axes or shape from a computation")
    assert count is not None
    bounds = []
    for index in (1, 2, 3):
        values = values_of(step.kinds[index])
        require(values is not None or isinstance(step.kinds[index], Free), PARAMETERS)
        bounds.append(list(values.items) if values else [step.unknown(f"{index}/{item}") for item in range(count)])
    dims: list[Size] = []
    axis = None
    for part in slices.parts(rows.rank, count, masks):
        if part.axis == rows.axis:
            _require_all_rows(part, bounds, rows.dims[rows.axis])
            axis = len(dims)
            dims.append(rows.dims[rows.axis])
        elif part.axis is None:
            dims.append(ONE)
        else:
            used = [one[part.index] for one in bounds] if part.index is not None else []
            require(all(item is not None and not item.has_rows for item in used), "uses the number of rows")
            if not part.is_dropped:
                dims.append(_sliced(step, rows.dims[part.axis], part, bounds))
    assert axis is not None
    return dataclasses.replace(rows, axis=axis, dims=tuple(dims))


def _require_all_rows(part: slices.Part, bounds: Sequence[Sequence[Size | None]], size: Size) -> None:
    if part.index is None:
        return
    begin, end, stride = (one[part.index] for one in bounds)
    is_whole = (
        not part.is_dropped
        and stride == ONE
        and (part.begins_free or begin == Size(0))
        and (part.ends_free or end == size)
    )
    require(is_whole, "takes some rows and leaves others")


def _sliced(step: Step, size: Size, part: slices.Part, bounds: Sequence[Sequence[Size | None]]) -> Size:
    if part.index is None:
        return size
    begin, end, stride = (item.constant if item is not None else None for item in (one[part.index] for one in bounds))
    if part.begins_free and part.ends_free and stride in (1, -1):
        return size
    constant = size.constant
    is_known = (part.begins_free or begin is not None) and (part.ends_free or end is not None) and stride
    if not is_known or constant is None:
        return step.unknown(part.axis)
    taken = slice(None if part.begins_free else begin, None if part.ends_free else end, stride)
    return Size(len(range(constant)[taken]))


def _slice(step: Step) -> Kind:
    """Slice: (value, begin, size)."""
    rows = step.rows(0)
    begin, size = step.values(1).items, step.values(2).items
    dims = []
    for axis, (first, count, whole) in enumerate(zip(begin, size, rows.dims, strict=True)):
        if axis == rows.axis:
            require(first == Size(0) and count in (UNKNOWN, whole), "takes some rows and leaves others")
            dims.append(whole)
            continue
        for item in (first, count):
            require(item is not None and not item.has_rows, "uses the number of rows")
        is_rest = count == UNKNOWN and first == Size(0)
        dims.append(whole if is_rest else known(count) or step.unknown(axis))
    return dataclasses.replace(rows, dims=tuple(dims))


def _gather(step: Step) -> Kind:
    """GatherV2: (parameters, indices, axis)."""
    parameters, indices = step.dims(0), step.dims(1)
    axis = step.axis(2, max(len(parameters), 1))
    count = step.attribute("batch_dims")
    require(count >= 0, "gathers in a way that is not looked into")
    one, other = step.kinds[0], step.kinds[1]
    dims = (*parameters[:axis], *indices[count:], *parameters[axis + 1 :])
    if isinstance(one, Rows) and isinstance(other, Rows):
        require(one.axis < count and axis >= count, PARAMETERS)
        require((one.axis, one.layout) == (other.axis, other.layout), PARAMETERS)
        return dataclasses.replace(one, dims=dims)
    require(not count, "gathers in a way that is not looked into")
    if isinstance(other, Rows):
        return dataclasses.replace(other, axis=axis + other.axis, dims=dims)
    require(isinstance(one, Rows) and isinstance(other, Free), COUNT)
    assert isinstance(one, Rows)
    require(axis != one.axis, "takes rows by their number")
    return dataclasses.replace(one, axis=one.axis + (len(indices) - 1 if axis < one.axis else 0), dims=dims)


def _gather_nd(step: Step) -> Kind:
    """GatherNd: (parameters, indices)."""
    rows = step.rows(1)
    step.free(0)
    require(rows.place != -1, "takes entries by numbers of several rows")
    depth = rows.dims[-1].constant
    require(depth is not None, "has indices of unknown size")
    return dataclasses.replace(rows, dims=(*rows.dims[:-1], *step.dims(0)[depth:]))


def _fill(step: Step) -> Kind:
    """Fill: (shape, value)."""
    shape = step.kinds[0]
    require(isinstance(shape, Counts) and isinstance(step.kinds[1], Free), COUNT)
    return _with_rows(step.values(0).items)


def _with_rows(shape: Sequence[Size | None]) -> Rows:
    """A tensor of this shape that is made of numbers of no row, the same along its batch."""
    dims = []
    for size in shape:
        if size is None:
            raise Inseparable(COUNT)
        require(size.factor >= 0, "asks for a negative size")
        dims.append(size)
    places = [axis for axis, size in enumerate(dims) if size.has_rows]
    require(len(places) == 1, "uses the number of rows twice" if places else "fixes the number of rows")
    inner = dims[places[0]].divided(sizes.ROWS)
    assert inner is not None
    require(inner.factor, "has rows without numbers, whose number it cannot keep")
    return Rows(places[0], tuple(dims), inner=inner)


def _broadcast_to(step: Step) -> Kind:
    """BroadcastTo: (value, shape)."""
    result = _with_rows(step.values(1).items)
    value, dims = step.kinds[0], step.dims(0)
    require(len(dims) <= result.rank, "broadcasts to a lower rank")
    if isinstance(value, Rows):
        require(value.place == result.place, "moves the batch")
        require(value.dims[value.axis] == result.dims[result.axis], "repeats the batch")
        return dataclasses.replace(value, axis=result.axis, dims=result.dims)
    require(len(dims) < -result.place or dims[result.place] == ONE, TIES)
    return result


def _tile(step: Step) -> Kind:
    """Tile: (value, multiples)."""
    value, dims = step.kinds[0], step.dims(0)
    multiples = []
    for item in step.values(1).items:
        if item is None:
            raise Inseparable(COUNT)
        multiples.append(item)
    require(len(multiples) == len(dims), "repeats other dimensions than there are")
    found = tuple(one.times(other) for one, other in zip(dims, multiples, strict=True))
    if isinstance(value, Rows):
        require(multiples[value.axis] == ONE, "repeats the batch")
        require(not any(item.has_rows for item in multiples), COUNT)
        return dataclasses.replace(value, dims=found)
    require(isinstance(value, Free), COUNT)
    return _with_rows(found)


def _pad(step: Step) -> Kind:
    """Pad, PadV2, MirrorPad: (value, paddings) and perhaps a constant."""
    rows = step.rows(0)
    step.free(*range(2, len(step.kinds)))
    values = step.values(1)
    require(values.shape == (rows.rank, 2), "pads other dimensions than there are")
    dims = []
    for axis, (before, behind) in enumerate(values.array.tolist()):
        if axis == rows.axis:
            require(before == behind == Size(0), "adds rows")
            dims.append(rows.dims[axis])
            continue
        total = sizes.add(sizes.add(before, rows.dims[axis]), behind)
        require(total is not None and not total.has_rows, "uses the number of rows")
        dims.append(known(total) or step.unknown(axis))
    return dataclasses.replace(rows, dims=tuple(dims))


def _space_to_batch(step: Step) -> Kind:
    """SpaceToBatchND: (value, block, paddings). Parts of rows become entries of the batch: the part, then the row."""
    rows = step.rows(0)
    require(rows.axis == 0, ALONG_SPACE)
    step.free(2)
    block = step.numbers(1)
    parts = product(map(Size, block))
    require(parts.factor > 0, "names a block without numbers")
    dims = [parts.times(rows.dims[0]), *rows.dims[1:]]
    for axis in range(len(block)):
        dims[1 + axis] = step.unknown(axis)
    return dataclasses.replace(rows, dims=tuple(dims), outer=parts.times(rows.outer))


def _batch_to_space(step: Step) -> Kind:
    """BatchToSpaceND: (value, block, crops). The inverse of SpaceToBatchND."""
    rows = step.rows(0)
    require(rows.axis == 0, ALONG_SPACE)
    step.free(2)
    block = step.numbers(1)
    parts = product(map(Size, block))
    outer, size = rows.outer.divided(parts), rows.dims[0].divided(parts)
    if outer is None or size is None:
        raise Inseparable("makes one row of several")
    dims = [size, *rows.dims[1:]]
    for axis in range(len(block)):
        dims[1 + axis] = step.unknown(axis)
    return dataclasses.replace(rows, dims=tuple(dims), outer=outer)


ALONG_SPACE = "takes rows for positions"

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _pad),
    **dict.fromkeys(("Transpose", "ConjugateTranspose"), _transpose),
    "BatchToSpaceND": _batch_to_space,
    "BroadcastTo": _broadcast_to,
    "ConcatV2": _concat,
    "ExpandDims": _expand_dims,
    "Fill": _fill,
    "GatherNd": _gather_nd,
    "GatherV2": _gather,
    "Pack": _pack,
    "Reshape": _reshape,
    "Slice": _slice,
    "SpaceToBatchND": _space_to_batch,
    "Split": _split,
    "SplitV": _split_v,
    "Squeeze": _squeeze,
    "StridedSlice": _strided_slice,
    "Tile": _tile,
    "Unpack": _unpack,
}
"""Like `row_rules.RULES`."""
