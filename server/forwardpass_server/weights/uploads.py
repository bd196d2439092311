"""Tensors on their way to the store: announced, received chunk by chunk, verified by their hash."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from forwardpass.wire import errors, manifests
from forwardpass.wire.chunks import aligned_buffer
from forwardpass.wire.dtypes import Array
from forwardpass.wire.manifests import TensorManifest

# An announcement without a byte of data takes some hundred bytes itself. Half of them for one principal.
_MAX_ANNOUNCED = 2**18

# One takes 3 us: 2^18 would hold up every caller for most of a second.
_SWEPT_AT_ONCE = 2**12


@dataclasses.dataclass(eq=False, slots=True)
class _Group:
    """The tensors of one set on their way: none is dropped while others arrive.

    touched: when something came last. uploads: how many they are.
    """

    weights_id: bytes
    touched: float
    uploads: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class _Upload:
    """One tensor on its way. hasher, buffer, lock: made with the first chunk. placed: once it is whole and verified."""

    manifest: TensorManifest
    group: _Group
    hasher: hashlib._Hash | None = None
    buffer: Array | None = None
    received: int = 0
    placed: Any = None
    is_finished: bool = False
    lock: asyncio.Lock | None = None


class Uploads:
    """The uploads of all principals. Several callers may send the same tensor: whoever is ahead brings it forward.

    reserve: makes room for so many bytes of a principal, or raises. place: puts a whole tensor on the device; called on
    a thread. expiry_s: after which an upload that stands still is dropped.
    """

    def __init__(self, reserve: Callable[[str, int], None], place: Callable[[Array], Any], expiry_s: float) -> None:
        self._reserve = reserve
        self._place = place
        self._expiry_s = expiry_s
        self._uploads: dict[tuple[str, bytes], _Upload] = {}
        self._groups: dict[tuple[str, bytes], _Group] = {}
        self._announced: collections.Counter[str] = collections.Counter()
        self._size_bytes: collections.Counter[str] = collections.Counter()
        self.size_bytes = 0

    def size_bytes_of(self, principal: str) -> int:
        """What the uploads of one principal take."""
        return self._size_bytes[principal]

    def announce(self, principal: str, weights_id: bytes, wanted: Sequence[TensorManifest]) -> list[tuple[bytes, int]]:
        """Expects tensors of a set. Returns those that are not whole yet, each with how many of its bytes are there."""
        unfinished = []
        for tensor in wanted:
            upload = self._uploads.get((principal, tensor.digest))
            if upload is not None and upload.manifest != tensor:
                # One of the two is wrong and will never be whole. This one may be right.
                self.drop(principal, [tensor.digest])
                upload = None
            if upload is None:
                if len(self._uploads) >= _MAX_ANNOUNCED or self._announced[principal] >= _MAX_ANNOUNCED // 2:
                    raise errors.WeightStoreFull("too many tensors are announced and not sent", retry_after_s=1.0)
                upload = _Upload(tensor, self._join(principal, weights_id))
                self._uploads[principal, tensor.digest] = upload
                self._announced[principal] += 1
            elif upload.group.weights_id != weights_id:
                self._leave(principal, upload.group)
                upload.group = self._join(principal, weights_id)
            upload.group.touched = time.monotonic()
            if not upload.is_finished:
                unfinished.append((tensor.digest, upload.received))
        return unfinished

    def _join(self, principal: str, weights_id: bytes) -> _Group:
        group = self._groups.get((principal, weights_id))
        if group is None:
            group = self._groups[principal, weights_id] = _Group(weights_id, 0.0)
        group.uploads += 1
        return group

    def _leave(self, principal: str, group: _Group) -> None:
        group.uploads -= 1
        if not group.uploads:
            del self._groups[principal, group.weights_id]

    async def write(self, principal: str, digest: bytes, offset: int, data: memoryview) -> None:
        """Takes a chunk. What has come already is passed over.

        Raises UploadOutOfStep, InvalidRequest for a chunk beyond the end, TensorCorrupted, and what `reserve` raises.
        """
        # A caller that goes away must not leave a chunk half taken.
        writing = asyncio.ensure_future(self._write(principal, digest, offset, data))
        # Who has left does not ask what came of it.
        writing.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(writing)

    async def _write(self, principal: str, digest: bytes, offset: int, data: memoryview) -> None:
        upload = self._uploads.get((principal, digest))
        if upload is None:
            raise errors.UploadOutOfStep(f"tensor {digest.hex()} was not announced, or too long ago")
        if upload.lock is None:
            # Not made with the announcement: there may be 2^18 of these, and the garbage collector visits each object.
            upload.lock = asyncio.Lock()
        async with upload.lock:
            if upload.is_finished:
                return
            try:
                await self._append(principal, upload, offset, data)
                if upload.received == upload.manifest.size_bytes:
                    await self._finish(upload)
            except errors.UploadOutOfStep:
                raise
            except Exception:
                if self._uploads.get((principal, digest)) is upload:
                    self.drop(principal, [digest])
                raise

    async def _append(self, principal: str, upload: _Upload, offset: int, data: memoryview) -> None:
        size_bytes = upload.manifest.size_bytes
        if offset > upload.received:
            raise errors.UploadOutOfStep(place="offset", expected=f"{upload.received}", found=f"{offset}")
        if offset < 0 or offset + len(data) > size_bytes:
            raise errors.InvalidRequest(
                place="data",
                expected=f"a tensor of {size_bytes} bytes",
                found=f"bytes {offset} to {offset + len(data)}",
            )
        if upload.buffer is None:
            self._reserve(principal, size_bytes)
            upload.buffer = aligned_buffer(size_bytes)
            upload.hasher = manifests.hasher_of(upload.manifest.spec)
            self._count(principal, size_bytes)
        # Another caller may be further than this one.
        data = data[upload.received - offset :]
        if data:
            await asyncio.to_thread(_take, upload, data)
        upload.group.touched = time.monotonic()

    async def _finish(self, upload: _Upload) -> None:
        digest = upload.manifest.digest
        assert upload.hasher is not None
        if upload.hasher.digest() != digest:
            raise errors.TensorCorrupted(
                place="tensor", expected=f"the hash {digest.hex()}", found=upload.hasher.hexdigest()
            )
        upload.placed = await asyncio.to_thread(self._decode_and_place, upload)
        upload.is_finished = True
        # On a GPU it is there now; on a CPU the placed tensor holds the memory.
        upload.buffer = None

    def _decode_and_place(self, upload: _Upload) -> Any:
        return self._place(upload.manifest.decode(upload.buffer, f"tensor {upload.manifest.digest.hex()}"))

    def is_finished(self, principal: str, digest: bytes) -> bool:
        """Whether a tensor is whole."""
        upload = self._uploads.get((principal, digest))
        return upload is not None and upload.is_finished

    def finished(self, principal: str, digest: bytes) -> Any:
        """A whole tensor, where it was placed."""
        return self._uploads[principal, digest].placed

    def drop(self, principal: str, digests: Iterable[bytes]) -> None:
        """Forgets uploads: published, broken, or given up."""
        for digest in digests:
            upload = self._uploads.pop((principal, digest), None)
            if upload is None:
                continue
            _subtract(self._announced, principal, 1)
            self._leave(principal, upload.group)
            if upload.buffer is not None or upload.is_finished:
                self._count(principal, -upload.manifest.size_bytes)

    def sweep(self) -> None:
        """Drops uploads of sets of which nothing has come for too long: at most `_SWEPT_AT_ONCE` in one call."""
        limit = time.monotonic() - self._expiry_s
        expired = (key for key, upload in self._uploads.items() if upload.group.touched < limit)
        for principal, digest in list(itertools.islice(expired, _SWEPT_AT_ONCE)):
            self.drop(principal, [digest])

    @contextlib.contextmanager
    def reserved(self, principal: str, size_bytes: int) -> Iterator[None]:
        """Counts bytes that are on their way from elsewhere."""
        self._count(principal, size_bytes)
        try:
            yield
        finally:
            self._count(principal, -size_bytes)

    def _count(self, principal: str, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        _subtract(self._size_bytes, principal, -size_bytes)


def _subtract(counter: collections.Counter[str], principal: str, number: int) -> None:
    """Counts down, and forgets principals of whom nothing is left."""
    counter[principal] -= number
    if not counter[principal]:
        del counter[principal]


def _take(upload: _Upload, data: memoryview) -> None:
    assert upload.buffer is not None
    assert upload.hasher is not None
    end = upload.received + len(data)
    upload.buffer[upload.received : end] = np.frombuffer(data, np.uint8)
    upload.hasher.update(data)
    upload.received = end
