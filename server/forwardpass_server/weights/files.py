"""Sets of weights in a folder on disk: they outlive the process and eviction from the device."""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator

from forwardpass import v1
from forwardpass.wire import errors, fields, manifests, tensors
from forwardpass.wire.chunks import aligned_buffer
from forwardpass.wire.dtypes import Array
from forwardpass.wire.manifests import TensorManifest, WeightsManifest

_LOGGER = logging.getLogger(__name__)

_REASONS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "full"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "denied"),
}


class SetTooLarge(OSError):
    """A set that exceeds the limit of the folder, even if every other set is deleted."""


def reason(error: Exception) -> str:
    """Classifies a failure of the disk, as a label of few values for metrics.

    "limit": the set exceeds the limit of the folder. "full": the disk or its quota is full. "denied": the file system
    is read-only, or permission is missing. "corrupt": the contents of a tensor do not match its hash. "error": other.
    """
    if isinstance(error, SetTooLarge):
        return "limit"
    if isinstance(error, errors.TensorCorrupted):
        return "corrupt"
    return _REASONS.get(error.errno or 0, "error") if isinstance(error, OSError) else "error"


class WeightFiles:
    """A folder of sets, used by one server process. Thread-safe.

    tensors/DIGEST holds the elements of a tensor, stored once for all sets. sets/PRINCIPAL/ID holds a serialized
    WeightsManifest; PRINCIPAL is the SHA-256 of the principal's name. Each file is written to another folder and then
    renamed, so no partial file is visible. A file that a power failure damaged is detected by its size or its hash.

    max_bytes: the limit for all tensors. The least recently used sets are deleted to stay below it.
    Each method raises OSError if the disk fails.
    """

    # The threads of the event loop: a disk answers at once.
    threads = None

    def __init__(self, folder: pathlib.Path, max_bytes: int) -> None:
        self._tensors = folder / "tensors"
        self._sets = folder / "sets"
        self._new = folder / "new"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # The sets, least recently used first, and the number of sets that each tensor is part of.
        self._manifests: dict[pathlib.Path, WeightsManifest] = {}
        self._users: dict[bytes, int] = {}
        # The same number among the sets of one principal, by (name of the principal's folder, digest).
        self._held: collections.Counter[tuple[str, bytes]] = collections.Counter()
        self._size_bytes = 0
        shutil.rmtree(self._new, ignore_errors=True)
        for path in (self._tensors, self._sets, self._new):
            path.mkdir(parents=True, exist_ok=True)
        self._scan()

    @property
    def size_bytes(self) -> int:
        """The size of all tensors."""
        return self._size_bytes

    @property
    def set_count(self) -> int:
        """The number of sets."""
        return len(self._manifests)

    def has(self, principal: str, weights_id: bytes) -> bool:
        """Whether the folder holds a set. Does not access the disk."""
        return self._path(principal, weights_id) in self._manifests

    def save(self, principal: str, manifest: WeightsManifest, arrays: Iterable[tuple[TensorManifest, Array]]) -> None:
        """Writes a set, unless the folder holds it.

        arrays: each distinct tensor of the set with its elements, an array of shape `TensorManifest.shape`.
        Raises SetTooLarge, or OSError if the disk fails; the set is not stored then.
        """
        with self._lock:
            path = self._path(principal, manifest.weights_id)
            if path in self._manifests:
                return
            self._make_room(manifest)
            written = []
            try:
                path.parent.mkdir(exist_ok=True)
                for tensor, array in arrays:
                    target = self._tensor_path(tensor.digest)
                    # A tensor that only other principals hold is written again: otherwise the time of the call would
                    # reveal that another principal holds it.
                    if not self._held[path.parent.name, tensor.digest]:
                        if tensor.digest not in self._users:
                            written.append(target)
                        self._write(target, tensors.element_bytes(array, tensor.spec.data_type))
                self._write(path, manifests.encode(manifest).SerializeToString(deterministic=True))
            except OSError:
                for target in written:
                    target.unlink(missing_ok=True)
                raise
            self._add(path, manifest)

    def manifest(self, principal: str, weights_id: bytes) -> WeightsManifest:
        """The manifest of a set. Marks the set as used now. Raises FileNotFoundError."""
        with self._lock:
            path = self._path(principal, weights_id)
            manifest = self._manifests.pop(path, None)
            if manifest is None:
                raise FileNotFoundError(path)
            self._manifests[path] = manifest
            # A full or read-only disk can still be read. Without the new time, only the order of use after a restart
            # is wrong.
            with contextlib.suppress(OSError):
                os.utime(path)
            return manifest

    def tensors(
        self, principal: str, weights_id: bytes, wanted: Iterable[TensorManifest]
    ) -> Iterator[tuple[TensorManifest, Array]]:
        """Tensors of a set with their elements: see `tensor`, which it calls for each."""
        return ((tensor, self.tensor(tensor)) for tensor in wanted)

    def tensor(self, manifest: TensorManifest) -> Array:
        """The elements of a tensor, an array of shape `manifest.shape`.

        Raises TensorCorrupted if the contents do not match the hash, or OSError. Every set that holds the tensor is
        then deleted, so that a client can put it again.
        """
        try:
            return self._tensor(manifest)
        except (OSError, errors.TensorCorrupted):
            with self._lock:
                for path in [path for path, one in self._manifests.items() if manifest.digest in one.distinct]:
                    self._delete(path)
            raise

    def _tensor(self, manifest: TensorManifest) -> Array:
        path = self._tensor_path(manifest.digest)
        data = aligned_buffer(manifest.size_bytes)
        with path.open("rb") as file:
            file.readinto(data.data)
        hasher = manifests.hasher_of(manifest.spec)
        hasher.update(data.data)
        if hasher.digest() != manifest.digest:
            raise errors.TensorCorrupted(
                place=str(path), expected=f"the hash {manifest.digest.hex()}", found=hasher.hexdigest()
            )
        return manifest.decode(data, "tensor")

    def delete(self, principal: str, weights_id: bytes) -> None:
        """Deletes a set, and the tensors that belong to no other set."""
        with self._lock:
            self._delete(self._path(principal, weights_id))

    def _path(self, principal: str, weights_id: bytes) -> pathlib.Path:
        return self._sets / hashlib.sha256(principal.encode()).hexdigest() / weights_id.hex()

    def _tensor_path(self, digest: bytes) -> pathlib.Path:
        return self._tensors / digest.hex()

    def _write(self, path: pathlib.Path, data: bytes | memoryview) -> None:
        handle, temporary = tempfile.mkstemp(dir=self._new)
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError:
            pathlib.Path(temporary).unlink(missing_ok=True)
            raise

    def _scan(self) -> None:
        """Indexes the sets that an earlier process left, in time linear in files and in tensors of manifests.

        Deletes a set that cannot be read or lacks a tensor, and every tensor that belongs to no set.
        """
        # One listing serves all sets: thousands of sets may share a tensor.
        with os.scandir(self._tensors) as entries:
            sizes = {entry.name: _size_bytes(entry) for entry in entries}
        for path in sorted(self._sets.glob("*/*"), key=lambda path: path.stat().st_mtime):
            try:
                manifest = manifests.decode(fields.parse(v1.WeightsManifest, path.read_bytes()))
                if manifest.weights_id.hex() != path.name:
                    raise errors.InvalidRequest(place=str(path), expected=path.name, found=manifest.weights_id.hex())
                for tensor in manifest.distinct.values():
                    if sizes.get(tensor.digest.hex()) != tensor.size_bytes:
                        raise FileNotFoundError(f"tensor {tensor.digest.hex()} is missing or has another size")
            except (OSError, errors.InvalidRequest) as error:
                _LOGGER.warning("weights on disk: set %s is skipped and deleted: %s", path.name, error)
                path.unlink(missing_ok=True)
            else:
                self._add(path, manifest)
        used = {digest.hex() for digest in self._users}
        for name in sizes.keys() - used:
            (self._tensors / name).unlink()

    def _add(self, path: pathlib.Path, manifest: WeightsManifest) -> None:
        self._manifests[path] = manifest
        for digest, tensor in manifest.distinct.items():
            if digest not in self._users:
                self._size_bytes += tensor.size_bytes
            self._users[digest] = self._users.get(digest, 0) + 1
            self._held[path.parent.name, digest] += 1

    def _delete(self, path: pathlib.Path) -> None:
        manifest = self._manifests.pop(path, None)
        if manifest is None:
            return
        unused = [path]
        for digest, tensor in manifest.distinct.items():
            self._users[digest] -= 1
            self._held[path.parent.name, digest] -= 1
            if not self._held[path.parent.name, digest]:
                del self._held[path.parent.name, digest]
            if not self._users[digest]:
                del self._users[digest]
                self._size_bytes -= tensor.size_bytes
                unused.append(self._tensor_path(digest))
        # Last, when all counts are updated: the deletion may fail.
        for file in unused:
            file.unlink(missing_ok=True)

    def _make_room(self, manifest: WeightsManifest) -> None:
        new_bytes = sum(one.size_bytes for digest, one in manifest.distinct.items() if digest not in self._users)
        if new_bytes > self._max_bytes:
            raise SetTooLarge(
                f"the folder may hold at most {self._max_bytes} bytes (--weights-disk-mib), and the set has {new_bytes}"
            )
        while self._size_bytes + new_bytes > self._max_bytes:
            self._delete(next(iter(self._manifests)))


def _size_bytes(entry: os.DirEntry[str]) -> int | None:
    """The size of a file; None if it cannot be read, for example a broken link."""
    try:
        return entry.stat().st_size
    except OSError:
        return None
