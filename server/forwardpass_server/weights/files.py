"""Sets of weights in a folder: what the device has no room for, and what outlives the process."""

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
from collections.abc import Iterable

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
    """A set that the folder may not hold, however much else is deleted."""


def reason(error: Exception) -> str:
    """Why the disk did not do what it should, in a word that there are few of.

    "limit": a set is larger than the folder may be. "full": the disk is. "denied": it is read-only, or not ours.
    "corrupt": a tensor has another hash. "error": anything else.
    """
    if isinstance(error, SetTooLarge):
        return "limit"
    if isinstance(error, errors.TensorCorrupted):
        return "corrupt"
    return _REASONS.get(error.errno or 0, "error") if isinstance(error, OSError) else "error"


class WeightFiles:
    """A folder of sets, for one server process. Any number of threads may call at once.

    tensors/DIGEST holds a tensor's elements, once for all sets; sets/PRINCIPAL/ID a serialized WeightsManifest, with
    the SHA-256 of the principal's name for PRINCIPAL. Every file is written elsewhere and renamed: there are none in
    part. What a power cut leaves of a file shows in its hash.
    max_bytes: of tensors; the sets that were used least recently are deleted to stay below.
    Raises OSError wherever the disk does.
    """

    def __init__(self, folder: pathlib.Path, max_bytes: int) -> None:
        self._tensors = folder / "tensors"
        self._sets = folder / "sets"
        self._new = folder / "new"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # Sets by when they were used, the oldest first; and in how many of them each tensor stands.
        self._manifests: dict[pathlib.Path, WeightsManifest] = {}
        self._users: dict[bytes, int] = {}
        # The same for the sets of one principal: by the name of its folder, and the tensor.
        self._held: collections.Counter[tuple[str, bytes]] = collections.Counter()
        self._size_bytes = 0
        shutil.rmtree(self._new, ignore_errors=True)
        for path in (self._tensors, self._sets, self._new):
            path.mkdir(parents=True, exist_ok=True)
        self._scan()

    @property
    def size_bytes(self) -> int:
        """What the tensors take."""
        return self._size_bytes

    @property
    def set_count(self) -> int:
        return len(self._manifests)

    def has(self, principal: str, weights_id: bytes) -> bool:
        """Whether a set is there. Reads nothing from the disk."""
        return self._path(principal, weights_id) in self._manifests

    def save(self, principal: str, manifest: WeightsManifest, arrays: Iterable[tuple[TensorManifest, Array]]) -> None:
        """Keeps a set. arrays: each distinct tensor of it with its elements."""
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
                    # What only other principals have is written once more: else the time it takes would tell of it.
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
        """What a set is made of; it counts as used now. Raises FileNotFoundError."""
        with self._lock:
            path = self._path(principal, weights_id)
            manifest = self._manifests.pop(path, None)
            if manifest is None:
                raise FileNotFoundError(path)
            self._manifests[path] = manifest
            # A disk that takes nothing more may still be read: only the order after a restart suffers.
            with contextlib.suppress(OSError):
                os.utime(path)
            return manifest

    def tensor(self, manifest: TensorManifest) -> Array:
        """A tensor's elements. Raises TensorCorrupted where they have another hash, and OSError.

        No set with that tensor is there any more then: it can be put again.
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
        """Deletes a set, and the tensors that stand in no other."""
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
        """Takes up what an earlier process left. What cannot be read is deleted, and tensors that stand in no set."""
        for path in sorted(self._sets.glob("*/*"), key=lambda path: path.stat().st_mtime):
            try:
                manifest = manifests.decode(fields.parse(v1.WeightsManifest, path.read_bytes()))
                if manifest.weights_id.hex() != path.name:
                    raise errors.InvalidRequest(place=str(path), expected=path.name, found=manifest.weights_id.hex())
                for tensor in manifest.distinct.values():
                    if self._tensor_path(tensor.digest).stat().st_size != tensor.size_bytes:
                        raise FileNotFoundError(tensor.digest.hex())
            except (OSError, errors.InvalidRequest) as error:
                _LOGGER.warning("weights on disk: %s is left out: %s", path.name, error)
                path.unlink(missing_ok=True)
            else:
                self._add(path, manifest)
        for path in self._tensors.iterdir():
            if path.name not in {digest.hex() for digest in self._users}:
                path.unlink()

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
        # After all counts are right: a disk may refuse.
        for file in unused:
            file.unlink(missing_ok=True)

    def _make_room(self, manifest: WeightsManifest) -> None:
        new_bytes = sum(one.size_bytes for digest, one in manifest.distinct.items() if digest not in self._users)
        if new_bytes > self._max_bytes:
            raise SetTooLarge(f"{new_bytes} bytes are more than the folder may hold, {self._max_bytes}")
        while self._size_bytes + new_bytes > self._max_bytes:
            self._delete(next(iter(self._manifests)))
