"""The model repository: a folder NAME/VERSION/ for each version of each model."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from forwardpass_server.calls.model import ModelSource

_LOGGER = logging.getLogger(__name__)

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""The names that a model may have."""

MAX_VERSION = 2**63 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a repository at one moment.

    models: the names of the readable folders with a valid model name, in order.
    sources: every version of these models, ordered by name and version.
    unreadable: the names of model folders that exist but cannot be read now; their versions may still exist.
    skipped: a sentence for each entry that is not a model or version, if an operator may have intended it as one.
    """

    models: tuple[str, ...]
    sources: tuple[ModelSource, ...]
    unreadable: frozenset[str]
    skipped: tuple[str, ...]


def scan(folder: pathlib.Path, level: int = logging.WARNING) -> list[ModelSource]:
    """The versions in a repository. Skipped entries are logged at `level`. Raises OSError."""
    contents = look(folder)
    for sentence in contents.skipped:
        _LOGGER.log(level, "%s", sentence)
    return list(contents.sources)


def look(folder: pathlib.Path) -> Contents:
    """Lists a repository.

    Entries that cannot be read or are no model or version are skipped: an unrelated folder (lost+found, that of another
    team) must not prevent the others from being served. Names that begin with a dot are ignored.
    Raises OSError if the repository itself cannot be listed.
    """
    found = _Look(folder)
    for path in visible(folder):
        found.take_model(path)
    sources = sorted(found.sources, key=lambda source: (source.name, source.version))
    return Contents(tuple(found.models), tuple(sources), frozenset(found.unreadable), tuple(found.skipped))


class _Look:
    """Collects the fields of `Contents`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self.models: list[str] = []
        self.sources: list[ModelSource] = []
        self.unreadable: set[str] = set()
        self.skipped: list[str] = []

    def take_model(self, path: pathlib.Path) -> None:
        """Adds one entry of the repository folder."""
        try:
            if not _is_folder(path):
                # A file beside the models, such as a README, is common and not reported; a broken link is a mistake.
                if path.is_symlink() and not path.exists():
                    self._skip(path, "it is a broken link")
                return
            versions = visible(path)
        except OSError as error:
            self._skip_unreadable(path, path.name, error)
            return
        if not MODEL_NAME.fullmatch(path.name):
            self._skip(path, f"expected a model name like {MODEL_NAME.pattern}")
            return
        self.models.append(path.name)
        for version in versions:
            self._take_version(path.name, version)

    def _take_version(self, model: str, path: pathlib.Path) -> None:
        is_version = re.fullmatch(r"[1-9][0-9]*", path.name) and int(path.name) <= MAX_VERSION
        try:
            is_folder = _is_folder(path)
        except OSError as error:
            self._skip_unreadable(path, model, error)
            return
        if is_folder and is_version:
            self.sources.append(ModelSource(model, int(path.name), folder=path))
        elif is_folder:
            self._skip(path, f"expected a version, an integer from 1 to {MAX_VERSION}")
        elif is_version:
            found = "a broken link" if path.is_symlink() and not path.exists() else "a file"
            self._skip(path, f"expected a folder, found {found}")

    def _skip_unreadable(self, path: pathlib.Path, model: str, error: OSError) -> None:
        self.unreadable.add(model)
        self._skip(path, f"it cannot be read ({error.strerror})")

    def _skip(self, path: pathlib.Path, reason: str) -> None:
        self.skipped.append(f"model repository: {path.relative_to(self._folder)} is skipped: {reason}")


def visible(folder: pathlib.Path) -> list[pathlib.Path]:
    """The entries of a folder, sorted, without names that begin with a dot. Raises OSError.

    Other programs write such names: macOS .DS_Store and ._model.keras, NFS .nfs files, a kubelet ..data.
    """
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_folder(path: pathlib.Path) -> bool:
    """Whether a path is a folder, or a link to one. Raises OSError if its state cannot be read."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


def from_factories(factories: Mapping[str, str]) -> list[ModelSource]:
    """The sources of models that Python functions create. factories: `module:function` by name. Each is version 1."""
    return [ModelSource(name, 1, factory=factory) for name, factory in sorted(factories.items())]


FileStates: TypeAlias = frozenset[tuple[str, int, int, int]]
"""For each file of a folder: its relative path, size in bytes, modification time in ns, and inode."""


def file_states(folder: pathlib.Path) -> FileStates:
    """The states of all files in a folder. They differ when a file has changed; no file is read.

    The inode is that of the target of a link: volumes of Kubernetes swap links. Raises OSError if a file disappears
    meanwhile.
    """
    states = ((path.relative_to(folder).as_posix(), path.stat()) for path in files_in(folder))
    return frozenset((path, state.st_size, state.st_mtime_ns, state.st_ino) for path, state in states)


def files_in(folder: pathlib.Path, level: int = logging.DEBUG) -> Iterator[pathlib.Path]:
    """Every file of a folder and its subfolders, without names that begin with a dot.

    Links are followed; each folder is visited once. A subfolder without read permission (the lost+found of a volume) is
    skipped, and logged at `level`: no model can be loaded from it either.
    Raises OSError if the folder itself cannot be listed.
    """
    yield from _files_in(visible(folder), {folder.resolve()}, level)


def _files_in(paths: Sequence[pathlib.Path], visited: set[pathlib.Path], level: int) -> Iterator[pathlib.Path]:
    for path in paths:
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in visited:
            visited.add(path.resolve())
            try:
                inside = visible(path)
            except PermissionError as error:
                _LOGGER.log(level, "model repository: %s is skipped: it cannot be read (%s)", path, error.strerror)
                continue
            yield from _files_in(inside, visited, level)
