"""Sets of weights in a store that several servers share: what one of them has put, each of them can read."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from forwardpass import v1
from forwardpass.wire import errors, fields, manifests, tensors
from forwardpass.wire.chunks import aligned_buffer
from forwardpass.wire.dtypes import Array
from forwardpass.wire.manifests import TensorManifest, WeightsManifest
from forwardpass_server.storage import objects
from forwardpass_server.storage.objects import ObjectStore, StoreUnreachable

_LOGGER = logging.getLogger(__name__)

T = TypeVar("T")

# Sets that are read or written at the same time. Each waits for the store, so more than cores are useful.
_SETS_AT_ONCE = 16

# Requests to the store at the same time, of all sets.
_REQUESTS_AT_ONCE = 32

# Requests of one set that wait for a thread: other sets get their turn between them.
_QUEUED_PER_SET = 8

# A large tensor is read in parts of this size, at the same time: one connection to S3 gives some 50 MB/s.
_PART_BYTES = 16 * 2**20

# How long the notice of a deletion stays in the store. Every running server reads the notices each few seconds.
_NOTICE_S = 15 * 60.0

GRACE_S = 24 * 3600.0
"""A sweep deletes a tensor without a set only if it was written so long ago: a set may be about to use it."""

Name = tuple[str, str]
"""A set by the names in the store: those of the principal's folder and of the set."""


class TierObserver(Protocol):
    """Receives the events of a tier."""

    def weights_tier_read(self, size_bytes: int, seconds: float) -> None:
        """The tensors of a set that the device lacked were read."""

    def weights_tier_written(self, size_bytes: int, seconds: float) -> None:
        """A set was written. size_bytes: of the tensors that were written for it."""

    def weights_tier_failed(self, operation: str, reason: str) -> None:
        """An operation failed ("read", "write", "delete" or "follow"). reason: see `objects.reason`, or "corrupt"."""


class WeightTier:
    """Sets of weights in an `ObjectStore`, for any number of servers. Thread-safe; the methods block.

    tensors/PRINCIPAL/DIGEST holds the elements of a tensor, stored once for all sets of a principal. sets/PRINCIPAL/ID
    holds a serialized WeightsManifest, and is written last. PRINCIPAL is the SHA-256 of the principal's name. So a set
    is visible only when it is complete, and a principal's sets and tensors have no names in common with those of
    others: nothing shows whether another principal holds the same weights.

    deleted/PRINCIPAL-ID is the notice of a deletion, for servers that hold the set on their device.

    Tensors are deleted by `weights.sweep` only: a server cannot know which sets others are writing.
    Each method raises WeightStoreUnavailable, and WeightStoreFull if the store has no space.
    """

    def __init__(self, store: ObjectStore, observer: TierObserver) -> None:
        self._store = store
        self._observer = observer
        self.threads = concurrent.futures.ThreadPoolExecutor(_SETS_AT_ONCE, "weight-tier")
        self._requests = concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE, "weight-tier-request")
        self._problem = ""
        self._followed = time.monotonic()
        # When each notice was first seen, by time.monotonic: independent of the clocks of the store and the servers.
        self._notices: dict[str, float] = {}

    @property
    def problem(self) -> str:
        """Why the store does not answer, for operators; "" if it does."""
        return self._problem

    def open(self) -> None:
        """Connects to the store. A store that does not answer is tried again by `follow`.

        Raises OSError if the store refuses this server, or does not exist.
        """
        try:
            self._store.open()
        except StoreUnreachable as error:
            self._note(error)

    def has(self, principal: str, weights_id: bytes) -> bool:
        """Whether the store holds a set of a principal."""
        return self._call("read", lambda: self._store.state(_set_name(principal, weights_id)) is not None)

    def save(self, principal: str, manifest: WeightsManifest, arrays: Iterable[tuple[TensorManifest, Array]]) -> None:
        """Writes a set. Tensors that this principal has in the store already are not written again.

        arrays: each distinct tensor of the set with its elements, an array of shape `TensorManifest.shape`.
        """
        began = time.monotonic()
        size_bytes = self._call("write", lambda: self._save(principal, manifest, arrays))
        self._observer.weights_tier_written(size_bytes, time.monotonic() - began)

    def _save(self, principal: str, manifest: WeightsManifest, arrays: Iterable[tuple[TensorManifest, Array]]) -> int:
        written = self._all(functools.partial(self._save_tensor, _folder(principal)), arrays)
        message = manifests.encode(manifest).SerializeToString(deterministic=True)
        self._store.write(_set_name(principal, manifest.weights_id), message)
        return sum(written)

    def _save_tensor(self, folder: str, item: tuple[TensorManifest, Array]) -> int:
        """Writes a tensor unless it is there. Returns the number of bytes written."""
        tensor, array = item
        name = _tensor_name(folder, tensor.digest)
        found = self._store.state(name)
        # An old tensor is written again, which makes it young: a sweep may have found no set of it.
        if found is not None and found.size_bytes == tensor.size_bytes and time.time() - found.modified < GRACE_S / 2:
            return 0
        self._store.write(name, tensors.element_bytes(array, tensor.spec.data_type))
        return tensor.size_bytes

    def manifest(self, principal: str, weights_id: bytes) -> WeightsManifest:
        """The manifest of a set. Raises FileNotFoundError, also for one that is damaged."""
        return self._call("read", lambda: self._manifest(_set_name(principal, weights_id), weights_id))

    def _manifest(self, name: str, weights_id: bytes) -> WeightsManifest:
        manifest = self._sound_manifest(name, weights_id) or self._sound_manifest(name, weights_id)
        if manifest is None:
            raise self._damaged(name, [name])
        return manifest

    def _sound_manifest(self, name: str, weights_id: bytes) -> WeightsManifest | None:
        """None for a damaged one."""
        try:
            manifest = manifests.decode(fields.parse(v1.WeightsManifest, self._store.read(name)))
        except errors.InvalidRequest:
            return None
        return manifest if manifest.weights_id == weights_id else None

    def tensors(
        self, principal: str, weights_id: bytes, wanted: Collection[TensorManifest]
    ) -> Iterator[tuple[TensorManifest, Array]]:
        """Tensors of a set with their elements, arrays of shape `TensorManifest.shape`; read at the same time.

        Raises FileNotFoundError if one is missing or does not match its hash. The set is then deleted, so that a
        client can put it again.
        """
        began = time.monotonic()
        buffers = self._call("read", lambda: self._read(principal, weights_id, wanted))
        self._observer.weights_tier_read(sum(tensor.size_bytes for tensor in wanted), time.monotonic() - began)
        for tensor in wanted:
            yield tensor, tensor.decode(buffers[tensor.digest], "tensor")

    def _read(self, principal: str, weights_id: bytes, wanted: Collection[TensorManifest]) -> dict[bytes, Array]:
        """The elements of tensors as on the wire, by digest."""
        folder = _folder(principal)
        buffers = self._buffers(folder, wanted)
        lost = [tensor for tensor in wanted if not _is_sound(tensor, buffers)]
        if lost:
            # Again: a connection may have ended in the middle, or a volume shows late what another server has written.
            buffers.update(self._buffers(folder, lost))
            lost = [tensor for tensor in lost if not _is_sound(tensor, buffers)]
        if lost:
            # The tensors too: the next put of the set would find them, and would not write them again.
            names = [_tensor_name(folder, tensor.digest) for tensor in lost]
            raise self._damaged(names[0], [_set_name(principal, weights_id), *names])
        return buffers

    def _buffers(self, folder: str, wanted: Collection[TensorManifest]) -> dict[bytes, Array]:
        """Reads tensors, in parts at the same time. A missing one gives zeros."""
        buffers = {tensor.digest: aligned_buffer(tensor.size_bytes) for tensor in wanted}
        parts = ((tensor, start) for tensor in wanted for start in range(0, max(tensor.size_bytes, 1), _PART_BYTES))
        self._all(lambda part: self._read_part(folder, buffers[part[0].digest], *part), parts)
        return buffers

    def _read_part(self, folder: str, buffer: Array, tensor: TensorManifest, start: int) -> None:
        part = buffer.data[start : start + _PART_BYTES]
        # A missing or short object leaves zeros, and so another hash.
        with contextlib.suppress(FileNotFoundError):
            self._store.read_into(_tensor_name(folder, tensor.digest), start, part)

    def _damaged(self, place: str, names: Iterable[str]) -> FileNotFoundError:
        """Deletes damaged objects. Returns the error to raise."""
        self._observer.weights_tier_failed("read", "corrupt")
        _LOGGER.error("weights in %s: %s is missing or damaged: its set is deleted", self._store.url, place)
        for name in names:
            self._store.remove(name)
        return FileNotFoundError(place)

    def known(self, principal: str, wanted: Iterable[TensorManifest]) -> dict[bytes, Array]:
        """The elements of those tensors that the principal has put with any set, by digest: see `tensors`."""

        def read() -> dict[bytes, Array]:
            folder = _folder(principal)
            there = [one for one in self._all(functools.partial(self._found, folder), wanted) if one is not None]
            buffers = self._buffers(folder, there)
            # A damaged one is uploaded, and written, again.
            return {one.digest: one.decode(buffers[one.digest], "tensor") for one in there if _is_sound(one, buffers)}

        return self._call("read", read)

    def _found(self, folder: str, tensor: TensorManifest) -> TensorManifest | None:
        state = self._store.state(_tensor_name(folder, tensor.digest))
        return tensor if state is not None and state.size_bytes == tensor.size_bytes else None

    def delete(self, principal: str, weights_id: bytes) -> None:
        """Deletes a set for all servers. Those that hold it on their device drop it at their next `follow`."""
        self._call("delete", lambda: self._delete(principal, weights_id))

    def _delete(self, principal: str, weights_id: bytes) -> None:
        name = _set_name(principal, weights_id)
        if self._store.state(name) is None:
            return
        # The notice first: an interrupted deletion can be repeated.
        self._store.write(f"deleted/{_folder(principal)}-{weights_id.hex()}", b"")
        self._store.remove(name)

    def follow(self) -> frozenset[Name] | None:
        """The sets that were deleted in the last minutes; they may have been put again since.

        None if this server has missed notices, because it could not reach the store for long.
        """
        now = time.monotonic()
        try:
            found = [one.name for one in self._store.list("deleted/")]
        except OSError as error:
            raise self._failure("follow", error) from error
        if self._problem:
            _LOGGER.info("weights in %s: the store answers again", self._store.url)
            self._problem = ""
        has_missed = now - self._followed > _NOTICE_S / 2
        self._followed = now
        self._notices = {name: self._notices.get(name, now) for name in found}
        for name, seen in self._notices.items():
            if now - seen > _NOTICE_S:
                with contextlib.suppress(OSError):
                    self._store.remove(name)
        if has_missed:
            return None
        pairs = (name.removeprefix("deleted/").split("-") for name in found)
        return frozenset((pair[0], pair[1]) for pair in pairs if len(pair) == 2)

    def _all(self, work: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
        """Runs work for each item on the threads for requests. Raises the first error, after all have ended."""
        results: list[T] = []
        running: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        rest = iter(items)
        try:
            while True:
                for item in itertools.islice(rest, _QUEUED_PER_SET - len(running)):
                    running.append(self._requests.submit(work, item))
                if not running:
                    return results
                results.append(running.popleft().result())
        finally:
            for future in running:
                future.cancel()
            concurrent.futures.wait(running)

    def _call(self, operation: str, work: Callable[[], T]) -> T:
        """Translates what the store raises. Fails at once while the store is known not to answer."""
        if self._problem:
            raise errors.WeightStoreUnavailable(retry_after_s=1.0)
        try:
            return work()
        except FileNotFoundError as error:
            if operation == "read":
                raise
            # For example a bucket that was deleted.
            raise self._failure(operation, error) from error
        except OSError as error:
            raise self._failure(operation, error) from error

    def _failure(self, operation: str, error: OSError) -> errors.ForwardPassError:
        """The error for the caller. It does not name the store, which concerns operators."""
        reason = objects.reason(error)
        self._observer.weights_tier_failed(operation, reason)
        if isinstance(error, StoreUnreachable):
            self._note(error)
        else:
            _LOGGER.error("weights in %s: %s failed: %s", self._store.url, operation, error)
        if reason == "full":
            return errors.WeightStoreFull("the weight store that servers share is full: delete weights")
        return errors.WeightStoreUnavailable(retry_after_s=1.0)

    def _note(self, error: OSError) -> None:
        if not self._problem:
            _LOGGER.error("weights in %s: the store does not answer: %s", self._store.url, error)
        self._problem = str(error) or "no answer"


@functools.lru_cache(maxsize=4096)
def _folder(principal: str) -> str:
    return hashlib.sha256(principal.encode()).hexdigest()


def name_of(principal: str, weights_id: bytes) -> Name:
    """The names of a set in the store."""
    return _folder(principal), weights_id.hex()


def _set_name(principal: str, weights_id: bytes) -> str:
    return f"sets/{_folder(principal)}/{weights_id.hex()}"


def _tensor_name(folder: str, digest: bytes) -> str:
    return f"tensors/{folder}/{digest.hex()}"


def _is_sound(tensor: TensorManifest, buffers: dict[bytes, Array]) -> bool:
    hasher = manifests.hasher_of(tensor.spec)
    hasher.update(buffers[tensor.digest].data)
    return hasher.digest() == tensor.digest
