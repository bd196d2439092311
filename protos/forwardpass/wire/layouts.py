"""A cache of message layouts: a message of a known layout is compared with it instead of being parsed.

From call to call usually only the elements of arrays change, and perhaps the header. All other bytes, the framing,
determine the positions of the arrays: a message of the same length with the same framing has the same structures, and
only the elements remain to be read.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

from google.protobuf.message import Message

from forwardpass.wire import dtypes, structures

# Limits of the cache: any client can send messages, and must not fill the memory. A longer framing is not cached. Above
# the total the oldest entries are dropped. A leaf has at least 6 bytes of framing, and its entry takes about 300 bytes.
_MAX_FRAMING_BYTES = 4096
_MAX_TOTAL_BYTES = 2**17
_ENTRY_BYTES = 64


class Layout(NamedTuple):
    """The positions of all parts in messages of one type and length.

    head_end: the end of the header, that is of the fields that are not structures; all of them come first.
    parts: the structures by their places.
    gaps, framing: the positions of the framing after the header, and its bytes.
    """

    head_end: int
    parts: Mapping[str, structures.Located]
    gaps: list[slice]
    framing: list[bytes]

    @property
    def size_bytes(self) -> int:
        """The approximate memory of this entry."""
        return _ENTRY_BYTES + sum(map(len, self.framing))

    def fits(self, data: bytes) -> bool:
        """Whether a message of this length has the same framing, and so the same structures except for the elements."""
        return [data[gap] for gap in self.gaps] == self.framing


def of(data: bytes, head_end: int, parts: Mapping[str, structures.Located]) -> Layout | None:
    """The layout of a message whose structures were located; None if it cannot be cached.

    A message with strings cannot: their lengths are among the elements.
    """
    leaves = [leaf for part in parts.values() for leaf in part.leaves]
    if any(leaf.dtype is dtypes.STRING for leaf in leaves):
        return None
    spans = sorted((leaf.start, leaf.end) for leaf in leaves if leaf.num_elements)
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    gaps = list(map(slice, [head_end, *ends], [*starts, len(data)]))
    if sum(gap.stop - gap.start for gap in gaps) > _MAX_FRAMING_BYTES:
        return None
    return Layout(head_end, parts, gaps, [bytes(data[gap]) for gap in gaps])


class Layouts:
    """A bounded cache: the layout of the last message of each type and length. Thread-safe."""

    def __init__(self) -> None:
        self._kept: dict[tuple[type[Message], int], Layout] = {}
        self._size_bytes = 0
        self._lock = threading.Lock()

    def find(self, message_type: type[Message], data: bytes) -> Layout | None:
        """The cached layout that fits a message (its header is not compared); None if there is none."""
        layout = self._kept.get((message_type, len(data)))
        return layout if layout is not None and layout.fits(data) else None

    def keep(self, message_type: type[Message], size_bytes: int, layout: Layout) -> None:
        """Caches a layout. size_bytes: the length of its messages."""
        key = message_type, size_bytes
        with self._lock:
            replaced = self._kept.pop(key, None)
            self._kept[key] = layout
            self._size_bytes += layout.size_bytes - (replaced.size_bytes if replaced else 0)
            while self._size_bytes > _MAX_TOTAL_BYTES:
                self._size_bytes -= self._kept.pop(next(iter(self._kept))).size_bytes
