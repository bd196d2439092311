"""Which dimensions a StridedSlice cuts, drops and adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from forwardpass_server.models.row_kinds import Inseparable


@dataclasses.dataclass(frozen=True, slots=True)
class Masks:
    """The attributes of a StridedSlice: one bit for each entry of its bounds."""

    begin: int
    end: int
    ellipsis: int
    new_axis: int
    shrink_axis: int

    @classmethod
    def of(cls, operation: Any) -> Masks:
        """Of an operation."""
        return cls(*(operation.get_attr(f"{field.name}_mask") for field in dataclasses.fields(cls)))


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What becomes of one dimension.

    axis: the dimension of the value; None for a new one. index: the entry of the bounds; None for a dimension that
    stays as it is. is_dropped: one position is taken, and the dimension is left out; TensorFlow then ignores the other
    masks. begins_free, ends_free: the bound is ignored.
    """

    axis: int | None
    index: int | None = None
    is_dropped: bool = False
    begins_free: bool = False
    ends_free: bool = False


def parts(rank: int, count: int, masks: Masks) -> Iterator[Part]:
    """The dimensions of the result in order, and those that are dropped.

    rank: of the value. count: of entries of the bounds. Raises Inseparable for bounds that do not fit.
    """
    if masks.ellipsis & (masks.ellipsis - 1):
        raise Inseparable("slices with several ellipses")
    # Within the bounds, an ellipsis wins over a new axis, and that over a dropped dimension.
    added = [bool(masks.new_axis >> index & 1 and not masks.ellipsis >> index & 1) for index in range(count)]
    ellipsis = next((index for index in range(count) if masks.ellipsis >> index & 1), None)
    named = count - sum(added) - (ellipsis is not None)
    if named > rank:
        raise Inseparable("slices more dimensions than there are")
    axis = 0
    for index in range(count):
        if index == ellipsis:
            for _ in range(rank - named):
                yield Part(axis)
                axis += 1
        elif added[index]:
            yield Part(None, index)
        else:
            is_dropped = bool(masks.shrink_axis >> index & 1)
            yield Part(
                axis,
                index,
                is_dropped,
                not is_dropped and bool(masks.begin >> index & 1),
                not is_dropped and bool(masks.end >> index & 1),
            )
            axis += 1
    for rest in range(axis, rank):
        yield Part(rest)
