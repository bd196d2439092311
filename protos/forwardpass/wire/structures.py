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
    """Nested containers of arrays, flattened.

    tree: the containers. leaves: one array for each leaf of the tree, in order.
    dtypes: the types of the leaves on the wire if the arrays do not determine them (bfloat16 held as float32); else ().
    """

    tree: trees.TreeDef
    leaves: Sequence[Array]
    dtypes: Sequence[DType] = ()

    @classmethod
    def of(cls, value: trees.Nested, place: str = "structure", limits: Limits = DEFAULT) -> Structure:
        """Flattens a nested value; leaves are converted by np.asarray. Raises StructureMismatch."""
        tree, leaves = trees.flatten(value, place, limits)
        return cls(tree, [np.asarray(leaf) for leaf in leaves])


def encode(
    structure: Structure, place: str = "structure", offset: int | None = None
) -> tuple[list[tensors.Buffer], int]:
    """Encodes a structure: the buffers of a Structure message, and their total length. Raises DTypeMismatch.

    offset: the position of the message in the one that contains it. Long arrays are then aligned to `_ALIGNMENT`.
    """
    leaves = structure.leaves
    wire_dtypes = structure.dtypes or [dtypes.of(leaf, place) for leaf in leaves]
    elements, headers = [], []
    for leaf, dtype in zip(leaves, wire_dtypes, strict=True):
        data, data_bytes = tensors.elements(leaf, dtype, place)
        elements.append(data)
        headers.append((dtype.code, leaf.shape, data_bytes))
    frame = _frame_cached if len(leaves) <= _CACHED_LEAVES else _frame
    framing, size_bytes = frame(structure.tree, tuple(headers), None if offset is None else offset % _ALIGNMENT)
    pieces: list[tensors.Buffer] = [*framing, *elements]
    # Interleaved: the framing of each array, then its elements.
    pieces[::2], pieces[1::2] = framing, elements
    return pieces, size_bytes


# NumPy requires no larger alignment for any data type of the protocol. gRPC puts a message at an aligned address.
_ALIGNMENT = 8

# Shorter arrays are copied by a reader in less than a microsecond.
_ALIGNED_BYTES = 1024


def _frame(
    tree: trees.TreeDef, headers: Sequence[tuple[int, tuple[int, ...], int]], offset: int | None
) -> tuple[Sequence[bytes], int]:
    """The bytes before the elements of each array in a Structure message, and the length of the whole message.

    headers: for each leaf the arguments of `tensors.encode_header`. offset: see `encode`. Without leaves the result
    holds the tree only.
    """
    framing = []
    before = fields.prefix(_TREE, len(tree.encoded)) + tree.encoded
    position = offset or 0
    for code, shape, data_bytes in headers:
        header = tensors.encode_header(code, shape, data_bytes)
        one = before + fields.prefix(_LEAVES, len(header) + data_bytes) + header
        missing = -(position + len(one)) % _ALIGNMENT
        if missing and offset is not None and data_bytes >= _ALIGNED_BYTES:
            # The shortest padding has 2 bytes. An array may stay unaligned if the padding makes a length longer.
            padding_bytes = missing if missing >= 2 else missing + _ALIGNMENT
            header = tensors.encode_header(code, shape, data_bytes, padding_bytes)
            one = before + fields.prefix(_LEAVES, len(header) + data_bytes) + header
        framing.append(one)
        position += len(one) + data_bytes
        before = b""
    size_bytes = sum(map(len, framing)) + sum(data_bytes for _, _, data_bytes in headers)
    return (tuple(framing), size_bytes) if framing else ((before,), len(before))


# Framings are cached because usually only elements change from call to call. For many leaves the cache would take too
# much memory, and framing is a small part of their cost.
_CACHED_LEAVES = 64
_frame_cached: Any = functools.lru_cache(maxsize=1024)(_frame)


class Located(NamedTuple):
    """The positions of a structure's arrays in a message. Everything but the elements is validated."""

    tree: trees.TreeDef
    leaves: Sequence[tensors.Located]


def decode(data: bytes, start: int, end: int, place: str = "structure", limits: Limits = DEFAULT) -> Structure:
    """Decodes the Structure message in data[start:end]. Its arrays share the memory of `data`.

    Raises InvalidRequest or a subclass, which names the leaf.
    """
    return read(data, locate(data, start, end, place, limits), place)


def locate(data: bytes, start: int, end: int, place: str, limits: Limits, budget: Budget | None = None) -> Located:
    """Validates the Structure message in data[start:end], and locates its arrays. Reads no elements.

    Errors: see `decode`; also LimitExceeded.
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
        # The path of a leaf is slow to compute: only after an error, locate the leaf again with its path.
        index = len(leaves)
        tensors.locate(data, *spans[index], tree.paths(place)[index], limits)
        raise
    return Located(tree, leaves)


def read(data: bytes, located: Located, place: str) -> Structure:
    """Reads a structure that was located in `data`, or in a message with the same framing: see `tensors.read`."""
    try:
        leaves = [tensors.read(data, leaf, place) for leaf in located.leaves]
    except errors.InvalidRequest:
        for leaf, path in zip(located.leaves, located.tree.paths(place), strict=True):
            tensors.read(data, leaf, path)
        raise
    return Structure(located.tree, leaves)
