"""The model repository: the folder `NAME/VERSION/` that says which models there are."""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from forwardpass_server.serving.models import ModelSource

_LOGGER = logging.getLogger(__name__)

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a model may be called."""

MAX_VERSION = 2**63 - 1


def scan(folder: pathlib.Path, level: int = logging.WARNING) -> list[ModelSource]:
    """Every version of every model in a repository, by name and version.

    What is named otherwise is left, and logged at that level. Raises OSError.
    """
    sources = []
    for model in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not MODEL_NAME.fullmatch(model.name):
            _LOGGER.log(level, "model repository: %s is no model name, left out", model.name)
            continue
        for version in sorted(path for path in model.iterdir() if path.is_dir() and not path.name.startswith(".")):
            if not re.fullmatch(r"[1-9][0-9]*", version.name) or int(version.name) > MAX_VERSION:
                _LOGGER.log(level, "model repository: %s/%s is no version, left out", model.name, version.name)
                continue
            sources.append(ModelSource(model.name, int(version.name), folder=version))
    return sorted(sources, key=lambda source: (source.name, source.version))


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


def files_in(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every file of a folder and of those in it. Links are followed; a folder met again is passed over."""
    yield from _files_in(folder, {folder.resolve()})


def _files_in(folder: pathlib.Path, visited: set[pathlib.Path]) -> Iterator[pathlib.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in visited:
            visited.add(path.resolve())
            yield from _files_in(path, visited)
