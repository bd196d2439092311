"""Stacks of several sets of weights on the device, cached in the room that the sets leave."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

_NUMBERS = itertools.count()


class FittedWeights(list[Any]):
    """The placed leaves of one set in the order of one model's weights. They do not change.

    number: differs from that of all others, also of those that are gone.
    """

    def __init__(self, leaves: Iterable[Any]) -> None:
        super().__init__(leaves)
        self.number = next(_NUMBERS)


Key = tuple[int, ...]
"""The numbers of the sets in a stack, in its order."""


def key_of(sets: Sequence[FittedWeights]) -> Key:
    """The key of a stack of these sets."""
    return tuple([weights.number for weights in sets])


def differing(sets: Sequence[FittedWeights]) -> tuple[bool, ...]:
    """For each leaf whether it differs between the sets. The store holds equal tensors once, as one object."""
    return tuple([len(set(map(id, leaves))) > 1 for leaves in zip(*sets, strict=True)])


def copied_bytes(sets: Sequence[FittedWeights], differs: Sequence[bool]) -> int:
    """The size of the leaves that a stack of these sets copies. differs: of `differing`."""
    return len(sets) * sum(_size_bytes(leaf) for leaf, one in zip(sets[0], differs, strict=True) if one)


def _size_bytes(leaf: Any) -> int:
    """The size of a placed tensor, or of an array."""
    return int(leaf.nbytes) if hasattr(leaf, "nbytes") else math.prod(leaf.shape) * int(leaf.dtype.size)


@dataclasses.dataclass(frozen=True, slots=True)
class _Stack:
    leaves: Sequence[Any]
    size_bytes: int


class Stacks:
    """Stacks by the sets that they hold. The least recently used are dropped, all of them before any set of the store.

    budget_bytes: for stacks and what the store holds. Used on one event loop only.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._stacks: collections.OrderedDict[Key, _Stack] = collections.OrderedDict()
        # The stacks that hold a set, by its number.
        self._holding: dict[int, set[Key]] = {}
        self.size_bytes = 0

    def get(self, key: Key) -> Sequence[Any] | None:
        """The leaves of a stack; None if there is none."""
        found = self._stacks.get(key)
        if found is None:
            return None
        self._stacks.move_to_end(key)
        return found.leaves

    def add(self, key: Key, leaves: Sequence[Any], size_bytes: int, used_bytes: int) -> None:
        """Adds a stack, if it fits beside the sets of the store.

        size_bytes: of the leaves that only this stack holds. used_bytes: what the store holds, without stacks.
        """
        if key in self._stacks or used_bytes + size_bytes > self._budget_bytes:
            return
        self.free(used_bytes + self.size_bytes + size_bytes - self._budget_bytes)
        self._stacks[key] = _Stack(leaves, size_bytes)
        self.size_bytes += size_bytes
        for number in key:
            self._holding.setdefault(number, set()).add(key)

    def free(self, size_bytes: int) -> None:
        """Drops stacks until so many bytes are free, or until there are none."""
        wanted = self.size_bytes - size_bytes
        while self.size_bytes > wanted and self._stacks:
            self._remove(next(iter(self._stacks)))

    def drop(self, number: int) -> None:
        """Drops the stacks that hold a set."""
        for key in list(self._holding.get(number, ())):
            self._remove(key)

    def _remove(self, key: Key) -> None:
        self.size_bytes -= self._stacks.pop(key).size_bytes
        for number in set(key):
            holding = self._holding[number]
            holding.discard(key)
            if not holding:
                del self._holding[number]
