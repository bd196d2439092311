"""Rules for lists of tensors, and for pieces of rows: words of texts, and crossed features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from forwardpass_server.models import row_kinds, sizes
from forwardpass_server.models.row_kinds import (
    Counts,
    Elements,
    Free,
    Inseparable,
    Kind,
    Nothing,
    Pieces,
    Rows,
    Values,
    forgotten,
)
from forwardpass_server.models.row_rules import Rule, Step, inserted, known, require, without
from forwardpass_server.models.sizes import ONE, Size, product

# Lists.


def _list(step: Step) -> Elements:
    kind = step.kinds[0]
    if not isinstance(kind, Elements):
        raise Inseparable("takes a list from somewhere else")
    return kind


def _reserve(step: Step) -> Kind:
    """TensorListReserve: (shape of an element, length). EmptyTensorList: (shape of an element, largest length)."""
    require(isinstance(step.kinds[0], Free | Counts) and isinstance(step.kinds[1], Free), "makes an entry for each row")
    return Elements(Nothing())


def _from_tensor(step: Step) -> Kind:
    """TensorListFromTensor: (tensor, shape of an element)."""
    if isinstance(step.kinds[0], Free):
        return Elements(Free(step.dims(0)[1:]))
    rows = step.rows(0)
    require(rows.axis != 0, "makes an entry for each row")
    return Elements(without(rows, [0]))


def _set_item(step: Step) -> Kind:
    """TensorListSetItem: (list, index, tensor)."""
    step.free(1)
    return Elements(row_kinds.joined(_list(step).element, step.kinds[2], step.name))


def _push_back(step: Step) -> Kind:
    """TensorListPushBack: (list, tensor)."""
    return Elements(row_kinds.joined(_list(step).element, step.kinds[1], step.name))


def _get_item(step: Step) -> Kind:
    """TensorListGetItem: (list, index, shape of an element)."""
    step.free(1)
    return forgotten(_list(step).element, step.name)


def _stack(step: Step) -> Kind:
    """TensorListStack: (list, shape of an element)."""
    element = forgotten(_list(step).element, step.name)
    if isinstance(element, Rows):
        count = step.attribute("num_elements")
        return inserted(element, 0, Size(count) if count >= 0 else step.unknown("count"))
    if isinstance(element, Free):
        return Free(None if element.dims is None else (step.unknown("count"), *element.dims))
    if isinstance(element, Nothing):
        return element
    raise Inseparable("stacks tensors that depend on the batch in another way")


def _length(step: Step) -> Kind:
    """TensorListLength: (list)."""
    _list(step)
    return Free((), Values((), (step.unknown("count"),)))


# Pieces.


def _split_strings(step: Step) -> Sequence[Kind]:
    """StringSplitV2: (texts, separator)."""
    rows = step.rows(0)
    step.free(1)
    require(rows.rank == 1 and rows.layout == (ONE, ONE), "splits parts of rows")
    pieces = Pieces(step.name, "values")
    shape = Counts(Values((2,), (sizes.ROWS, None)))
    return [dataclasses.replace(pieces, part="indices"), pieces, shape]


def _cross(step: Step) -> Sequence[Kind]:
    """SparseCross: dense features of shape [B, n], each with each. The result has as many for each row."""
    features = []
    require(step.attribute("N") == 0, "crosses features of which each row may have another number")
    for index in range(len(step.kinds)):
        rows = step.rows(index)
        require(rows.rank == 2 and rows.is_plain, "crosses parts of rows")
        features.append(rows.dims[1])
    size = product(features)
    require(features and known(size), "crosses an unknown number of features")
    whole = Rows(0, (sizes.ROWS, size))
    return [Pieces(step.name, part, whole) for part in ("indices", "values", "shape")]


def _dense(step: Step) -> Kind:
    """SparseToDense: (indices, shape, values, default)."""
    parts = [kind for kind in step.kinds[:3] if isinstance(kind, Pieces)]
    require([part.part for part in parts] == ["indices", "shape", "values"], "places entries by numbers of rows")
    require(len({part.source for part in parts}) == 1, "places entries by numbers of other rows")
    step.free(3)
    whole = parts[0].whole
    require(whole is not None, "has as many columns as the longest row")
    assert whole is not None
    return dataclasses.replace(whole, rounded=parts[2].rounded)


def owners(step: Step) -> Kind | None:
    """The numbers of the rows of all pieces, where a StridedSlice takes them from the indices: `indices[:, 0]`."""
    kind = step.kinds[0]
    if not isinstance(kind, Pieces) or kind.part != "indices":
        return None
    begin, end, strides = (step.numbers(index) for index in (1, 2, 3))
    masks = {name: step.attribute(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    is_first = len(begin) == len(end) == len(strides) == 2 and begin[1] == 0 and strides == [1, 1]
    require(
        is_first and masks["begin"] & masks["end"] & 1 and masks["shrink_axis"] == 2,
        "takes something else than the rows of pieces",
    )
    require(not masks["ellipsis"] and not masks["new_axis"], "takes something else than the rows of pieces")
    return dataclasses.replace(kind, part="owners")


def _padded(step: Step) -> Kind:
    """RaggedTensorToTensor: (shape, values, default, number of rows, rows of the pieces)."""
    require(
        step.attribute("row_partition_types") == [b"FIRST_DIM_SIZE", b"VALUE_ROWIDS"] and len(step.kinds) == 5,
        "pads rows in a way that is not looked into",
    )
    values, owner = step.kinds[1], step.kinds[4]
    is_known = isinstance(values, Pieces) and values.part == "values" and isinstance(owner, Pieces)
    require(is_known, "pads something else than pieces of rows")
    assert isinstance(values, Pieces)
    assert isinstance(owner, Pieces)
    require(owner.part == "owners" and owner.source == values.source, "pads pieces of other rows")
    step.free(2)
    require(step.dims(2) == (), "pads with more than one number")
    require(step.values(3).items == (sizes.ROWS,), "pads to another number of rows")
    shape = step.values(0).items
    require(len(shape) == 2 and shape[0] in (sizes.UNKNOWN, sizes.ROWS), "fixes the number of rows")
    size = known(shape[1])
    require(size, "pads to the longest row")
    assert size is not None
    return Rows(0, (sizes.ROWS, size), rounded=values.rounded)


def of_pieces(step: Step) -> Kind | None:
    """The result of an operation on each piece by itself; None where it is no such operation."""
    pieces = [kind for kind in step.kinds if isinstance(kind, Pieces)]
    if not pieces:
        return None
    if step.type == "Cast" and pieces[0].part in ("owners", "values"):
        return pieces[0]
    if step.type not in _OF_PIECES.split():
        return None
    is_alike = all(piece.part == "values" and piece.source == pieces[0].source for piece in pieces)
    require(is_alike, "joins pieces of different rows")
    for index, kind in enumerate(step.kinds):
        if not isinstance(kind, Pieces):
            is_table = step.type == "LookupTableFindV2" and index == 0
            step.free(index)
            require(is_table or step.dims(index) == (), "joins pieces of rows with more than one number")
    return next((piece for piece in pieces if piece.rounded), pieces[0])


_OF_PIECES = (
    "AddV2 Equal LogicalAnd LogicalNot LogicalOr LookupTableFindV2 Mul NotEqual SelectV2 StaticRegexReplace "
    "StringLower StringStrip StringToHashBucketFast StringToHashBucketStrong StringUpper Sub"
)

RULES: Mapping[str, Rule] = {
    "EmptyTensorList": _reserve,
    "RaggedTensorToTensor": _padded,
    "SparseCross": _cross,
    "SparseToDense": _dense,
    "StringSplitV2": _split_strings,
    "TensorListFromTensor": _from_tensor,
    "TensorListGetItem": _get_item,
    "TensorListLength": _length,
    "TensorListPushBack": _push_back,
    "TensorListReserve": _reserve,
    "TensorListSetItem": _set_item,
    "TensorListStack": _stack,
}
"""Like `row_rules.RULES`."""
