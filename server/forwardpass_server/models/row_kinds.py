"""Kinds of tensors by how they depend on the batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from forwardpass_server.models import sizes
from forwardpass_server.models.sizes import ONE, Number, Size

Dims = tuple[Size, ...]
"""The size of each dimension."""


class Inseparable(Exception):
    """An operation mixes rows, or may mix them. The message says why."""


class HasEffect(Inseparable):
    """An operation is not the same in each run. It counts even where no prediction uses it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Values:
    """The whole numbers in a small array of whole numbers."""

    shape: tuple[int, ...]
    items: tuple[Number, ...]

    @classmethod
    def of(cls, array: Any) -> Values:
        """Of an array of objects."""
        return cls(array.shape, tuple(array.ravel().tolist()))

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The numbers as an array of objects."""
        array = np.empty(math.prod(self.shape), object)
        array[:] = self.items
        return array.reshape(self.shape)

    @property
    def constants(self) -> list[int] | None:
        """All numbers in order, where all are known."""
        found = [item.constant for item in self.items if item is not None]
        known = [item for item in found if item is not None]
        return known if len(known) == len(self.items) else None

    @property
    def is_free(self) -> bool:
        """Whether no number depends on the number of rows."""
        return all(item is not None and not item.has_rows for item in self.items)


@dataclasses.dataclass(frozen=True, slots=True)
class Free:
    """A tensor that is the same for all batches whose arrays have the same shapes behind the first dimension.

    dims: None for an unknown rank. values: of a small tensor of whole numbers.
    """

    dims: Dims | None = None
    values: Values | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """A small tensor of whole numbers that depends on the number of rows, and on no row."""

    values: Values


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """A tensor with a dimension that holds the rows of the batch. Each part of a row is made of that row alone.

    axis: the dimension of the rows. Its size is outer * B * inner for B rows, and entry (i * B + b) * inner + j of it
      is part (i, j) of row b. Both are 1 for a dimension that holds the rows and nothing else. How a part is made of
      its row depends on neither b nor B.
    dims: the size of each dimension.
    rounded: the first operation that rounded the numbers; "" where none has.
    """

    axis: int
    dims: Dims
    outer: Size = ONE
    inner: Size = ONE
    rounded: str = ""

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.dims)

    @property
    def place(self) -> int:
        """The dimension of the rows, counted from the end."""
        return self.axis - self.rank

    @property
    def layout(self) -> tuple[Size, Size]:
        """How the rows stand in their dimension."""
        return self.outer, self.inner

    @property
    def is_plain(self) -> bool:
        """Whether the first dimension is the batch."""
        return self.axis == 0 and self.layout == (ONE, ONE)


@dataclasses.dataclass(frozen=True, slots=True)
class Pieces:
    """One of the tensors that hold, together, pieces of all rows, of which each row has its own number.

    source: the operation that made them. part: which tensor: the values of the pieces in the order of rows ("values"),
      the index of each piece (the number of its row, and its number in it) ("indices"), the numbers of the rows of all
      pieces ("owners"), or the shape of the dense tensor ("shape").
    whole: the dense tensor that they make, where each row has as many pieces as any other.
    """

    source: str
    part: str
    whole: Rows | None = None
    rounded: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Nothing:
    """A value that no path of the graph which was followed so far gives."""


@dataclasses.dataclass(frozen=True, slots=True)
class Elements:
    """A list of tensors whose length depends on no row, nor on their number. element: the kind of each that was set."""

    element: Kind


@dataclasses.dataclass(frozen=True, slots=True)
class Other:
    """A tensor that depends on the batch in another way. reason: the operation that is responsible, and why."""

    reason: str


Kind = Free | Counts | Rows | Pieces | Elements | Nothing | Other


def of_values(values: Values) -> Kind:
    """The kind of a small tensor of whole numbers."""
    if values.is_free:
        return Free(tuple(Size(dim) for dim in values.shape), values)
    return Counts(values)


def values_of(kind: Kind) -> Values | None:
    """The whole numbers of a tensor, where they are known."""
    return kind.values if isinstance(kind, Free | Counts) else None


def rounded(kind: Kind) -> str:
    """The first operation that rounded the numbers of a tensor or list; "" where none has."""
    if isinstance(kind, Elements):
        return rounded(kind.element)
    return kind.rounded if isinstance(kind, Rows | Pieces) else ""


def joined(one: Kind, other: Kind, name: str) -> Kind:
    """The kind of a tensor that is of one kind or of the other, which does not depend on the batch.

    name: for sizes that differ.
    """
    if one == other or isinstance(other, Nothing):
        return one
    if isinstance(one, Nothing):
        return other
    for kind in (one, other):
        if isinstance(kind, Other):
            return kind
    if isinstance(one, Free) and isinstance(other, Free):
        return Free(_joined_dims(one.dims, other.dims, name), _joined_values(one.values, other.values, name))
    if isinstance(one, Elements) and isinstance(other, Elements):
        return Elements(joined(one.element, other.element, f"{name}/element"))
    if isinstance(one, Rows) and isinstance(other, Rows) and one.rank == other.rank:
        dims = _joined_dims(one.dims, other.dims, name)
        if dims is not None and (one.axis, one.layout) == (other.axis, other.layout):
            return dataclasses.replace(one, dims=dims, rounded=one.rounded or other.rounded)
    return Other("a value that a loop or a branch changes depends on the batch in different ways")


def repeated(one: Kind, other: Kind, name: str) -> Kind:
    """The kind of a variable of a loop: one at its beginning, or other after a repetition.

    A size that a repetition computes is another one in the next repetition. So no such size may stay in the result.
    """
    if isinstance(one, Elements) and isinstance(other, Elements):
        return Elements(repeated(one.element, other.element, f"{name}/element"))
    if not isinstance(one, Nothing):
        return joined(one, other, name)
    if isinstance(other, Rows) and (other.outer.constant is None or other.inner.constant is None):
        return Other("a list holds rows in pieces of unknown size")
    return forgotten(other, name)


def forgotten(kind: Kind, name: str) -> Kind:
    """The kind of a tensor that was one of several, whose unknown sizes may differ. name: for these sizes."""
    if isinstance(kind, Free):
        is_known = kind.values is not None and kind.values.constants is not None
        return Free(_renamed(kind.dims, name), kind.values if is_known else None)
    if isinstance(kind, Rows):
        return dataclasses.replace(kind, dims=_renamed(kind.dims, name))
    if isinstance(kind, Nothing | Other):
        return kind
    return Other("a value of a list depends on the batch in a way that is not looked into")


def _joined_dims(one: Dims | None, other: Dims | None, name: str) -> Dims | None:
    if one is None or other is None or len(one) != len(other):
        return None
    return tuple(
        first if first == second else sizes.unknown(f"{name}[{axis}]")
        for axis, (first, second) in enumerate(zip(one, other, strict=True))
    )


def _joined_values(one: Values | None, other: Values | None, name: str) -> Values | None:
    if one is None or other is None or one.shape != other.shape:
        return None
    items = (
        first if first == second else sizes.unknown(f"{name}={index}")
        for index, (first, second) in enumerate(zip(one.items, other.items, strict=True))
    )
    return Values(one.shape, tuple(items))


def _renamed(dims: Any, name: str) -> Any:
    if dims is None:
        return None
    return tuple(
        size if size.constant is not None or size.has_rows else sizes.unknown(f"{name}[{axis}]")
        for axis, size in enumerate(dims)
    )
