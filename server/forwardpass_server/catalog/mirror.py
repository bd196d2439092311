"""A local copy of a model repository with a URL: the versions that are served, each complete and verified."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Collection, Mapping
from typing import TextIO

from forwardpass_server.catalog import upload, version_policy
from forwardpass_server.catalog.repository import MAX_VERSION, MODEL_NAME
from forwardpass_server.catalog.upload import COMPLETE, FileContents
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.storage.objects import ObjectState, ObjectStore

_LOGGER = logging.getLogger(__name__)

_PREFIX = "forwardpass-models-"
_LOCK = ".lock"

# A folder without a lock that is younger may belong to a server that is about to lock it.
_STALE_S = 60.0

_FILES_AT_ONCE = 8
_PART_BYTES = 16 * 2**20

Version = tuple[str, int]
"""The name of a model, and a version."""

Objects = dict[str, ObjectState]
"""The objects of one folder, by their names in it."""


class RepositoryMirror:
    """Copies versions of a repository into a folder with the same structure. Thread-safe; the methods block.

    folder: NAME/VERSION is a link to the copy of a version, which is replaced in one step. It exists only if the copy
    is complete: its upload has ended (see `upload.COMPLETE`), and each file has the listed size and hash.

    Versions that no policy serves are copied only if they are loaded or asked for.
    """

    def __init__(self, store: ObjectStore, cache: pathlib.Path) -> None:
        """cache: the copies are in a new folder in this one, which `close` removes. Raises OSError."""
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX, dir=cache))
        self._lock_file = _locked(self.folder)
        self._copies = self.folder / ".versions"
        self._copies.mkdir()
        self._store = store
        self._turn = threading.Lock()
        # The state of COMPLETE at the copy of each version.
        self._copied: dict[Version, ObjectState] = {}
        # Copies that were replaced or removed: deleted at the next refresh, because a load may still read them.
        self._stale: list[pathlib.Path] = []
        # Versions that were asked for, and that have not been loaded since.
        self._asked: set[Version] = set()
        self._warnings: set[str] = set()

    @property
    def url(self) -> str:
        """The URL of the repository."""
        return self._store.url

    def close(self) -> None:
        """Removes the copies."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_file.close()

    def refresh(self, loaded: Collection[Version] = (), asked: Version | None = None) -> None:
        """Copies new and changed versions, and removes those that the repository has no more.

        loaded: versions whose copies stay although no policy serves them. asked: another version to copy; version 0 for
        the highest. A version that cannot be copied is logged, and tried again at the next refresh.
        Raises OSError if the repository cannot be listed, or is empty although it had versions.
        """
        with self._turn:
            for stale in self._stale:
                shutil.rmtree(stale, ignore_errors=True)
            self._stale.clear()
            models = self._listed()
            if self._copied and not any(versions for _, versions in models.values()):
                raise OSError(f"{self._store.url} is empty")
            warnings: set[str] = set()
            self._asked.difference_update(loaded)
            if asked is not None and asked[0] in models:
                highest = max((version for version, one in models[asked[0]][1].items() if COMPLETE in one), default=0)
                self._asked.add((asked[0], asked[1] or highest))
            kept = {*loaded, *self._asked}
            for name, (files, versions) in models.items():
                self._refresh_model(name, files, versions, kept, warnings)
            for name in {name for name, _ in self._copied} - models.keys():
                for version in [version for model, version in self._copied if model == name]:
                    self._remove((name, version))
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for sentence in sorted(warnings - self._warnings):
                _LOGGER.warning("model repository: %s", sentence)
            self._warnings = warnings

    def _listed(self) -> dict[str, tuple[Objects, dict[int, Objects]]]:
        """For each model the objects of its folder, and those of each version."""
        models: dict[str, tuple[Objects, dict[int, Objects]]] = {}
        for one in self._store.list():
            model, _, rest = one.name.partition("/")
            if not MODEL_NAME.fullmatch(model) or not upload.is_inside(rest):
                continue
            files, versions = models.setdefault(model, ({}, {}))
            version, _, name = rest.partition("/")
            if not name:
                files[rest] = one
            elif re.fullmatch(r"[1-9][0-9]*", version) and int(version) <= MAX_VERSION:
                versions.setdefault(int(version), {})[name] = one
        return models

    def _refresh_model(
        self,
        name: str,
        files: Objects,
        versions: Mapping[int, Objects],
        kept: Collection[Version],
        warnings: set[str],
    ) -> None:
        (self.folder / name).mkdir(exist_ok=True)
        complete = [version for version, objects in versions.items() if COMPLETE in objects]
        wanted = self._served(name, files, complete)
        wanted |= {version for model, version in kept if model == name}.intersection(complete)
        for version in sorted(versions.keys() - set(complete)):
            warnings.add(f"{name}/{version} is skipped: it has no {COMPLETE}, so its upload has not ended")
        for version in sorted(wanted):
            state = versions[version][COMPLETE]
            if self._copied.get((name, version)) != state:
                try:
                    self._copy((name, version), versions[version], state)
                except (OSError, ModelLoadError) as error:
                    warnings.add(f"{name}/{version} cannot be copied, and is tried again: {error}")
        for version in [version for model, version in self._copied if model == name]:
            # A version whose upload is being replaced stays until it is complete again.
            if version not in wanted and (version in complete or version not in versions):
                self._remove((name, version))

    def _served(self, name: str, files: Objects, versions: Collection[int]) -> set[int]:
        """The versions that the model's policy serves. Copies the policy."""
        path = self.folder / name / version_policy.FILE
        if version_policy.FILE not in files:
            path.unlink(missing_ok=True)
            return set(versions)
        text = self._store.read(f"{name}/{version_policy.FILE}")
        if not path.exists() or path.read_bytes() != text:
            new = self._copies / version_policy.FILE
            new.write_bytes(text)
            new.replace(path)
        try:
            return version_policy.parse(text).served(versions)
        except ModelLoadError:
            # The reader of the copy reports it and keeps the former policy.
            return {version for model, version in self._copied if model == name}.intersection(versions)

    def _copy(self, version: Version, objects: Objects, state: ObjectState) -> None:
        """Copies a version and puts it in place. Raises OSError, or ModelLoadError for files that are not as listed."""
        prefix = f"{version[0]}/{version[1]}/"
        listed = upload.parse(self._store.read(prefix + COMPLETE))
        names = [name for name in objects if name != COMPLETE] if listed is None else list(listed)
        copy = pathlib.Path(tempfile.mkdtemp(dir=self._copies))
        began = time.monotonic()
        try:
            with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
                sizes = [
                    threads.submit(
                        self._copy_file, prefix + name, copy / name, objects.get(name), (listed or {}).get(name)
                    )
                    for name in names
                ]
                size_bytes = sum(size.result() for size in sizes)
            after = {one.name.removeprefix(prefix): one for one in self._store.list(prefix)}
            if {name: one for name, one in after.items() if upload.is_inside(name)} != objects:
                raise ModelLoadError("it was changed while it was copied")
            link = self.folder / version[0] / str(version[1])
            new = self._copies / "link"
            new.unlink(missing_ok=True)
            new.symlink_to(copy.resolve(), target_is_directory=True)
            if link.is_symlink():
                self._stale.append(link.resolve())
            new.replace(link)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise
        self._copied[version] = state
        _LOGGER.info(
            "model repository: %s/%d copied: %d bytes in %.1f s", *version, size_bytes, time.monotonic() - began
        )

    def _copy_file(self, name: str, path: pathlib.Path, state: ObjectState | None, listed: FileContents | None) -> int:
        """Copies an object. listed: what its file should hold; None if that is not known. Returns its size in bytes."""
        if state is None:
            raise ModelLoadError(f"{name} is listed in {COMPLETE}, and does not exist")
        path.parent.mkdir(parents=True, exist_ok=True)
        hasher = hashlib.sha256()
        position = 0
        with path.open("wb") as file:
            while position < state.size_bytes:
                part = memoryview(bytearray(min(_PART_BYTES, state.size_bytes - position)))
                part = part[: self._store.read_into(name, position, part)]
                if not part:
                    break
                hasher.update(part)
                file.write(part)
                position += len(part)
        found = FileContents(position, hasher.hexdigest())
        expected = listed or FileContents(state.size_bytes, found.sha256)
        if found != expected:
            raise ModelLoadError(f"{name}: expected {_text(expected)}, got {_text(found)}")
        return position

    def _remove(self, version: Version) -> None:
        link = self.folder / version[0] / str(version[1])
        del self._copied[version]
        with contextlib.suppress(FileNotFoundError):
            self._stale.append(link.resolve())
            link.unlink()


def _text(contents: FileContents) -> str:
    return f"{contents.size_bytes} bytes with the SHA-256 {contents.sha256}"


def _locked(folder: pathlib.Path) -> TextIO:
    """Locks a folder until the file that is returned is closed, or the process ends. Raises OSError."""
    file = (folder / _LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _remove_stale(cache: pathlib.Path) -> None:
    """Removes the copies of servers that were killed."""
    for folder in cache.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            state = folder.lstat()
            if state.st_uid == os.getuid() and time.time() - state.st_mtime > _STALE_S:
                with _locked(folder):
                    shutil.rmtree(folder)
