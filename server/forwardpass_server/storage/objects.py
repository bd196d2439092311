"""Objects below a URL: what a store of objects offers, and how its failures are classified."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from typing import Any, Protocol

_REASONS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "full"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "denied"),
}


class StoreUnreachable(OSError):
    """A store that does not answer, or not in time."""


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectState:
    """An object without its contents.

    name: relative to the URL, with "/" between its parts. modified: when it was written, in seconds since 1970 by the
    clock of the store. tag: differs when the contents differ, as far as the store can tell; "" if it gives none.
    """

    name: str
    size_bytes: int
    modified: float
    tag: str = ""


class ObjectStore(Protocol):
    """Objects by name below one URL. Thread-safe; each method blocks.

    No method shows a partial object: an object has all its contents from the moment at which it has its name.
    Each method raises StoreUnreachable, PermissionError, or another OSError.
    """

    @property
    def url(self) -> str:
        """The URL, without credentials."""

    def open(self) -> None:
        """Checks that the objects can be listed. Raises FileNotFoundError for a bucket that does not exist."""

    def read(self, name: str) -> bytes:
        """The contents of an object. Raises FileNotFoundError."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """Reads the bytes from `start` on into a buffer. Returns their number: less than the buffer at the end.

        Raises FileNotFoundError.
        """

    def write(self, name: str, data: Any) -> None:
        """Writes an object, or replaces it. data: a contiguous buffer of bytes."""

    def remove(self, name: str) -> None:
        """Deletes an object. Does nothing if it does not exist."""

    def state(self, name: str) -> ObjectState | None:
        """The state of an object; None if it does not exist."""

    def list(self, prefix: str = "") -> Iterator[ObjectState]:
        """The objects below a prefix that ends with "/", or all. Without unfinished ones."""

    def unfinished(self) -> Iterator[ObjectState]:
        """Unfinished objects that an interrupted writer has left, where `remove` can delete them by their names."""


def reason(error: Exception) -> str:
    """Classifies a failure, as a label of few values for metrics.

    "unreachable": the store does not answer. "full": it has no space, or a quota is reached. "denied": it is read-only,
    or permission is missing. "error": other.
    """
    if isinstance(error, StoreUnreachable):
        return "unreachable"
    if isinstance(error, PermissionError):
        return "denied"
    return _REASONS.get(error.errno or 0, "error") if isinstance(error, OSError) else "error"
