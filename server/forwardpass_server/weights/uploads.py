"""Uploads of tensors: announced, received in chunks, verified by their hash."""

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

# An announced tensor takes some hundred bytes of memory before any data arrives. One principal may have half of these.
_MAX_ANNOUNCED = 2**18

# One takes 3 us: 2^18 would hold up every caller for most of a second.
_SWEPT_AT_ONCE = 2**12


@dataclasses.dataclass(eq=False, slots=True)
class _Group:
    """The uploads of one set: they expire together.

    touched: when data last arrived, by time.monotonic. uploads: their number.
    """

    weights_id: bytes
    touched: float
    uploads: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class _Upload:
    """One tensor. hasher, buffer, lock: created with the first chunk. placed: set when it is complete and verified."""

    manifest: TensorManifest
    group: _Group
    hasher: hashlib._Hash | None = None
    buffer: Array | None = None
    received: int = 0
    placed: Any = None
    is_finished: bool = False
    lock: asyncio.Lock | None = None


class Uploads:
    """The uploads of all principals. Several clients may send the same tensor: the first copy of each byte counts.

    reserve: makes room for a number of bytes of a principal, or raises. place: copies a complete tensor to the device;
    called on a thread. expiry_s: an upload that receives no data for this time is dropped.
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
        """The size of the uploads of one principal."""
        return self._size_bytes[principal]

    def announce(self, principal: str, weights_id: bytes, wanted: Sequence[TensorManifest]) -> list[tuple[bytes, int]]:
        """Announces tensors of a set.

        Returns the digest of each incomplete one, and the number of its bytes received so far. Raises WeightStoreFull
        for too many announced tensors.
        """
        unfinished = []
        for tensor in wanted:
            upload = self._uploads.get((principal, tensor.digest))
            if upload is not None and upload.manifest != tensor:
                # Two specs under one digest: one is wrong and never completes. Assume the new one is right.
                self.drop(principal, [tensor.digest])
                upload = None
            if upload is None:
                if len(self._uploads) >= _MAX_ANNOUNCED or self._announced[principal] >= _MAX_ANNOUNCED // 2:
                    raise errors.WeightStoreFull(
                        "too many tensors are announced and not yet uploaded: upload them, or retry later",
                        retry_after_s=1.0,
                    )
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
        """Receives a chunk. Bytes that were received before are skipped.

        Raises UploadOutOfStep, InvalidRequest for a chunk beyond the end, TensorCorrupted, and what `reserve` raises.
        """
        # A cancelled call must not leave a chunk half written.
        writing = asyncio.ensure_future(self._write(principal, digest, offset, data))
        # After a cancellation no code reads the exception: this line prevents the warning that it was never retrieved.
        writing.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(writing)

    async def _write(self, principal: str, digest: bytes, offset: int, data: memoryview) -> None:
        upload = self._uploads.get((principal, digest))
        if upload is None:
            raise errors.UploadOutOfStep(
                f"tensor {digest.hex()} was not announced, or its upload has expired: put the weights again"
            )
        if upload.lock is None:
            # Not created with the announcement: there may be 2^18, and the garbage collector visits each object.
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
        # Another client may have sent a part of this chunk.
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
        # On a GPU the tensor is a copy; on a CPU it keeps the buffer alive itself.
        upload.buffer = None

    def _decode_and_place(self, upload: _Upload) -> Any:
        return self._place(upload.manifest.decode(upload.buffer, f"tensor {upload.manifest.digest.hex()}"))

    def is_waiting(self, principal: str, digest: bytes) -> bool:
        """Whether a tensor is announced, and no data of it has arrived."""
        upload = self._uploads.get((principal, digest))
        return upload is not None and upload.buffer is None and not upload.is_finished

    def supply(self, principal: str, digest: bytes, placed: Any) -> bool:
        """Completes an announced tensor that was read from elsewhere, unless its data has begun to arrive.

        placed: the verified tensor, as `place` returned it. Returns whether it is used.
        """
        if not self.is_waiting(principal, digest):
            return False
        upload = self._uploads[principal, digest]
        self._reserve(principal, upload.manifest.size_bytes)
        self._count(principal, upload.manifest.size_bytes)
        upload.placed = placed
        upload.is_finished = True
        upload.group.touched = time.monotonic()
        return True

    def is_finished(self, principal: str, digest: bytes) -> bool:
        """Whether a tensor is complete and verified."""
        upload = self._uploads.get((principal, digest))
        return upload is not None and upload.is_finished

    def finished(self, principal: str, digest: bytes) -> Any:
        """A complete tensor, as `place` returned it."""
        return self._uploads[principal, digest].placed

    def drop(self, principal: str, digests: Iterable[bytes]) -> None:
        """Removes uploads that are published, corrupt or expired."""
        for digest in digests:
            upload = self._uploads.pop((principal, digest), None)
            if upload is None:
                continue
            _subtract(self._announced, principal, 1)
            self._leave(principal, upload.group)
            if upload.buffer is not None or upload.is_finished:
                self._count(principal, -upload.manifest.size_bytes)

    def sweep(self) -> None:
        """Drops expired uploads, at most `_SWEPT_AT_ONCE` in one call."""
        limit = time.monotonic() - self._expiry_s
        expired = (key for key, upload in self._uploads.items() if upload.group.touched < limit)
        for principal, digest in list(itertools.islice(expired, _SWEPT_AT_ONCE)):
            self.drop(principal, [digest])

    @contextlib.contextmanager
    def reserved(self, principal: str, size_bytes: int) -> Iterator[None]:
        """Counts bytes that arrive from elsewhere, such as the disk, as if they were uploads."""
        self._count(principal, size_bytes)
        try:
            yield
        finally:
            self._count(principal, -size_bytes)

    def _count(self, principal: str, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        _subtract(self._size_bytes, principal, -size_bytes)


def _subtract(counter: collections.Counter[str], principal: str, number: int) -> None:
    """Subtracts a number, and removes a principal whose count is 0."""
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
