"""Slices of structures of arrays along their first dimension."""

from __future__ import annotations

from typing import Any

from forwardpass.wire import errors, trees


class Slices:
    """The slices of a structure of arrays: `size` examples each, fewer in the last one, and at least one slice.

    Scalars are the same in each slice. Raises ShapeMismatch for arrays of different lengths.
    """

    def __init__(self, data: Any, size: int) -> None:
        self._tree, self._leaves = trees.flatten(data)
        self._size = size
        lengths = {int(leaf.shape[0]) for leaf in self._leaves if leaf.ndim}
        if len(lengths) != 1:
            raise errors.ShapeMismatch(
                place="data",
                expected="the same number of examples in each array",
                found=f"{sorted(lengths) or 'scalars'}",
            )
        (self.examples,) = lengths

    def __len__(self) -> int:
        return max(-(-self.examples // self._size), 1)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._size
        return self._tree.unflatten([leaf[start : start + self._size] if leaf.ndim else leaf for leaf in self._leaves])

    def examples_in(self, count: int) -> int:
        """How many examples the first slices hold."""
        return min(count * self._size, self.examples)
