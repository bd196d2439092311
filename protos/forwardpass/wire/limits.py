"""Limits of the contents of messages. They are checked before memory is allocated."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one tensor or structure. The length of a message is limited by gRPC."""

    # The limit of numpy before 2.0.
    max_rank: int = 32
    # Deeper than any known model's weights; far below Python's recursion limit and protobuf's limit of 100.
    max_depth: int = 24
    # A large transformer has a few thousand tensors.
    max_leaves: int = 65_536
    max_name_bytes: int = 256
    # For one tensor. Each string becomes a Python object: a million take 0.2 s.
    max_strings: int = 2**20
    # Enough for max_leaves with names of 20 bytes. A parsed tree takes about thirty times its bytes.
    max_tree_bytes: int = 2**21
    # The product of the other dimensions of an empty array, which its data does not limit: the sum of an array of shape
    # [0, 2**60] over its first axis would allocate 2**60 elements.
    max_empty_extent_bytes: int = 2**28


DEFAULT = Limits()


class LimitExceeded(Exception):
    """A message exceeds its budget. `most`: the limit, with its unit."""

    def __init__(self, most: str) -> None:
        super().__init__(f"more than {most}")
        self.most = most


class Budget:
    """The remaining budget for decoding one message, with all its structures.

    Each item costs Python about 1 us, however few bytes it has. The limits of tensors and structures are not enough,
    because a message may hold many of them.

    fields: protobuf fields, including those of structures and tensors; a leaf has three or four.
    tree_bytes: bytes of encoded trees that are not in the cache. nodes: leaves and containers of these trees.
    strings: elements of string tensors.
    """

    __slots__ = ("fields", "nodes", "strings", "tree_bytes")

    def __init__(self, fields: int, tree_bytes: int, nodes: int, strings: int) -> None:
        self.fields = fields
        self.tree_bytes = tree_bytes
        self.nodes = nodes
        self.strings = strings

    def take_tree_bytes(self, count: int) -> None:
        """Spends bytes of trees. Raises LimitExceeded."""
        self.tree_bytes -= count
        if self.tree_bytes < 0:
            raise LimitExceeded(f"{MAX_MESSAGE_TREE_BYTES} bytes of trees in a message")

    def take_nodes(self, count: int) -> None:
        """Spends nodes of trees. Raises LimitExceeded."""
        self.nodes -= count
        if self.nodes < 0:
            raise LimitExceeded(f"{MAX_MESSAGE_NODES} leaves and containers in a message")

    def take_strings(self, count: int) -> None:
        """Spends strings. Raises LimitExceeded."""
        self.strings -= count
        if self.strings < 0:
            raise LimitExceeded(f"{MAX_MESSAGE_STRINGS} strings in a message")


MAX_MESSAGE_FIELDS = 2**19
"""Enough for two structures of `max_leaves`."""

MAX_MESSAGE_TREE_BYTES = 2 * DEFAULT.max_tree_bytes

MAX_MESSAGE_NODES = 2 * DEFAULT.max_leaves

MAX_MESSAGE_STRINGS = DEFAULT.max_strings


def whole_message() -> Budget:
    """The budget of any message."""
    return Budget(MAX_MESSAGE_FIELDS, MAX_MESSAGE_TREE_BYTES, MAX_MESSAGE_NODES, MAX_MESSAGE_STRINGS)


# Together about 1 ms. A larger message is decoded on a thread, where it does not block the event loop: see `rpc.codec`.
SMALL_FIELDS = 1024
SMALL_TREE_BYTES = 2048
SMALL_LEAVES = 256
SMALL_STRINGS = 1024


def small_message() -> Budget:
    """The budget of a message that may be decoded on an event loop."""
    return Budget(SMALL_FIELDS, SMALL_TREE_BYTES, SMALL_TREE_BYTES, SMALL_STRINGS)
