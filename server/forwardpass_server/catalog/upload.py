"""Uploads of versions to a model repository with a URL, and the object that says that one is complete."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from forwardpass_server.catalog import repository
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.storage.objects import ObjectStore

COMPLETE = "forwardpass-complete.json"
"""The name of the object in a version's folder that is written last. A version without it is not served.

It is empty, or `{"files": {"saved_model.pb": {"size_bytes": 1024, "sha256": "..."}}}` with every file of the version.
"""

_FILES_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, slots=True)
class FileContents:
    """The size of a file, and its SHA-256 in hexadecimal."""

    size_bytes: int
    sha256: str


def upload(folder: pathlib.Path, store: ObjectStore) -> list[str]:
    """Uploads a version's folder to the root of a store, and marks it as complete. Returns the names of its files.

    A version that is there is replaced; servers use it again when it is complete. Raises ModelLoadError for a folder
    without files, and OSError.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in repository.files_in(folder))
    names = [name for name in names if name != COMPLETE]
    if not names:
        raise ModelLoadError(f"{folder}: expected the folder of a version, found no files")
    store.remove(COMPLETE)
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        contents = list(threads.map(lambda name: _upload(folder / name, store, name), names))
    files = {name: dataclasses.asdict(one) for name, one in zip(names, contents, strict=True)}
    store.write(COMPLETE, json.dumps({"files": files}).encode())
    return names


def _upload(path: pathlib.Path, store: ObjectStore, name: str) -> FileContents:
    data = path.read_bytes()
    store.write(name, data)
    return FileContents(len(data), hashlib.sha256(data).hexdigest())


def parse(text: bytes) -> Mapping[str, FileContents] | None:
    """The files that a COMPLETE object lists; None for an empty one. Raises ModelLoadError for another content."""
    if not text.strip():
        return None
    try:
        return {_checked(name): FileContents(**contents) for name, contents in json.loads(text)["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelLoadError(f"{COMPLETE}: expected it to be empty or to list files: {error!r}") from None


def _checked(name: Any) -> str:
    """A name that stays inside the version's folder."""
    if not is_inside(name):
        raise ValueError(f"{name!r} is no relative path")
    return str(name)


def is_inside(name: str) -> bool:
    """Whether a name is a relative path without `..`, and without names that begin with a dot."""
    return all(part and not part.startswith(".") for part in name.split("/")) and "\\" not in name
