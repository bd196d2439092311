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


class LimitExceeded(Exception):
    """A message holds more than its budget. `most`: how much it may hold, with its unit."""

    def __init__(self, most: str) -> None:
        super().__init__(f"more than {most}")
        self.most = most


class Budget:
    """How much of one message may still be decoded, all its structures together.

    Each item costs Python about a microsecond, however few bytes it takes: bounds of a tensor or of a structure do not
    bound a message that holds many of them.

    fields: protobuf fields, those of structures and tensors included; a leaf takes three or four.
    tree_bytes: of encoded trees that are decoded for the first time. nodes: leaves and containers of trees.
    strings: elements of string tensors.
    """

    __slots__ = ("fields", "nodes", "strings", "tree_bytes")

    def __init__(self, fields: int, tree_bytes: int, nodes: int, strings: int) -> None:
        self.fields = fields
        self.tree_bytes = tree_bytes
        self.nodes = nodes
        self.strings = strings

    def take_tree_bytes(self, count: int) -> None:
        self.tree_bytes -= count
        if self.tree_bytes < 0:
            raise LimitExceeded("its share of bytes in trees")

    def take_nodes(self, count: int) -> None:
        self.nodes -= count
        if self.nodes < 0:
            raise LimitExceeded(f"{MAX_MESSAGE_NODES} leaves and containers in a message")

    def take_strings(self, count: int) -> None:
        self.strings -= count
        if self.strings < 0:
            raise LimitExceeded(f"{MAX_MESSAGE_STRINGS} strings in a message")


MAX_MESSAGE_FIELDS = 2**19
"""Two structures of `max_leaves`."""

MAX_MESSAGE_TREE_BYTES = 2 * DEFAULT.max_tree_bytes

MAX_MESSAGE_NODES = 2 * DEFAULT.max_leaves

MAX_MESSAGE_STRINGS = DEFAULT.max_strings


def whole_message() -> Budget:
    """The budget of one message, wherever it is decoded."""
    return Budget(MAX_MESSAGE_FIELDS, MAX_MESSAGE_TREE_BYTES, MAX_MESSAGE_NODES, MAX_MESSAGE_STRINGS)


# Together about a millisecond. A message of more is decoded where it holds up nobody: see `rpc.codec`.
SMALL_FIELDS = 1024
SMALL_TREE_BYTES = 2048
SMALL_LEAVES = 256
SMALL_STRINGS = 1024


def small_message() -> Budget:
    """The budget of a message that may be decoded on an event loop."""
    return Budget(SMALL_FIELDS, SMALL_TREE_BYTES, SMALL_TREE_BYTES, SMALL_STRINGS)
