"""The weight store: sets of weights on the device, by the hash of what they hold."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from forwardpass.wire import chunks, conform, errors, manifests, tensors
from forwardpass.wire.dtypes import Array
from forwardpass.wire.manifests import TensorManifest, WeightsManifest
from forwardpass.wire.specs import StructureSpec
from forwardpass.wire.structures import Structure
from forwardpass_server.weights import files as weight_files
from forwardpass_server.weights.files import WeightFiles
from forwardpass_server.weights.uploads import Uploads

_LOGGER = logging.getLogger(__name__)

# Who needs weights for longer renews.
_MAX_TTL_S = 30 * 24 * 3600
_MAX_LEASES = 1024

# Announced without a look at other callers.
_TENSORS_AT_ONCE = 256

Key = tuple[str, bytes]
"""A principal and a weights id, or the digest of a tensor: what one principal put, another cannot see by its hash."""


class Device(Protocol):
    """Where tensors are kept."""

    def place(self, array: Array) -> Any:
        """The array on the device. It may share the array's memory. Raises OutOfMemory."""

    def fetch(self, placed: Any) -> Array:
        """A placed array in the host's memory, read-only."""


class StoreObserver(Protocol):
    """Is told what happens in the store."""

    def weights_hit(self) -> None: ...

    def weights_missed(self) -> None: ...

    def weights_evicted(self) -> None: ...

    def weights_disk_failed(self, operation: str, reason: str) -> None:
        """A set was not kept on disk ("write"), or could not be read there ("read"): see `weight_files.reason`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """budget_bytes: of tensors and of uploads under way. principal_bytes: the share of one principal; None for all.
    upload_expiry_s: for an upload of which nothing comes.
    """

    budget_bytes: int
    principal_bytes: int | None = None
    upload_expiry_s: float = 60.0


@dataclasses.dataclass(eq=False, slots=True)
class _Tensor:
    """One tensor, stored once however many sets it stands in. sets: how many."""

    manifest: TensorManifest
    placed: Any
    sets: int = 0


class WeightSet:
    """A set of weights on the device."""

    def __init__(self, manifest: WeightsManifest, leaves: Sequence[Any]) -> None:
        self.manifest = manifest
        self._leaves = leaves
        self._fitted: dict[bytes, Sequence[Any]] = {}
        self.pins = 0
        # By their names, when they end; and when the last does.
        self.leases: dict[bytes, float] = {}
        self.leased_until = 0.0

    def leaves(self, content_hash: bytes, spec: StructureSpec) -> Sequence[Any]:
        """The placed tensors in the order of a model's weights.

        content_hash: the model's, under which the answer is kept. spec: of its weights.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch where they are weights of another kind of model.
        """
        fitted = self._fitted.get(content_hash)
        if fitted is None:
            fitted = self._fitted[content_hash] = self._fit(spec)
        return fitted

    def leaf(self, index: int) -> Any:
        return self._leaves[index]

    def _fit(self, spec: StructureSpec) -> Sequence[Any]:
        place = "model_weights"
        order = conform.order(self.manifest.tree, spec, place)
        # Arrays that look like the tensors and take no memory.
        ordered = [self.manifest.tensors[index] for index in order]
        likenesses = [np.broadcast_to(np.zeros((), tensor.spec.dtype), tensor.shape) for tensor in ordered]
        conform.check(Structure(spec.tree, likenesses), spec, place)
        return [self._leaves[index] for index in order]


class WeightStore:
    """Sets of weights under a byte budget, least recently used out first. Used on one event loop alone.

    files: where sets are kept beyond this process; None for nowhere.
    """

    def __init__(
        self, options: StoreOptions, device: Device, observer: StoreObserver, files: WeightFiles | None = None
    ) -> None:
        self._options = options
        self._device = device
        self._observer = observer
        self._files = files
        self._sets: collections.OrderedDict[Key, WeightSet] = collections.OrderedDict()
        self._tensors: dict[bytes, _Tensor] = {}
        self._tensor_bytes = 0
        # For each principal the tensors that it may build on, and in how many of its sets each stands.
        self._held: dict[Key, int] = {}
        # What these take: a tensor counts in full for each principal that has it, so that none learns of another.
        self._held_bytes: collections.Counter[str] = collections.Counter()
        # Sets that are in use or under a lease: few, where the others may be many.
        self._kept: set[Key] = set()
        self._uploads = Uploads(self._reserve, device.place, options.upload_expiry_s)
        self._restoring: dict[Key, asyncio.Future[None]] = {}
        # Sets, and tensors of theirs that were just uploaded, on their way to the disk.
        self._saving: dict[Key, asyncio.Future[None]] = {}

    @property
    def used_bytes(self) -> int:
        """What tensors and uploads under way take."""
        return self._tensor_bytes + self._uploads.size_bytes

    @property
    def set_count(self) -> int:
        return len(self._sets)

    @property
    def tensor_count(self) -> int:
        return len(self._tensors)

    async def put(self, principal: str, manifest: WeightsManifest) -> list[tuple[bytes, int]]:
        """Announces a set. Returns the digests that are missing, each with how many of its bytes are there already.

        Where none is missing the set is published, under `manifest.weights_id`.
        Raises WeightStoreFull for a set that the store has no room for.
        """
        key = principal, manifest.weights_id
        most = min(self._options.budget_bytes, self._share_bytes)
        while True:
            await self._saved(principal, manifest.weights_id, *manifest.distinct)
            if key in self._sets or (self._files is not None and self._files.has(*key)):
                if key in self._sets:
                    self._sets.move_to_end(key)
                return []
            if manifest.size_bytes > most:
                raise errors.WeightStoreFull(
                    place="manifest", expected=f"at most {most} bytes", found=f"{manifest.size_bytes}"
                )
            missing, unfinished = await self._announce(principal, manifest)
            if unfinished:
                return unfinished
            # What was there when it was looked at may have been dropped or published since.
            if all(self._holds(principal, digest) != (digest in missing) for digest in manifest.distinct) and all(
                self._uploads.is_finished(principal, digest) for digest in missing
            ):
                break
        uploaded = {digest: self._uploads.finished(principal, digest) for digest in missing}
        placed = {
            digest: uploaded[digest] if digest in uploaded else self._tensors[digest].placed
            for digest in manifest.distinct
        }
        self._uploads.drop(principal, uploaded)
        if self._files is None:
            self._publish(key, manifest, placed)
            return []
        saving = asyncio.ensure_future(self._save(principal, manifest, placed))
        names = [key, *((principal, digest) for digest in uploaded)]
        self._saving.update(dict.fromkeys(names, saving))
        try:
            # Whatever is dropped meanwhile, room for this set stays.
            with self._uploads.reserved(principal, sum(tensor.size_bytes for tensor in missing.values())):
                await asyncio.shield(saving)
        finally:
            for name in names:
                del self._saving[name]
        self._reserve_for(principal, manifest)
        self._publish(key, manifest, placed)
        return []

    async def _announce(
        self, principal: str, manifest: WeightsManifest
    ) -> tuple[dict[bytes, TensorManifest], list[tuple[bytes, int]]]:
        """Expects the tensors that a principal does not hold. Returns them, and what of them is not whole: see `put`.

        Other callers have their turn in between where they are many.
        """
        missing: dict[bytes, TensorManifest] = {}
        unfinished: list[tuple[bytes, int]] = []
        wanted = list(manifest.distinct.values())
        for start in range(0, len(wanted), _TENSORS_AT_ONCE):
            if start:
                await asyncio.sleep(0)
            absent = []
            for tensor in wanted[start : start + _TENSORS_AT_ONCE]:
                if not self._holds(principal, tensor.digest):
                    absent.append(tensor)
                elif self._tensors[tensor.digest].manifest != tensor:
                    raise errors.InvalidRequest(
                        place=f"tensor {tensor.digest.hex()}",
                        expected=str(self._tensors[tensor.digest].manifest.spec),
                        found=str(tensor.spec),
                    )
            unfinished += self._uploads.announce(principal, manifest.weights_id, absent)
            missing.update((tensor.digest, tensor) for tensor in absent)
        return missing, unfinished

    def _holds(self, principal: str, digest: bytes) -> bool:
        """Whether a principal has shown to have a tensor that the store still has."""
        return (principal, digest) in self._held

    async def _saved(self, principal: str, *names: bytes) -> None:
        """Waits for sets and tensors that are being saved: what is done to them is done one after another."""
        while saving := {self._saving[principal, name] for name in names if (principal, name) in self._saving}:
            await asyncio.wait(saving)
            await asyncio.sleep(0)

    async def upload(self, principal: str, digest: bytes, offset: int, data: memoryview) -> None:
        """Takes the next chunk of an announced tensor. What the store has already is passed over.

        Raises UploadOutOfStep, InvalidRequest for a chunk beyond the end, TensorCorrupted, WeightStoreFull.
        """
        if not self._holds(principal, digest) and (principal, digest) not in self._saving:
            await self._uploads.write(principal, digest, offset, data)

    def use(self, principal: str, weights_id: bytes) -> _Use:
        """A set, kept while it is in use: an asynchronous context manager. Raises WeightsNotFound."""
        return _Use(self, principal, weights_id)

    def acquire(self, principal: str, weights_id: bytes) -> WeightSet | None:
        """A set that is on the device, kept until `release`; None for any other."""
        key = principal, weights_id
        weights = self._sets.get(key)
        if weights is None:
            return None
        self._observer.weights_hit()
        return self._pin(key, weights)

    def _pin(self, key: Key, weights: WeightSet) -> WeightSet:
        self._sets.move_to_end(key)
        weights.pins += 1
        self._kept.add(key)
        return weights

    def release(self, principal: str, weights_id: bytes, weights: WeightSet) -> None:
        """Ends what `acquire` or `restore` began."""
        weights.pins -= 1
        self._let_go((principal, weights_id), weights)

    async def restore(self, principal: str, weights_id: bytes) -> WeightSet:
        """A set that may have to be read from disk, kept until `release`. Raises WeightsNotFound, WeightStoreFull."""
        key = principal, weights_id
        self._observer.weights_missed()
        manifests.check_digest(weights_id, "weights_id")
        if self._files is not None and self._files.has(*key):
            await self._read(key)
        weights = self._sets.get(key)
        if weights is None:
            raise errors.WeightsNotFound(f"the server does not hold weights {weights_id.hex()}, or no longer")
        return self._pin(key, weights)

    async def lease(self, principal: str, weights_id: bytes, lease_id: bytes, ttl_s: float) -> None:
        """Keeps a set for so many seconds from now; 0 ends the lease.

        Raises WeightsNotFound, and InvalidRequest for a lease without an end or one of too many.
        """
        if not 0 <= ttl_s <= _MAX_TTL_S:
            raise errors.InvalidRequest(place="ttl_s", expected=f"0 to {_MAX_TTL_S} seconds", found=f"{ttl_s}")
        key = principal, weights_id
        if not ttl_s:
            held = self._sets.get(key)
            if held is not None:
                held.leases.pop(lease_id, None)
                held.leased_until = max(held.leases.values(), default=0.0)
                self._let_go(key, held)
            return
        async with self.use(principal, weights_id) as weights:
            now = time.monotonic()
            if len(weights.leases) >= _MAX_LEASES:
                weights.leases = {name: end for name, end in weights.leases.items() if end > now}
                if len(weights.leases) >= _MAX_LEASES and lease_id not in weights.leases:
                    raise errors.WeightStoreFull(
                        place="leases of these weights", expected=f"at most {_MAX_LEASES}", found="more"
                    )
            weights.leases[lease_id] = now + ttl_s
            weights.leased_until = max(weights.leases.values())

    async def delete(self, principal: str, weights_id: bytes) -> None:
        """Drops a set, here and on disk. Calls that use it go on."""
        key = principal, weights_id
        await self._saved(principal, weights_id)
        if key in self._sets:
            self._drop(key)
        if self._files is not None:
            await asyncio.to_thread(self._files.delete, principal, weights_id)

    async def read(self, weights: WeightSet, leaf: int, offset: int) -> AsyncIterator[list[memoryview]]:
        """The elements of one leaf from a byte on, in chunks. Raises InvalidRequest for a leaf that is not there."""
        if not 0 <= leaf < len(weights.manifest.tensors):
            raise errors.InvalidRequest(
                place="leaf", expected=f"0 to {len(weights.manifest.tensors) - 1}", found=f"{leaf}"
            )
        tensor = weights.manifest.tensors[leaf]
        if not 0 <= offset <= tensor.size_bytes:
            raise errors.InvalidRequest(place="offset", expected=f"0 to {tensor.size_bytes}", found=f"{offset}")
        array = await asyncio.to_thread(self._device.fetch, weights.leaf(leaf))
        for chunk in chunks.split([tensors.element_bytes(array, tensor.spec.data_type)[offset:]]):
            yield chunk

    def sweep(self) -> None:
        """Drops uploads of which nothing has come for a while, and leases that are over."""
        self._uploads.sweep()
        for key in list(self._kept):
            self._let_go(key, self._sets[key])

    def _publish(self, key: Key, manifest: WeightsManifest, placed: dict[bytes, Any]) -> None:
        principal, _ = key
        for digest, tensor in manifest.distinct.items():
            stored = self._tensors.get(digest)
            if stored is None:
                stored = self._tensors[digest] = _Tensor(tensor, placed[digest])
                self._tensor_bytes += tensor.size_bytes
            stored.sets += 1
            held = self._held.get((principal, digest), 0)
            self._held[principal, digest] = held + 1
            if not held:
                self._held_bytes[principal] += tensor.size_bytes
        leaves = [self._tensors[tensor.digest].placed for tensor in manifest.tensors]
        self._sets[key] = WeightSet(manifest, leaves)

    def _drop(self, key: Key) -> None:
        principal, _ = key
        weights = self._sets.pop(key)
        self._kept.discard(key)
        for digest, tensor in weights.manifest.distinct.items():
            stored = self._tensors[digest]
            stored.sets -= 1
            if not stored.sets:
                del self._tensors[digest]
                self._tensor_bytes -= tensor.size_bytes
            self._held[principal, digest] -= 1
            if not self._held[principal, digest]:
                del self._held[principal, digest]
                self._held_bytes[principal] -= tensor.size_bytes
        if not self._held_bytes[principal]:
            del self._held_bytes[principal]

    def _let_go(self, key: Key, weights: WeightSet) -> None:
        """Forgets that a set must be kept, if nothing says so any more."""
        if weights.leases and weights.leased_until <= time.monotonic():
            weights.leases.clear()
        if not weights.pins and not weights.leases and self._sets.get(key) is weights:
            self._kept.discard(key)

    @property
    def _share_bytes(self) -> int:
        share = self._options.principal_bytes
        return self._options.budget_bytes if share is None else share

    def _used_by(self, principal: str) -> int:
        return self._held_bytes[principal] + self._uploads.size_bytes_of(principal)

    def _reserve_for(self, principal: str, manifest: WeightsManifest) -> None:
        """Makes room for a set whose tensors are not all here, or not all this principal's."""
        sizes = [(digest, tensor.size_bytes) for digest, tensor in manifest.distinct.items()]
        absent = sum(size for digest, size in sizes if digest not in self._tensors)
        self._reserve(principal, absent, sum(size for digest, size in sizes if (principal, digest) not in self._held))

    def _reserve(self, principal: str, size_bytes: int, own_bytes: int | None = None) -> None:
        """Makes room, dropping the sets that were used least recently. Raises WeightStoreFull, and drops none then.

        own_bytes: what the principal's share is to hold in addition; None for as much.
        """
        own_bytes = size_bytes if own_bytes is None else own_bytes
        missing = self.used_bytes + size_bytes - self._options.budget_bytes
        own_missing = self._used_by(principal) + own_bytes - self._share_bytes
        if missing <= 0 and own_missing <= 0:
            return
        for key in list(self._kept):
            self._let_go(key, self._sets[key])
        own_kept_bytes = self._kept_bytes(key for key in self._kept if key[0] == principal)
        if self._held_bytes[principal] - own_kept_bytes < own_missing:
            raise errors.WeightStoreFull(
                f"no room for {own_bytes} bytes: of this principal's {self._share_bytes}, {own_kept_bytes} are in use "
                f"or under a lease and {self._uploads.size_bytes_of(principal)} are being uploaded",
                retry_after_s=1.0,
            )
        kept_bytes = self._kept_bytes(self._kept)
        if self._tensor_bytes - kept_bytes < missing:
            raise errors.WeightStoreFull(
                # Nothing of what others have.
                f"no room for {size_bytes} bytes: too much is in use, under a lease, or being uploaded; delete or "
                "release weights, or try again later",
                retry_after_s=1.0,
            )
        self._evict(lambda key: key[0] == principal, lambda: self._used_by(principal) + own_bytes <= self._share_bytes)
        self._evict(lambda key: True, lambda: self.used_bytes + size_bytes <= self._options.budget_bytes)

    def _kept_bytes(self, keys: Iterable[Key]) -> int:
        """What sets that must be kept take together."""
        kept: dict[bytes, int] = {}
        for key in keys:
            kept.update((digest, one.size_bytes) for digest, one in self._sets[key].manifest.distinct.items())
        return sum(kept.values())

    def _evict(self, may_go: Callable[[Key], bool], is_enough: Callable[[], bool]) -> None:
        """Drops sets that need not be kept, the one used least recently first, until it is enough."""
        for key in [key for key in self._sets if key not in self._kept and may_go(key)]:
            if is_enough():
                return
            self._drop(key)
            self._observer.weights_evicted()

    async def _read(self, key: Key) -> None:
        """Reads a set from disk and publishes it; callers that want it meanwhile wait for the same reading."""
        reading = self._restoring.get(key)
        if reading is None:
            reading = self._restoring[key] = asyncio.ensure_future(self._read_once(key))
            reading.add_done_callback(lambda _: self._restoring.pop(key))
        await asyncio.shield(reading)

    async def _read_once(self, key: Key) -> None:
        assert self._files is not None
        try:
            manifest = await asyncio.to_thread(self._files.manifest, *key)
            # Not those alone that nobody has: how long it takes would tell what others have.
            wanted = [tensor for digest, tensor in manifest.distinct.items() if not self._holds(key[0], digest)]
            self._reserve(key[0], sum(tensor.size_bytes for tensor in wanted))
            with self._uploads.reserved(key[0], sum(tensor.size_bytes for tensor in wanted)):
                placed = await asyncio.to_thread(self._place_from_disk, wanted)
        except (OSError, errors.InvalidRequest) as error:
            _LOGGER.error("weights %s cannot be read from disk: %s", key[1].hex(), error)
            # One that is not there was dropped for room meanwhile.
            if not isinstance(error, FileNotFoundError):
                self._observer.weights_disk_failed("read", weight_files.reason(error))
            return
        if any(digest not in self._tensors and digest not in placed for digest in manifest.distinct):
            # A set that shared them was dropped meanwhile.
            await self._read_once(key)
        elif key not in self._sets:
            self._publish(key, manifest, placed)

    def _place_from_disk(self, wanted: Iterable[TensorManifest]) -> dict[bytes, Any]:
        assert self._files is not None
        return {tensor.digest: self._device.place(self._files.tensor(tensor)) for tensor in wanted}

    async def _save(self, principal: str, manifest: WeightsManifest, placed: dict[bytes, Any]) -> None:
        assert self._files is not None
        arrays = ((tensor, self._device.fetch(placed[digest])) for digest, tensor in manifest.distinct.items())
        try:
            await asyncio.to_thread(self._files.save, principal, manifest, arrays)
        except OSError as error:
            # The set is served all the same, as long as this process lives and has room.
            self._observer.weights_disk_failed("write", weight_files.reason(error))
            _LOGGER.error("weights %s are not on disk: %s", manifest.weights_id.hex(), error)


class _Use:
    """See `WeightStore.use`. A class: what contextlib makes of a generator costs a call several times as much."""

    __slots__ = ("_principal", "_store", "_weights", "_weights_id")

    def __init__(self, store: WeightStore, principal: str, weights_id: bytes) -> None:
        self._store = store
        self._principal = principal
        self._weights_id = weights_id

    async def __aenter__(self) -> WeightSet:
        names = self._principal, self._weights_id
        self._weights = self._store.acquire(*names) or await self._store.restore(*names)
        return self._weights

    async def __aexit__(self, *error: object) -> None:
        self._store.release(self._principal, self._weights_id, self._weights)
