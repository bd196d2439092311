"""Objects in a folder of a volume that several servers share: `file://`."""

from __future__ import annotations

import io
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from forwardpass_server.storage.objects import ObjectState, StoreUnreachable

# Unfinished files. On the same file system, because a rename is atomic there only.
_NEW = ".new"


class FolderObjects:
    """See `ObjectStore`. Each file is written under another name and then renamed, so no partial file is visible.

    A file that a power failure damaged may be visible: callers compare a hash.
    """

    def __init__(self, folder: pathlib.Path, is_written: bool) -> None:
        """is_written: whether this process writes objects. Otherwise no permission to write is needed."""
        self._folder = folder
        self._is_written = is_written

    @property
    def url(self) -> str:
        """See `ObjectStore`."""
        return self._folder.as_uri()

    def open(self) -> None:
        """Creates the folder where it does not exist, if this process writes. See `ObjectStore`."""
        if self._is_written:
            (self._folder / _NEW).mkdir(parents=True, exist_ok=True)
        self._check_mounted()

    def read(self, name: str) -> bytes:
        """See `ObjectStore`."""
        with self._open(name) as file:
            return file.read()

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """See `ObjectStore`."""
        with self._open(name) as file:
            file.seek(start)
            return file.readinto(buffer)

    def _open(self, name: str) -> io.BufferedReader:
        try:
            return (self._folder / name).open("rb")
        except FileNotFoundError:
            self._check_mounted()
            raise

    def _check_mounted(self) -> None:
        """Raises StoreUnreachable if the folder is missing: then no object is known to be missing."""
        # A mount point exists without its volume, too.
        expected = self._folder / _NEW if self._is_written else self._folder
        if not expected.is_dir():
            raise StoreUnreachable(f"there is no folder {expected}: is the volume mounted?")

    def write(self, name: str, data: Any) -> None:
        """See `ObjectStore`."""
        path = self._folder / name
        self._check_mounted()
        handle, temporary = tempfile.mkstemp(dir=self._folder / _NEW)
        try:
            with open(handle, "wb") as file:
                file.write(data)
            try:
                os.replace(temporary, path)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, path)
        except OSError:
            pathlib.Path(temporary).unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        """See `ObjectStore`."""
        (self._folder / name).unlink(missing_ok=True)

    def state(self, name: str) -> ObjectState | None:
        """See `ObjectStore`."""
        try:
            return _state(name, (self._folder / name).stat())
        except (FileNotFoundError, NotADirectoryError):
            self._check_mounted()
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectState]:
        """See `ObjectStore`. Without names that begin with a dot."""
        self._check_mounted()
        return _files_in(self._folder / prefix, prefix)

    def unfinished(self) -> Iterator[ObjectState]:
        """See `ObjectStore`."""
        return _files_in(self._folder / _NEW, f"{_NEW}/")


def _files_in(folder: pathlib.Path, prefix: str) -> Iterator[ObjectState]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        # Another server may remove a folder at any time, and files too.
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_in(folder / entry.name, f"{prefix}{entry.name}/")
            continue
        try:
            yield _state(prefix + entry.name, entry.stat())
        except FileNotFoundError:
            continue


def _state(name: str, stat: os.stat_result) -> ObjectState:
    return ObjectState(name, stat.st_size, stat.st_mtime, f"{stat.st_mtime_ns}-{stat.st_ino}")
