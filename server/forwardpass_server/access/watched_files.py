"""Files that are reloaded when their contents change."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_LOGGER = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")


class WatchedFiles(Generic[ValueT]):
    """A value that is parsed from files and reloaded when they change. `value` is always the last valid one.

    read: parses the contents of the files; raises ValueError or OSError for invalid ones.
    The constructor raises what `read` raises.
    """

    def __init__(self, paths: Sequence[pathlib.Path], read: Callable[[Sequence[bytes]], ValueT]) -> None:
        self._paths = paths
        self._read = read
        self._failure: str | None = None
        self._contents = self._read_contents()
        self.value = self._read_whole(self._contents)

    @property
    def are_good(self) -> bool:
        """Whether the last reload succeeded, so that `value` is that of the present files."""
        return self._failure is None

    def refresh(self) -> None:
        """Reads the files, and parses them again if they have changed. Call it about once a second, on one thread.

        It compares contents, not modification times: a volume of Kubernetes swaps links, and two changes within one
        tick of the clock have the same time.
        """
        try:
            contents = self._read_contents()
            if contents == self._contents and self.are_good:
                return
            self._contents = contents
            self.value = self._read_whole(contents)
        except Exception as error:  # Any exception: the watching thread must not end.
            # Logged once for each failure, not once a second.
            if str(error) != self._failure:
                self._failure = str(error)
                _LOGGER.error("reload failed, the former contents stay in use: %s: %s", self._names(), error)
        else:
            self._failure = None
            _LOGGER.info("reloaded: %s", self._names())

    def _read_contents(self) -> Sequence[bytes]:
        return tuple(path.read_bytes() for path in self._paths)

    def _read_whole(self, contents: Sequence[bytes]) -> ValueT:
        value = self._read(contents)
        if self._read_contents() != contents:
            raise OSError("the file changed while it was being read")
        return value

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))
