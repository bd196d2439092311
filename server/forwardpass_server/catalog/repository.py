"""The model repository: the folder `NAME/VERSION/` that says which models there are."""

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
"""What a model may be called."""

MAX_VERSION = 2**63 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """What one look at a repository found.

    models: the names of the folders that can be listed and are named like a model, in order.
    sources: every version of them, by name and version.
    unreadable: the names of folders that exist and cannot be read now; what was known of them may still be there.
    passed_over: a sentence for each thing that an operator may have taken for a model or a version.
    """

    models: tuple[str, ...]
    sources: tuple[ModelSource, ...]
    unreadable: frozenset[str]
    passed_over: tuple[str, ...]


def scan(folder: pathlib.Path, level: int = logging.WARNING) -> list[ModelSource]:
    """The sources of `look`; each thing that it passed over is logged at `level`. Raises OSError."""
    contents = look(folder)
    for sentence in contents.passed_over:
        _LOGGER.log(level, "%s", sentence)
    return list(contents.sources)


def look(folder: pathlib.Path) -> Contents:
    """Everything that a repository holds.

    What cannot be read, and what is no model or version, is passed over: a folder that belongs to somebody else
    (lost+found, another team's) must not stop the others from being served. Names that begin with a dot are ignored.
    Raises OSError where the repository itself cannot be listed.
    """
    found = _Look(folder)
    for path in visible(folder):
        found.take_model(path)
    sources = sorted(found.sources, key=lambda source: (source.name, source.version))
    return Contents(tuple(found.models), tuple(sources), frozenset(found.unreadable), tuple(found.passed_over))


class _Look:
    """Collects what `Contents` holds."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self.models: list[str] = []
        self.sources: list[ModelSource] = []
        self.unreadable: set[str] = set()
        self.passed_over: list[str] = []

    def take_model(self, path: pathlib.Path) -> None:
        try:
            if not _is_folder(path):
                # Files beside the models are common (a README); a broken link was meant to be something.
                if path.is_symlink() and not path.exists():
                    self._pass_over(path, "it is a link to nothing")
                return
            versions = visible(path)
        except OSError as error:
            self._pass_over_unreadable(path, path.name, error)
            return
        if not MODEL_NAME.fullmatch(path.name):
            self._pass_over(path, f"expected a model name like {MODEL_NAME.pattern}")
            return
        self.models.append(path.name)
        for version in versions:
            self._take_version(path.name, version)

    def _take_version(self, model: str, path: pathlib.Path) -> None:
        is_version = re.fullmatch(r"[1-9][0-9]*", path.name) and int(path.name) <= MAX_VERSION
        try:
            is_folder = _is_folder(path)
        except OSError as error:
            self._pass_over_unreadable(path, model, error)
            return
        if is_folder and is_version:
            self.sources.append(ModelSource(model, int(path.name), folder=path))
        elif is_folder:
            self._pass_over(path, f"expected a version, an integer from 1 to {MAX_VERSION}")
        elif is_version:
            found = "a link to nothing" if path.is_symlink() and not path.exists() else "a file"
            self._pass_over(path, f"expected a folder, found {found}")

    def _pass_over_unreadable(self, path: pathlib.Path, model: str, error: OSError) -> None:
        self.unreadable.add(model)
        self._pass_over(path, f"it cannot be read ({error.strerror})")

    def _pass_over(self, path: pathlib.Path, reason: str) -> None:
        self.passed_over.append(f"model repository: {path.relative_to(self._folder)} is passed over: {reason}")


def visible(folder: pathlib.Path) -> list[pathlib.Path]:
    """What is in a folder, in order, without names that begin with a dot. Raises OSError.

    Other programs write such names: a Mac .DS_Store and ._model.keras, NFS .nfs files, a kubelet ..data.
    """
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_folder(path: pathlib.Path) -> bool:
    """Whether a path is a folder, or a link to one. Raises OSError where that cannot be found out."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


def from_factories(factories: Mapping[str, str]) -> list[ModelSource]:
    """Models that Python functions make: `module:function` by name. Each is version 1."""
    return [ModelSource(name, 1, factory=factory) for name, factory in sorted(factories.items())]


FileStates: TypeAlias = frozenset[tuple[str, int, int, int]]
"""Of each file of a folder: its path in there, and its size in bytes, time of change in ns and inode."""


def file_states(folder: pathlib.Path) -> FileStates:
    """What tells the files of a folder from those that were there before, or will be, without reading them.

    The inode is that of the file which a link leads to: volumes of Kubernetes swap links. Raises OSError where a file
    comes or goes meanwhile.
    """
    states = ((path.relative_to(folder).as_posix(), path.stat()) for path in files_in(folder))
    return frozenset((path, state.st_size, state.st_mtime_ns, state.st_ino) for path, state in states)


def files_in(folder: pathlib.Path, level: int = logging.DEBUG) -> Iterator[pathlib.Path]:
    """Every file of a folder and of those in it, without names that begin with a dot.

    Links are followed; a folder that is met again is passed over. A folder below that may not be read (the lost+found
    of a volume) is passed over too, and logged at `level`: no model can be loaded from there either.
    Raises OSError where the folder itself cannot be listed.
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
                _LOGGER.log(level, "model repository: %s is passed over: it cannot be read (%s)", path, error.strerror)
                continue
            yield from _files_in(inside, visited, level)
