"""The weight store: sets of weights on the device, each under the hash of its contents."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from forwardpass.wire import chunks, conform, errors, limits, manifests, tensors
from forwardpass.wire.dtypes import Array
from forwardpass.wire.manifests import TensorManifest, WeightsManifest
from forwardpass.wire.specs import StructureSpec
from forwardpass.wire.structures import Structure
from forwardpass.wire.trees import TreeDef
from forwardpass_server.weights import files as weight_files
from forwardpass_server.weights.backing import Backing
from forwardpass_server.weights.stacks import FittedWeights, Stacks
from forwardpass_server.weights.stacks import Key as StackKey
from forwardpass_server.weights.tier import WeightTier
from forwardpass_server.weights.uploads import Uploads

_LOGGER = logging.getLogger(__name__)

T = TypeVar("T")

# A client that needs weights for longer renews its lease.
_MAX_TTL_S = 30 * 24 * 3600
_MAX_LEASES = 1024

# Announced in one turn of the event loop, before other calls get their turn.
_TENSORS_AT_ONCE = 256

# Smaller tensors are uploaded without looking whether the tier has them: that takes a request for each.
_LOOKED_UP_BYTES = 2**16

# A stack that is not kept is at most this fraction of the budget.
_STACK_SHARE = 8

Key = tuple[str, bytes]
"""A principal, and a weights id or the digest of a tensor.

The principal is part of the key: a principal cannot find out by a hash what another principal has put.
"""


class Device(Protocol):
    """The device that holds the tensors."""

    def place(self, array: Array) -> Any:
        """Copies an array of any shape to the device. The result may share its memory. Raises OutOfMemory."""

    def fetch(self, placed: Any) -> Array:
        """A placed array in the memory of the host, read-only, with the shape that it had."""

    def add(self, total: Any | None, terms: Sequence[tuple[Any, float]], dtype: np.dtype[Any]) -> Any:
        """The sum of `total` and of each placed tensor times its coefficient, in the order of the terms.

        total: what an earlier call returned, which is not used afterwards; None to begin with the first term.
        terms: at least one; tensors of one shape. dtype: of the sum; terms are converted to it first.
        For `rounded` and further calls only. Raises OutOfMemory.
        """

    def rounded(self, total: Any, dtype: np.dtype[Any]) -> Any:
        """A sum of `add` as a placed tensor of a dtype. The sum is not used afterwards. Raises OutOfMemory."""


class StoreObserver(Protocol):
    """Receives the events of the store."""

    def weights_hit(self) -> None:
        """A call found its weights on the device."""

    def weights_missed(self) -> None:
        """A call did not find its weights on the device."""

    def weights_evicted(self) -> None:
        """A set was evicted to make room."""

    def weights_disk_failed(self, operation: str, reason: str) -> None:
        """A set could not be written to disk ("write") or read from it ("read"). reason: see `weight_files.reason`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Limits of a store.

    budget_bytes: for tensors and unfinished uploads together. principal_bytes: the share of one principal; None for the
    whole budget. upload_expiry_s: an upload that receives no data for this time is dropped.
    """

    budget_bytes: int
    principal_bytes: int | None = None
    upload_expiry_s: float = 60.0


@dataclasses.dataclass(eq=False, slots=True)
class _Tensor:
    """One tensor, stored once for all sets. sets: the number of sets that it is part of."""

    manifest: TensorManifest
    placed: Any
    sets: int = 0


class WeightSet:
    """A set of weights on the device."""

    def __init__(self, manifest: WeightsManifest, leaves: Sequence[Any]) -> None:
        self.manifest = manifest
        self._leaves = leaves
        self.fitted: dict[bytes, FittedWeights] = {}
        self.pins = 0
        # The time at which each lease ends, by its id, and the time at which the last one ends (time.monotonic).
        self.leases: dict[bytes, float] = {}
        self.leased_until = 0.0

    def leaves(self, content_hash: bytes, spec: StructureSpec) -> FittedWeights:
        """The placed tensors in the order of a model's weights.

        content_hash: of the model; the result is cached under it. spec: of the model's weights.
        Raises StructureMismatch, DTypeMismatch or ShapeMismatch if the set does not fit the model.
        """
        fitted = self.fitted.get(content_hash)
        if fitted is None:
            fitted = self.fitted[content_hash] = FittedWeights(self.fit(spec, "model_weights"))
        return fitted

    def leaf(self, index: int) -> Any:
        """The placed tensor of one leaf, in the order of the manifest."""
        return self._leaves[index]

    def fit(self, spec: StructureSpec, place: str) -> Sequence[Any]:
        """The placed tensors in the order of a spec. place: the name of the set in errors.

        Raises StructureMismatch, DTypeMismatch or ShapeMismatch if the set does not fit the spec.
        """
        order = conform.order(self.manifest.tree, spec, place)
        # Stand-ins with the shapes and dtypes of the tensors. They take no memory.
        ordered = [self.manifest.tensors[index] for index in order]
        likenesses = [np.broadcast_to(np.zeros((), tensor.spec.dtype), tensor.shape) for tensor in ordered]
        conform.check(Structure(spec.tree, likenesses), spec, place)
        return [self._leaves[index] for index in order]


class Room:
    """Bytes of the store that are kept free for a set which the server computes: see `WeightStore.room`."""

    def __init__(self, uploads: Uploads, principal: str, size_bytes: int) -> None:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(uploads.reserved(principal, size_bytes))

    def give_back(self) -> None:
        """Frees the bytes. Called again, it does nothing."""
        self._stack.close()


class WeightStore:
    """Sets of weights under a byte budget; the least recently used are evicted. For one event loop; not thread-safe.

    files: the folder or tier in which sets are kept too; None to keep them in memory only.
    """

    def __init__(
        self, options: StoreOptions, device: Device, observer: StoreObserver, files: Backing | None = None
    ) -> None:
        self._options = options
        self._device = device
        self._observer = observer
        self._files = files
        self._tier = files if isinstance(files, WeightTier) else None
        self._sets: collections.OrderedDict[Key, WeightSet] = collections.OrderedDict()
        self._tensors: dict[bytes, _Tensor] = {}
        self._tensor_bytes = 0
        # The tensors that each principal may use without an upload, with the number of its sets that each is part of.
        self._held: dict[Key, int] = {}
        # The size of these tensors. A tensor counts in full for each principal that holds it: a smaller figure would
        # reveal that another principal holds it too.
        self._held_bytes: collections.Counter[str] = collections.Counter()
        # The sets that are in use or under a lease. They are few; scanning all sets would be slow.
        self._kept: set[Key] = set()
        self._uploads = Uploads(self._reserve, device.place, options.upload_expiry_s)
        self._restoring: dict[Key, asyncio.Future[None]] = {}
        # Sets that are being written to disk, and those of their tensors that were just uploaded or computed.
        self._saving: dict[Key, asyncio.Future[None]] = {}
        self._stacks = Stacks(options.budget_bytes)
        # Held while a set of many tensors is hashed: see `add`.
        self._many = asyncio.Lock()

    @property
    def used_bytes(self) -> int:
        """The size of all tensors and unfinished uploads, without stacks."""
        return self._tensor_bytes + self._uploads.size_bytes

    def may_stack(self, size_bytes: int) -> bool:
        """Whether a stack may copy so many bytes. It takes memory beside the budget while it is in use."""
        return size_bytes <= self._options.budget_bytes // _STACK_SHARE

    def would_keep_stack(self, size_bytes: int) -> bool:
        """Whether there is room beside the sets for a stack that copies so many bytes."""
        return self.used_bytes + size_bytes <= self._options.budget_bytes

    @property
    def stacks_bytes(self) -> int:
        """The size of all stacks."""
        return self._stacks.size_bytes

    def stack_of(self, key: StackKey) -> Sequence[Any] | None:
        """The leaves of a stack of sets; None if the store holds none."""
        return self._stacks.get(key)

    def keep_stack(self, key: StackKey, leaves: Sequence[Any], size_bytes: int) -> None:
        """Keeps a stack of sets as long as there is room for it beside the sets.

        key: the numbers of the sets in order. size_bytes: of the leaves that only the stack holds.
        """
        self._stacks.add(key, leaves, size_bytes, self.used_bytes)

    @property
    def set_count(self) -> int:
        """The number of sets on the device."""
        return len(self._sets)

    @property
    def has_files(self) -> bool:
        """Whether sets are kept in a folder or tier, so that an evicted set can be read again."""
        return self._files is not None

    @property
    def is_shared(self) -> bool:
        """Whether sets are kept in a tier, so that other servers can use them."""
        return self._tier is not None

    def keys(self) -> Sequence[Key]:
        """The sets on the device, each by its principal and its id."""
        return list(self._sets)

    @property
    def tensor_count(self) -> int:
        """The number of different tensors on the device."""
        return len(self._tensors)

    async def put(self, principal: str, manifest: WeightsManifest) -> list[tuple[bytes, int]]:
        """Announces a set. Returns the digest of each missing tensor and the number of its bytes received so far.

        If no tensor is missing, the set is published under `manifest.weights_id`.
        Raises WeightStoreFull if the store has no room for the set, WeightStoreUnavailable if it cannot be kept in the
        tier: its tensors stay on the device, and another put needs no upload.
        """
        key = principal, manifest.weights_id
        while True:
            await self._saved(principal, manifest.weights_id, *manifest.distinct)
            if await self._is_complete(key):
                return []
            self._check_size(manifest.size_bytes, "manifest")
            missing, unfinished = await self._announce(principal, manifest)
            if unfinished and await self._supply(principal, missing):
                continue
            if unfinished:
                return unfinished
            # Tensors may have been dropped, saved or published while this coroutine waited: check again.
            if (
                all(self._holds(principal, digest) != (digest in missing) for digest in manifest.distinct)
                and all(self._uploads.is_finished(principal, digest) for digest in missing)
                and not self._saving_of(principal, manifest.weights_id, *missing)
            ):
                break
        uploaded = {digest: self._uploads.finished(principal, digest) for digest in missing}
        placed = {
            digest: uploaded[digest] if digest in uploaded else self._tensors[digest].placed
            for digest in manifest.distinct
        }
        self._uploads.drop(principal, uploaded)
        await self._save_and_publish(principal, manifest, placed, missing)
        return []

    @contextlib.contextmanager
    def room(self, principal: str, size_bytes: int) -> Iterator[Room]:
        """Keeps room free for a set that the server is about to compute: until `add` publishes it, or the context ends.

        Evicts sets as an upload does. size_bytes: of the distinct tensors of the set.
        Raises WeightStoreFull.
        """
        self._check_size(size_bytes, "weights")
        self._reserve(principal, size_bytes)
        room = Room(self._uploads, principal, size_bytes)
        try:
            yield room
        finally:
            room.give_back()

    async def add_arrays(self, principal: str, tree: TreeDef, arrays: Sequence[Array]) -> bytes:
        """`add` for arrays in the memory of the host. Raises OutOfMemory where the device has no room for them."""
        placed = await asyncio.to_thread(lambda: [self._device.place(array) for array in arrays])
        return await self.add(principal, tree, placed)

    async def add(self, principal: str, tree: TreeDef, leaves: Sequence[Any], room: Room | None = None) -> bytes:
        """Publishes a set that the server has computed, as if this principal had put it. Returns its id.

        The tensors are hashed on a thread.
        tree: a pair, trainable and non_trainable. leaves: one placed tensor for each leaf of `tree`, in order. Nobody
        may change them afterwards. room: what `room` has kept free for this set; None to make room now.
        Raises WeightStoreFull if the store has no room for the set, WeightStoreUnavailable if it cannot be kept in the
        tier.
        """
        manifest = await self._describe(tree, leaves)
        placed = {tensor.digest: leaf for tensor, leaf in zip(manifest.tensors, leaves, strict=True)}
        await self._saved(principal, manifest.weights_id, *manifest.distinct)
        key = principal, manifest.weights_id
        if key in self._sets and await self._is_complete(key):
            return manifest.weights_id
        # From here to the first await of `_save_and_publish` no other call can change the store.
        if room is not None:
            room.give_back()
        self._check_size(manifest.size_bytes, "weights")
        self._reserve_for(principal, manifest)
        new = {digest: one for digest, one in manifest.distinct.items() if not self._holds(principal, digest)}
        await self._save_and_publish(principal, manifest, placed, new)
        return manifest.weights_id

    async def _describe(self, tree: TreeDef, leaves: Sequence[Any]) -> WeightsManifest:
        """The manifest of placed tensors, computed on a thread."""
        # SHA-256 releases Python's lock for long data only. One thread that holds it delays each turn of the event loop
        # by up to 5 ms, and each further thread by as much again: so sets of many tensors take turns.
        async with self._many if len(leaves) > limits.SMALL_LEAVES else contextlib.nullcontext():
            return await asyncio.to_thread(_manifest, tree, leaves, self._device.fetch)

    async def _save_and_publish(
        self,
        principal: str,
        manifest: WeightsManifest,
        placed: dict[bytes, Any],
        new: Mapping[bytes, TensorManifest],
    ) -> None:
        """Publishes a complete set, after it is written to the folder or tier where the store has one.

        new: the tensors that the principal does not hold yet.
        """
        key = principal, manifest.weights_id
        if self._files is None:
            self._publish(key, manifest, placed)
            return
        saving = asyncio.ensure_future(self._save(principal, manifest, placed))
        # This caller may be cancelled: without this line, a failure would be reported as never retrieved.
        saving.add_done_callback(lambda task: task.cancelled() or task.exception())
        names = [key, *((principal, digest) for digest in new)]
        self._saving.update(dict.fromkeys(names, saving))
        try:
            # Reserves the room for this set while it is written.
            with self._uploads.reserved(principal, sum(tensor.size_bytes for tensor in new.values())):
                await asyncio.shield(saving)
        except errors.ForwardPassError:
            # Not acknowledged, but the next put needs no upload.
            self._publish_once(key, manifest, placed)
            raise
        finally:
            for name in names:
                del self._saving[name]
        self._publish_once(key, manifest, placed)

    def _publish_once(self, key: Key, manifest: WeightsManifest, placed: dict[bytes, Any]) -> None:
        # A call may have read the set from disk in the meantime.
        if key not in self._sets:
            self._reserve_for(key[0], manifest)
            self._publish(key, manifest, placed)

    async def _announce(
        self, principal: str, manifest: WeightsManifest
    ) -> tuple[dict[bytes, TensorManifest], list[tuple[bytes, int]]]:
        """Announces the tensors that a principal does not hold. Returns them, and the incomplete ones: see `put`.

        Yields to other calls after each 256 tensors.
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

    async def _supply(self, principal: str, missing: Mapping[bytes, TensorManifest]) -> bool:
        """Takes tensors from the tier instead of from the client, if this principal has put them with another set.

        Returns whether there were any.
        """
        wanted = [
            tensor
            for tensor in missing.values()
            if tensor.size_bytes >= _LOOKED_UP_BYTES and self._uploads.is_waiting(principal, tensor.digest)
        ]
        if self._tier is None or not wanted:
            return False
        size_bytes = sum(tensor.size_bytes for tensor in wanted)
        self._reserve(principal, size_bytes)
        with self._uploads.reserved(principal, size_bytes):
            found = await self._run(self._tier.known, principal, wanted)
            placed = await asyncio.to_thread(lambda: {name: self._device.place(one) for name, one in found.items()})
        return sum(self._uploads.supply(principal, digest, tensor) for digest, tensor in placed.items()) > 0

    def _holds(self, principal: str, digest: bytes) -> bool:
        """Whether the store holds a tensor that this principal has uploaded."""
        return (principal, digest) in self._held

    async def _saved(self, principal: str, *names: bytes) -> None:
        """Waits until sets and tensors are written to disk: operations on the same set must not overlap."""
        while saving := self._saving_of(principal, *names):
            await asyncio.wait(saving)
            await asyncio.sleep(0)

    def _saving_of(self, principal: str, *names: bytes) -> set[asyncio.Future[None]]:
        return {self._saving[principal, name] for name in names if (principal, name) in self._saving}

    async def upload(self, principal: str, digest: bytes, offset: int, data: memoryview) -> None:
        """Receives the next chunk of an announced tensor. Bytes that the store has already are skipped.

        Raises UploadOutOfStep, InvalidRequest for a chunk beyond the end, TensorCorrupted or WeightStoreFull.
        """
        if not self._holds(principal, digest) and (principal, digest) not in self._saving:
            await self._uploads.write(principal, digest, offset, data)

    def use(self, principal: str, weights_id: bytes) -> _Use:
        """An asynchronous context manager that pins a set. Raises WeightsNotFound on entry."""
        return _Use(self, principal, weights_id)

    def acquire(self, principal: str, weights_id: bytes) -> WeightSet | None:
        """Pins a set that is on the device until `release`. Returns None if it is not there."""
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
        """Unpins a set that `acquire` or `restore` has pinned."""
        weights.pins -= 1
        self._let_go((principal, weights_id), weights)

    async def restore(self, principal: str, weights_id: bytes) -> WeightSet:
        """Reads a set from the folder or tier if needed and pins it until `release`.

        Raises WeightsNotFound, WeightStoreFull or WeightStoreUnavailable.
        """
        key = principal, weights_id
        self._observer.weights_missed()
        manifests.check_digest(weights_id, "weights_id")
        if self._files is not None and (self._tier is not None or self._files.has(*key)):
            await self._read(key)
        weights = self._sets.get(key)
        if weights is None:
            raise errors.WeightsNotFound(f"the server does not hold weights {weights_id.hex()}: put them again")
        return self._pin(key, weights)

    async def lease(self, principal: str, weights_id: bytes, lease_id: bytes, ttl_s: float) -> None:
        """Protects a set from eviction for `ttl_s` seconds from now; 0 ends the lease.

        Raises WeightsNotFound, InvalidRequest for a `ttl_s` out of range, or WeightStoreFull for too many leases.
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
        """Deletes a set from memory and from the folder or tier. Running calls that use it continue.

        Raises WeightStoreUnavailable; other servers may then still have the set.
        """
        key = principal, weights_id
        await self._saved(principal, weights_id)
        if key in self._sets:
            self._drop(key)
        if self._files is not None:
            await self._run(self._files.delete, principal, weights_id)

    async def check_kept(self, key: Key) -> None:
        """Drops a set from the device if the tier does not have it: another server has deleted it.

        Raises WeightStoreUnavailable.
        """
        assert self._files is not None
        # Not one that is being written.
        if key in self._saving or await self._run(self._files.has, *key):
            return
        if key in self._sets and key not in self._saving:
            self._drop(key)

    async def _run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs a method of the folder or tier on its threads."""
        assert self._files is not None
        return await asyncio.get_running_loop().run_in_executor(self._files.threads, work, *arguments)

    async def _is_complete(self, key: Key) -> bool:
        """Whether a set needs no upload and no write. Marks it as used now."""
        if self._files is None:
            is_complete = key in self._sets
        elif self._tier is not None:
            # Although the device may hold it: other servers must be able to read it.
            is_complete = await self._run(self._files.has, *key)
        else:
            is_complete = key in self._sets or self._files.has(*key)
        if is_complete and key in self._sets:
            self._sets.move_to_end(key)
        return is_complete

    def evict_first(self, principal: str, weights_id: bytes) -> None:
        """Marks a set as the least recently used one, until it is used again."""
        key = principal, weights_id
        if key in self._sets:
            self._sets.move_to_end(key, last=False)

    async def read(self, weights: WeightSet, leaf: int, offset: int) -> AsyncIterator[list[memoryview]]:
        """The elements of one leaf in chunks, from the byte `offset` on.

        Raises InvalidRequest for a leaf or an offset that does not exist.
        """
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
        """Drops expired uploads and leases."""
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
        for fitted in weights.fitted.values():
            self._stacks.drop(fitted.number)
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
        """Makes a set evictable if it has neither pins nor valid leases."""
        if weights.leases and weights.leased_until <= time.monotonic():
            weights.leases.clear()
        if not weights.pins and not weights.leases and self._sets.get(key) is weights:
            self._kept.discard(key)

    @property
    def _share_bytes(self) -> int:
        share = self._options.principal_bytes
        return self._options.budget_bytes if share is None else share

    def _check_size(self, size_bytes: int, place: str) -> None:
        """Raises WeightStoreFull for a set that has no room even in an empty store."""
        most = min(self._options.budget_bytes, self._share_bytes)
        if size_bytes > most:
            raise errors.WeightStoreFull(place=place, expected=f"at most {most} bytes", found=f"{size_bytes}")

    def _used_by(self, principal: str) -> int:
        return self._held_bytes[principal] + self._uploads.size_bytes_of(principal)

    def _reserve_for(self, principal: str, manifest: WeightsManifest) -> None:
        """Makes room for the tensors of a set that the store, or this principal, does not hold yet."""
        sizes = [(digest, tensor.size_bytes) for digest, tensor in manifest.distinct.items()]
        before = None
        # An evicted set may take tensors with it that this set shares: they need room too.
        while before != self._tensor_bytes:
            before = self._tensor_bytes
            absent = sum(size for digest, size in sizes if digest not in self._tensors)
            own = sum(size for digest, size in sizes if (principal, digest) not in self._held)
            self._reserve(principal, absent, own)

    def _reserve(self, principal: str, size_bytes: int, own_bytes: int | None = None) -> None:
        """Makes room by evicting the least recently used sets. Raises WeightStoreFull, and then evicts none.

        own_bytes: the additional bytes that count for the principal's share; None for `size_bytes`.
        """
        own_bytes = size_bytes if own_bytes is None else own_bytes
        missing = self.used_bytes + size_bytes - self._options.budget_bytes
        own_missing = self._used_by(principal) + own_bytes - self._share_bytes
        if missing + self.stacks_bytes > 0:
            self._stacks.free(missing + self.stacks_bytes)
        if missing <= 0 and own_missing <= 0:
            return
        for key in list(self._kept):
            self._let_go(key, self._sets[key])
        own_kept_bytes = self._kept_bytes(key for key in self._kept if key[0] == principal)
        if self._held_bytes[principal] - own_kept_bytes < own_missing:
            raise errors.WeightStoreFull(
                f"no room for {own_bytes} bytes: of this principal's {self._share_bytes}, {own_kept_bytes} are in use "
                f"or under a lease and {self._uploads.size_bytes_of(principal)} are being uploaded: delete or release "
                "weights, or retry later",
                retry_after_s=1.0,
            )
        kept_bytes = self._kept_bytes(self._kept)
        if self._tensor_bytes - kept_bytes < missing:
            raise errors.WeightStoreFull(
                # The sentence gives no sizes: they would reveal what other principals hold.
                f"no room for {size_bytes} bytes: too much is in use, under a lease, or being uploaded: delete or "
                "release weights, or retry later",
                retry_after_s=1.0,
            )
        self._evict(lambda key: key[0] == principal, lambda: self._used_by(principal) + own_bytes <= self._share_bytes)
        self._evict(lambda key: True, lambda: self.used_bytes + size_bytes <= self._options.budget_bytes)

    def _kept_bytes(self, keys: Iterable[Key]) -> int:
        """The size of these sets; a tensor that several of them hold counts once."""
        kept: dict[bytes, int] = {}
        for key in keys:
            kept.update((digest, one.size_bytes) for digest, one in self._sets[key].manifest.distinct.items())
        return sum(kept.values())

    def _evict(self, may_go: Callable[[Key], bool], is_enough: Callable[[], bool]) -> None:
        """Evicts sets, the least recently used first, until `is_enough` returns true."""
        for key in [key for key in self._sets if key not in self._kept and may_go(key)]:
            if is_enough():
                return
            self._drop(key)
            self._observer.weights_evicted()

    async def _read(self, key: Key) -> None:
        """Reads a set from disk and publishes it. Concurrent calls for the same set share one read."""
        reading = self._restoring.get(key)
        if reading is None:
            reading = self._restoring[key] = asyncio.ensure_future(self._read_once(key))
            reading.add_done_callback(lambda task: self._restored(key, task))
        await asyncio.shield(reading)

    def _restored(self, key: Key, task: asyncio.Future[None]) -> None:
        del self._restoring[key]
        # Every caller may have been cancelled: this prevents the warning that the exception was never retrieved.
        if not task.cancelled():
            task.exception()

    async def _read_once(self, key: Key) -> None:
        assert self._files is not None
        try:
            manifest = await self._run(self._files.manifest, *key)
            # Tensors that other principals hold are read too: skipping them would make the call faster and so reveal
            # that somebody else holds them.
            wanted = [tensor for digest, tensor in manifest.distinct.items() if not self._holds(key[0], digest)]
            self._reserve(key[0], sum(tensor.size_bytes for tensor in wanted))
            with self._uploads.reserved(key[0], sum(tensor.size_bytes for tensor in wanted)):
                placed = await self._run(self._place_from_disk, key, wanted)
        except FileNotFoundError:
            # No failure: the set was evicted from disk in the meantime, or the tier never had it.
            return
        except (OSError, errors.InvalidRequest) as error:
            _LOGGER.error("weights %s cannot be read from disk: %s", key[1].hex(), error)
            self._observer.weights_disk_failed("read", weight_files.reason(error))
            return
        if any(digest not in self._tensors and digest not in placed for digest in manifest.distinct):
            # A set that shared tensors with this one was evicted in the meantime.
            await self._read_once(key)
        elif key not in self._sets:
            self._publish(key, manifest, placed)

    def _place_from_disk(self, key: Key, wanted: Sequence[TensorManifest]) -> dict[bytes, Any]:
        assert self._files is not None
        return {tensor.digest: self._device.place(array) for tensor, array in self._files.tensors(*key, wanted)}

    async def _save(self, principal: str, manifest: WeightsManifest, placed: dict[bytes, Any]) -> None:
        assert self._files is not None
        arrays = ((tensor, self._device.fetch(placed[digest])) for digest, tensor in manifest.distinct.items())
        try:
            await self._run(self._files.save, principal, manifest, arrays)
        except OSError as error:
            # The set is served from memory until it is evicted or the process ends.
            self._observer.weights_disk_failed("write", weight_files.reason(error))
            _LOGGER.error("weights %s cannot be written to disk: %s", manifest.weights_id.hex(), error)


class _Use:
    """See `WeightStore.use`. A class, because a generator with contextlib costs several times as much per call."""

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


def _manifest(tree: TreeDef, leaves: Sequence[Any], fetch: Callable[[Any], Array]) -> WeightsManifest:
    manifest = WeightsManifest(tree, tuple(manifests.of_tensor(fetch(leaf)) for leaf in leaves))
    # Compute these cached properties here instead of later on the event loop.
    _ = manifest.weights_id, manifest.size_bytes
    return manifest
