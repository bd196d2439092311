"""Where the arrays lie in messages that came before: the next of the same form is compared, not taken apart.

From call to call only the elements of a message's arrays change, and perhaps its header. Whatever else it holds, its
framing, decides by itself where everything lies: a message of the same length with the same bytes there has the same
structures, whose elements alone are still to be read.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

from google.protobuf.message import Message

from forwardpass.wire import dtypes, structures

# Longer framings are not kept, and the oldest go when all together take more: strangers write them too. The smallest
# leaf takes 6 bytes of framing and some 300 of memory here.
_MAX_FRAMING_BYTES = 4096
_MAX_TOTAL_BYTES = 2**17
_ENTRY_BYTES = 64


class Layout(NamedTuple):
    """Where everything lies in messages of one type and length.

    head_end: where the fields end that are no structures; all of them come first.
    parts: the structures by their places.
    gaps, framing: where there is something else behind the header than elements, and what.
    """

    head_end: int
    parts: Mapping[str, structures.Located]
    gaps: list[slice]
    framing: list[bytes]

    @property
    def size_bytes(self) -> int:
        return _ENTRY_BYTES + sum(map(len, self.framing))

    def fits(self, data: bytes) -> bool:
        """Whether a message of this length has the same structures, but for the elements."""
        return [data[gap] for gap in self.gaps] == self.framing


def of(data: bytes, head_end: int, parts: Mapping[str, structures.Located]) -> Layout | None:
    """The layout of a message whose structures were located; None where it is not to be kept.

    Strings are found by reading them: they are no mere elements.
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
    """The layout of the last message of each type and length, within bounds. Used by any thread."""

    def __init__(self) -> None:
        self._kept: dict[tuple[type[Message], int], Layout] = {}
        self._size_bytes = 0
        self._lock = threading.Lock()

    def find(self, message_type: type[Message], data: bytes) -> Layout | None:
        """The layout of a message but for its header; None where it is not known."""
        layout = self._kept.get((message_type, len(data)))
        return layout if layout is not None and layout.fits(data) else None

    def keep(self, message_type: type[Message], size_bytes: int, layout: Layout) -> None:
        """Keeps a layout for messages of so many bytes."""
        key = message_type, size_bytes
        with self._lock:
            replaced = self._kept.pop(key, None)
            self._kept[key] = layout
            self._size_bytes += layout.size_bytes - (replaced.size_bytes if replaced else 0)
            while self._size_bytes > _MAX_TOTAL_BYTES:
                self._size_bytes -= self._kept.pop(next(iter(self._kept))).size_bytes
