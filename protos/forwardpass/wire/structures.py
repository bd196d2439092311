"""Nested containers of arrays as `forwardpass.v1.Structure` messages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from forwardpass.wire import dtypes, errors, fields, tensors, trees
from forwardpass.wire.dtypes import Array, DType
from forwardpass.wire.limits import DEFAULT, Budget, Limits

_TREE, _LEAVES = 1, 2


@dataclasses.dataclass(frozen=True, slots=True)
class Structure:
    """Nested containers of arrays, taken apart.

    tree: the containers. leaves: one array for each of its leaves, in its order.
    dtypes: the leaves' types on the wire, where the arrays do not tell them (bfloat16 held as float32); else ().
    """

    tree: trees.TreeDef
    leaves: Sequence[Array]
    dtypes: Sequence[DType] = ()

    @classmethod
    def of(cls, value: trees.Nested, place: str = "structure", limits: Limits = DEFAULT) -> Structure:
        """Takes a nested value apart; leaves go through np.asarray."""
        tree, leaves = trees.flatten(value, place, limits)
        return cls(tree, [np.asarray(leaf) for leaf in leaves])


def encode(structure: Structure, place: str = "structure") -> tuple[list[tensors.Buffer], int]:
    """One structure as the pieces of a Structure message, and the sum of their lengths in bytes."""
    leaves = structure.leaves
    wire_dtypes = structure.dtypes or [dtypes.of(leaf, place) for leaf in leaves]
    elements, headers = [], []
    for leaf, dtype in zip(leaves, wire_dtypes, strict=True):
        data, data_bytes = tensors.elements(leaf, dtype, place)
        elements.append(data)
        headers.append((dtype.code, leaf.shape, data_bytes))
    frame = _frame_cached if len(leaves) <= _CACHED_LEAVES else _frame
    framing, size_bytes = frame(structure.tree, tuple(headers))
    pieces: list[tensors.Buffer] = [*framing, *elements]
    # Each array behind what announces it.
    pieces[::2], pieces[1::2] = framing, elements
    return pieces, size_bytes


def _frame(tree: trees.TreeDef, headers: Sequence[tuple[int, tuple[int, ...], int]]) -> tuple[Sequence[bytes], int]:
    """What precedes the elements of each array in a Structure message, and the length of the whole in bytes.

    headers: of each leaf, as of `tensors.encode_header`. Without leaves it is the tree alone.
    """
    framing = []
    before = fields.prefix(_TREE, len(tree.encoded)) + tree.encoded
    for code, shape, data_bytes in headers:
        header = tensors.encode_header(code, shape, data_bytes)
        framing.append(before + fields.prefix(_LEAVES, len(header) + data_bytes) + header)
        before = b""
    size_bytes = sum(map(len, framing)) + sum(data_bytes for _, _, data_bytes in headers)
    return (tuple(framing), size_bytes) if framing else ((before,), len(before))


# From call to call it is the elements that change. Structures of many leaves are not kept: they cost more than this.
_CACHED_LEAVES = 64
_frame_cached: Any = functools.lru_cache(maxsize=1024)(_frame)


class Located(NamedTuple):
    """Where the arrays of one structure lie in a message, all of it checked but their elements."""

    tree: trees.TreeDef
    leaves: Sequence[tensors.Located]


def decode(data: bytes, start: int, end: int, place: str = "structure", limits: Limits = DEFAULT) -> Structure:
    """The Structure message in data[start:end]; its arrays share the memory of `data`.

    Raises InvalidRequest or one of its subclasses, naming the leaf.
    """
    return read(data, locate(data, start, end, place, limits), place)


def locate(data: bytes, start: int, end: int, place: str, limits: Limits, budget: Budget | None = None) -> Located:
    """Everything that the Structure message in data[start:end] says, but the elements.

    Errors as of `decode`, and LimitExceeded.
    """
    tree: trees.TreeDef | None = None
    spans: list[tuple[int, int]] = []
    for number, wire_type, _, value_start, value_end in fields.scan(data, start, end, budget):
        if number == _LEAVES and wire_type == fields.LENGTH_DELIMITED:
            spans.append((value_start, value_end))
            if len(spans) > limits.max_leaves:
                raise errors.StructureMismatch(
                    place=place, expected=f"at most {limits.max_leaves} leaves", found="more"
                )
        elif number == _TREE and wire_type == fields.LENGTH_DELIMITED:
            if tree is not None:
                raise errors.InvalidRequest("malformed structure: a second tree", place=place)
            tree = trees.decode(bytes(data[value_start:value_end]), place, limits, budget)
        elif number in (_TREE, _LEAVES):
            raise errors.InvalidRequest(f"malformed structure: wire type {wire_type}", place=place)
    if tree is None:
        raise errors.InvalidRequest("malformed structure: no tree", place=place)
    if len(spans) != tree.num_leaves:
        raise errors.StructureMismatch(place=place, expected=f"{tree.num_leaves} leaves", found=f"{len(spans)}")
    leaves: list[tensors.Located] = []
    try:
        for leaf_start, leaf_end in spans:
            leaves.append(tensors.locate(data, leaf_start, leaf_end, place, limits, budget))
    except errors.InvalidRequest:
        # Only an error needs to know the leaf's path: meet it again, under its name.
        index = len(leaves)
        tensors.locate(data, *spans[index], tree.paths(place)[index], limits)
        raise
    return Located(tree, leaves)


def read(data: bytes, located: Located, place: str) -> Structure:
    """The structure that was located in `data`, or in a message that is the same but for elements: see tensors.read."""
    try:
        leaves = [tensors.read(data, leaf, place) for leaf in located.leaves]
    except errors.InvalidRequest:
        for leaf, path in zip(located.leaves, located.tree.paths(place), strict=True):
            tensors.read(data, leaf, path)
        raise
    return Structure(located.tree, leaves)
