"""Nested containers of arrays as `forwardpass.v1.Structure` messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from forwardpass.wire import errors, fields, tensors, trees
from forwardpass.wire.dtypes import Array, DType
from forwardpass.wire.limits import DEFAULT, Limits

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
    tree = structure.tree.encoded
    pieces: list[tensors.Buffer] = [fields.prefix(_TREE, len(tree)), tree]
    size_bytes = len(pieces[0]) + len(tree)
    wire_dtypes: Sequence[DType | None] = structure.dtypes or (None,) * len(structure.leaves)
    for leaf, dtype in zip(structure.leaves, wire_dtypes, strict=True):
        leaf_pieces, leaf_bytes = tensors.encode(leaf, dtype, place)
        header = fields.prefix(_LEAVES, leaf_bytes)
        pieces.append(header)
        pieces += leaf_pieces
        size_bytes += len(header) + leaf_bytes
    return pieces, size_bytes


def decode(data: bytes, start: int, end: int, place: str = "structure", limits: Limits = DEFAULT) -> Structure:
    """The Structure message in data[start:end]; its arrays share the memory of `data`.

    Raises InvalidRequest or one of its subclasses, naming the leaf.
    """
    tree: trees.TreeDef | None = None
    spans: list[tuple[int, int]] = []
    for number, wire_type, _, value_start, value_end in fields.scan(data, start, end):
        if number == _LEAVES and wire_type == fields.LENGTH_DELIMITED:
            spans.append((value_start, value_end))
            if len(spans) > limits.max_leaves:
                raise errors.StructureMismatch(
                    place=place, expected=f"at most {limits.max_leaves} leaves", found="more"
                )
        elif number == _TREE and wire_type == fields.LENGTH_DELIMITED:
            if tree is not None:
                raise errors.InvalidRequest("malformed structure: a second tree", place=place)
            tree = trees.decode(bytes(data[value_start:value_end]), place, limits)
        elif number in (_TREE, _LEAVES):
            raise errors.InvalidRequest(f"malformed structure: wire type {wire_type}", place=place)
    if tree is None:
        raise errors.InvalidRequest("malformed structure: no tree", place=place)
    if len(spans) != tree.num_leaves:
        raise errors.StructureMismatch(place=place, expected=f"{tree.num_leaves} leaves", found=f"{len(spans)}")
    leaves: list[Array] = []
    try:
        for leaf_start, leaf_end in spans:
            leaves.append(tensors.decode(data, leaf_start, leaf_end, place, limits))
    except errors.InvalidRequest:
        # Only an error needs to know the leaf's path: meet it again, under its name.
        index = len(leaves)
        tensors.decode(data, *spans[index], tree.paths(place)[index], limits)
        raise
    return Structure(tree, leaves)
