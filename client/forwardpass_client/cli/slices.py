"""Structures of arrays, cut along their first dimension."""

from __future__ import annotations

from typing import Any

from forwardpass.wire import errors, trees


class Slices:
    """The slices of a structure of arrays, `size` examples each, the last one fewer; at least one.

    Raises ShapeMismatch for arrays of different lengths.
    """

    def __init__(self, data: Any, size: int) -> None:
        self._tree, self._leaves = trees.flatten(data)
        self._size = size
        lengths = {int(leaf.shape[0]) if leaf.ndim else -1 for leaf in self._leaves}
        if len(lengths) != 1 or -1 in lengths:
            raise errors.ShapeMismatch(
                place="data", expected="as many examples in each array", found=f"{sorted(lengths)}"
            )
        (self.examples,) = lengths

    def __len__(self) -> int:
        return max(-(-self.examples // self._size), 1)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._size
        return self._tree.unflatten([leaf[start : start + self._size] for leaf in self._leaves])

    def examples_in(self, count: int) -> int:
        """How many examples the first slices hold."""
        return min(count * self._size, self.examples)
