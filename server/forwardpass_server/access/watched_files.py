"""What files say, read again when they change."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_LOGGER = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")


class WatchedFiles(Generic[ValueT]):
    """The value that files stand for. What cannot be read never takes the place of what could.

    read: makes the value of the files' contents; raises ValueError or OSError for what it should not be.
    Raises what `read` raises, at first. From then on `value` is always the last good one.
    """

    def __init__(self, paths: Sequence[pathlib.Path], read: Callable[[Sequence[bytes]], ValueT]) -> None:
        self._paths = paths
        self._read = read
        self._complaint: str | None = None
        self._contents = self._read_contents()
        self.value = self._read_whole(self._contents)

    @property
    def are_good(self) -> bool:
        """Whether `value` is what the files said when they were last looked at."""
        return self._complaint is None

    def refresh(self) -> None:
        """Reads the files, and their value anew if they have changed. To be called every second or so, by one thread.

        Their contents are compared, not their times: a volume of Kubernetes swaps links, and a clock's tick may hide
        the second of two changes.
        """
        try:
            contents = self._read_contents()
            if contents == self._contents and self.are_good:
                return
            self._contents = contents
            self.value = self._read_whole(contents)
        except Exception as error:  # Whatever it is: who watches must not end by it.
            # Said once of each state of the files, and not each second.
            if str(error) != self._complaint:
                self._complaint = str(error)
                _LOGGER.error("kept as it was, for it cannot be read: %s: %s", self._names(), error)
        else:
            self._complaint = None
            _LOGGER.info("read again: %s", self._names())

    def _read_contents(self) -> Sequence[bytes]:
        return tuple(path.read_bytes() for path in self._paths)

    def _read_whole(self, contents: Sequence[bytes]) -> ValueT:
        value = self._read(contents)
        if self._read_contents() != contents:
            raise OSError("it changed while it was read")
        return value

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))
