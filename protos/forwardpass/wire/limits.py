"""What a message may hold at most: checked before anything is allocated for it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a message's contents. Its length is bounded by the channel that carries it."""

    # numpy before 2.0 has no more.
    max_rank: int = 32
    # Deeper than any weights seen; far from Python's recursion limit and protobuf's 100.
    max_depth: int = 24
    # A large transformer has a few thousand tensors.
    max_leaves: int = 65_536
    max_name_bytes: int = 256
    # In one tensor. Strings become Python objects one by one: a million take a fifth of a second.
    max_strings: int = 2**20
    # max_leaves with names of 20 bytes. What protobuf makes of a tree takes some thirty times its bytes.
    max_tree_bytes: int = 2**21
    # Bounds the dimensions of an empty array, which no data bounds: [0, 2**60] would make a sum over the first
    # axis allocate without end.
    max_empty_extent_bytes: int = 2**28


DEFAULT = Limits()
