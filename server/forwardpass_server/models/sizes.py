"""Sizes of dimensions as products: a number, the number of rows of a batch, and sizes that are unknown."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

_BATCH = "the number of rows"

# Shapes are computed in 32 bits, where a larger number wraps around.
_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """A whole number: `factor` times the product of the symbols.

    symbols: sorted names. A symbol stands for a number that is known only when the graph runs. Apart from the number of
    rows, it is the same for all batches whose arrays have the same shapes behind the first dimension.
    """

    factor: int
    symbols: tuple[str, ...] = ()

    @property
    def constant(self) -> int | None:
        """The number, where it is known."""
        return None if self.symbols else self.factor

    @property
    def has_rows(self) -> bool:
        """Whether the number of rows is a factor of it."""
        return _BATCH in self.symbols

    def times(self, other: Size) -> Size:
        """The product."""
        return Size(self.factor * other.factor, tuple(sorted(self.symbols + other.symbols)))

    def divided(self, other: Size) -> Size | None:
        """The quotient, if it is exact whatever the symbols are."""
        rest = Counter(self.symbols)
        rest.subtract(other.symbols)
        if not other.factor or self.factor % other.factor or min(rest.values(), default=0) < 0:
            return None
        return Size(self.factor // other.factor, tuple(sorted(rest.elements())))

    def __str__(self) -> str:
        return "*".join([str(self.factor), *self.symbols]) if self.symbols else str(self.factor)


ONE = Size(1)
ROWS = Size(1, (_BATCH,))
"""The number of rows of a batch."""

UNKNOWN = Size(-1)
"""-1, as a shape has it for the size that follows from the others."""

Number = Size | None
"""A number in a computation of shapes; None if it depends on the number of rows and is no product with it."""


def unknown(name: str) -> Size:
    """A size that is unknown. The same name is the same size."""
    return Size(1, (name,))


def product(sizes: Iterable[Size]) -> Size:
    """The product of all."""
    result = ONE
    for size in sizes:
        result = result.times(size)
    return result


def multiply(one: Number, other: Number) -> Number:
    """The product, as TensorFlow computes it in 32 bits."""
    if one is None or other is None:
        return None
    return _checked(one.times(other), "*", one, other)


def add(one: Number, other: Number) -> Number:
    """The sum."""
    if one is None or other is None:
        return None
    if one.constant == 0 or other.constant == 0:
        return other if one.constant == 0 else one
    if one.symbols == other.symbols:
        return _checked(Size(one.factor + other.factor, one.symbols), "+", one, other)
    return _named("+", one, other)


def negate(one: Number) -> Number:
    """The number with the other sign."""
    return None if one is None else Size(-one.factor, one.symbols)


def subtract(one: Number, other: Number) -> Number:
    """The difference."""
    result = add(one, negate(other))
    return Size(0) if result is not None and not result.factor else result


def floor_divide(one: Number, other: Number) -> Number:
    """The quotient, rounded down."""
    if one is None or other is None:
        return None
    if one.constant is not None and other.constant:
        return Size(one.constant // other.constant)
    exact = one.divided(other)
    return _named("//", one, other) if exact is None else exact


def remainder(one: Number, other: Number) -> Number:
    """The remainder of `floor_divide`."""
    if one is None or other is None:
        return None
    if one.constant is not None and other.constant:
        return Size(one.constant % other.constant)
    return _named("%", one, other) if one.divided(other) is None else Size(0)


def maximum(one: Number, other: Number) -> Number:
    """The larger number."""
    return _chosen("max", one, other, max)


def minimum(one: Number, other: Number) -> Number:
    """The smaller number."""
    return _chosen("min", one, other, min)


def _chosen(name: str, one: Number, other: Number, choose: Callable[[int, int], int]) -> Number:
    if one is None or other is None:
        return None
    if one == other:
        return one
    if one.constant is not None and other.constant is not None:
        return Size(choose(one.constant, other.constant))
    return _named(name, one, other)


def _checked(result: Size, sign: str, one: Size, other: Size) -> Number:
    if abs(result.factor) > _LARGEST or result.symbols.count(_BATCH) > 1:
        return _named(sign, one, other)
    return Size(0) if not result.factor else result


def _named(sign: str, one: Size, other: Size) -> Number:
    """A number that is no product: a symbol whose name is the computation, so that it is found equal to itself."""
    if one.has_rows or other.has_rows:
        return None
    return unknown(f"({one}{sign}{other})")
