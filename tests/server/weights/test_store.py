"""The weight store. Most tests run twice: in memory only, and with a folder."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import re
import subprocess
import weakref

import numpy as np
import pytest

from forwardpass.wire import errors, manifests, tensors
from forwardpass.wire.manifests import WeightsManifest
from forwardpass.wire.specs import StructureSpec, TensorSpec
from forwardpass.wire.structures import Structure
from forwardpass_server.models.placement import TensorFlowDevice
from forwardpass_server.weights.files import WeightFiles
from forwardpass_server.weights.store import Room, StoreOptions, WeightStore
from support import filesystems

KIB = 1024


@dataclasses.dataclass
class Counts:
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    disk_failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def weights_hit(self):
        self.hits += 1

    def weights_missed(self):
        self.misses += 1

    def weights_evicted(self):
        self.evictions += 1

    def weights_disk_failed(self, operation, reason):
        self.disk_failures.append((operation, reason))


class Set:
    """A set of weights: two tensors of 1 KiB from a seed; with `shared` the second is the same in all sets."""

    def __init__(self, seed: int, *, shared: bool = False, kib: int = 1) -> None:
        rng = np.random.default_rng(seed)
        leaves = [rng.standard_normal(KIB // 4 * kib).astype(np.float32)]
        leaves.append(np.ones(KIB // 4, np.float32) if shared else rng.standard_normal(KIB // 4).astype(np.float32))
        self.structure = Structure.of(((leaves[0],), (leaves[1],)))
        self.manifest: WeightsManifest = manifests.of_structure(self.structure, "w")
        self.id = self.manifest.weights_id

    def data(self, digest: bytes) -> bytes:
        index = [tensor.digest for tensor in self.manifest.tensors].index(digest)
        return bytes(tensors.element_bytes(self.structure.leaves[index]))


@pytest.fixture(params=["memory", "disk"])
def make(request, tmp_path):
    """Creates a store. Called again, it creates one with the same folder, as after a restart."""

    def make(
        budget_kib: float = 100, disk_kib: int = 1000, expiry_s: float = 60.0, share_kib: int | None = None
    ) -> tuple[WeightStore, Counts]:
        counts = Counts()
        files = WeightFiles(tmp_path / "weights", disk_kib * KIB) if request.param == "disk" else None
        share_bytes = None if share_kib is None else share_kib * KIB
        options = StoreOptions(
            budget_bytes=int(budget_kib * KIB), principal_bytes=share_bytes, upload_expiry_s=expiry_s
        )
        return WeightStore(options, TensorFlowDevice("/device:CPU:0"), counts, files), counts

    make.is_durable = request.param == "disk"
    return make


async def upload(store, one: Set, principal: str = "", chunk: int = 300) -> None:
    for digest, received in await store.put(principal, one.manifest):
        data = one.data(digest)
        for start in range(received, len(data), chunk):
            await store.upload(principal, digest, start, memoryview(data[start : start + chunk]))
    assert await store.put(principal, one.manifest) == []


async def numbers(store, one: Set, principal: str = "") -> list[np.ndarray]:
    async with store.use(principal, one.id) as weights:
        return [np.asarray(weights.leaf(index)) for index in range(2)]


async def holds(store, one: Set, principal: str = "") -> bool:
    try:
        found = await numbers(store, one, principal)
    except errors.WeightsNotFound:
        return False
    assert all(np.array_equal(a, b) for a, b in zip(found, one.structure.leaves, strict=True))
    return True


def test_only_uploaded_weights_are_found(make):
    async def run():
        store, counts = make()
        one, other = Set(1), Set(2)
        await upload(store, one)
        assert await holds(store, one)
        assert not await holds(store, other)
        assert (counts.hits, counts.misses) == (1, 1)
        assert store.used_bytes == 2 * KIB

    asyncio.run(run())


def test_a_shared_tensor_is_sent_and_stored_once(make):
    async def run():
        store, _ = make()
        first, second = Set(1, shared=True), Set(2, shared=True)
        await upload(store, first)
        missing = await store.put("", second.manifest)
        assert [digest for digest, _ in missing] == [second.manifest.tensors[0].digest]
        await upload(store, second)
        assert store.used_bytes == 3 * KIB
        assert store.tensor_count == 3
        await store.delete("", first.id)
        assert store.used_bytes == 2 * KIB
        assert await holds(store, second)

    asyncio.run(run())


def test_a_hash_gives_no_access_to_weights_of_others(make):
    async def run():
        store, _ = make()
        one = Set(1)
        await upload(store, one, "alice")
        assert await holds(store, one, "alice")
        assert not await holds(store, one, "mallory")
        # The store does not reveal that another principal has the tensors: this one must upload them too.
        assert len(await store.put("mallory", one.manifest)) == 2
        await upload(store, one, "mallory")
        assert await holds(store, one, "mallory")
        # They are still stored once.
        assert store.used_bytes == 2 * KIB
        await store.delete("mallory", one.id)
        assert await holds(store, one, "alice")
        with pytest.raises(errors.WeightsNotFound):
            await store.lease("mallory", one.id, b"l", 10)

    asyncio.run(run())


def test_an_upload_continues_where_it_stopped(make):
    async def run():
        store, _ = make()
        one = Set(1)
        ((digest, _), _) = await store.put("", one.manifest)
        await store.upload("", digest, 0, memoryview(one.data(digest)[:300]))
        assert dict(await store.put("", one.manifest))[digest] == 300
        # Bytes of a repeated or overlapping chunk that were received before are skipped.
        await store.upload("", digest, 0, memoryview(one.data(digest)[:200]))
        await store.upload("", digest, 100, memoryview(one.data(digest)[100:500]))
        assert dict(await store.put("", one.manifest))[digest] == 500
        await upload(store, one)
        assert await holds(store, one)

    asyncio.run(run())


def test_a_gap_is_refused_with_the_expected_offset(make):
    async def run():
        store, _ = make()
        one = Set(1)
        ((digest, _), _) = await store.put("", one.manifest)
        with pytest.raises(errors.UploadOutOfStep, match="offset: expected 0, got 300"):
            await store.upload("", digest, 300, memoryview(one.data(digest)[300:]))
        await upload(store, one)

    asyncio.run(run())


@pytest.mark.parametrize("fault", ["another hash", "too long", "negative offset"])
def test_a_failed_upload_is_dropped(make, fault):
    async def run():
        store, _ = make()
        one = Set(1)
        ((digest, _), _) = await store.put("", one.manifest)
        data, offset, error = one.data(digest), 0, errors.InvalidRequest
        if fault == "another hash":
            data, error = data[:-1] + bytes([data[-1] ^ 1]), errors.TensorCorrupted
        elif fault == "too long":
            data += b"x"
        else:
            offset = -1
        with pytest.raises(error):
            await store.upload("", digest, offset, memoryview(data))
        assert store.used_bytes == 0
        assert not await holds(store, one)
        with pytest.raises(errors.UploadOutOfStep, match="was not announced"):
            await store.upload("", digest, 0, memoryview(b"x"))
        await upload(store, one)
        assert await holds(store, one)

    asyncio.run(run())


def test_an_empty_tensor_and_one_of_strings_are_stored(make):
    async def run():
        store, _ = make()
        structure = Structure.of(((np.zeros((0, 3), np.float32),), (np.array([b"ab", b""], object),)))
        one = Set(1)
        one.structure, one.manifest = structure, manifests.of_structure(structure, "w")
        one.id = one.manifest.weights_id
        for digest, _ in await store.put("", one.manifest):
            await store.upload("", digest, 0, memoryview(one.data(digest)))
        assert await store.put("", one.manifest) == []
        found = await numbers(store, one)
        assert found[0].shape == (0, 3)
        assert found[1].tolist() == [b"ab", b""]

    asyncio.run(run())


def test_an_upload_without_data_is_dropped(make):
    async def run():
        store, _ = make(expiry_s=0.05)
        one = Set(1)
        ((first, _), (second, _)) = await store.put("", one.manifest)
        await store.upload("", first, 0, memoryview(one.data(first)))
        await store.upload("", second, 0, memoryview(one.data(second)[:10]))
        assert store.used_bytes == 2 * KIB
        store.sweep()
        assert store.used_bytes == 2 * KIB
        await asyncio.sleep(0.06)
        store.sweep()
        assert store.used_bytes == 0
        await upload(store, one)
        assert await holds(store, one)

    asyncio.run(run())


def test_the_least_recently_used_sets_are_evicted_first(make):
    async def run():
        store, counts = make(budget_kib=6)
        sets = [Set(seed) for seed in range(3)]
        for one in sets:
            await upload(store, one)
        assert await holds(store, sets[0])
        await upload(store, Set(3))
        assert store.used_bytes == 6 * KIB
        assert counts.evictions == 1
        assert [store.acquire("", one.id) is not None for one in sets] == [True, False, True]

    asyncio.run(run())


def test_sets_in_use_or_under_a_lease_are_not_evicted(make):
    async def run():
        store, _ = make(budget_kib=4)
        first, second = Set(1), Set(2)
        await upload(store, first)
        await upload(store, second)
        await store.lease("", second.id, b"lease", 60)
        async with store.use("", first.id):
            with pytest.raises(errors.WeightStoreFull, match="4096 are in use or under a lease") as caught:
                await upload(store, Set(3))
            assert caught.value.retry_after_s > 0
        await upload(store, Set(3))
        assert store.acquire("", first.id) is None
        assert await holds(store, second)
        await store.lease("", second.id, b"lease", 0)
        await upload(store, Set(4))
        await upload(store, Set(5))
        assert store.acquire("", second.id) is None

    asyncio.run(run())


def test_a_lease_ends_by_itself_and_leases_of_other_principals_continue(make):
    async def run():
        store, _ = make(budget_kib=2)
        one = Set(1)
        await upload(store, one)
        await store.lease("", one.id, b"short", 0.05)
        await store.lease("", one.id, b"long", 60)
        await asyncio.sleep(0.06)
        store.sweep()
        with pytest.raises(errors.WeightStoreFull):
            await upload(store, Set(2))
        await store.lease("", one.id, b"long", 0)
        await upload(store, Set(2))

    asyncio.run(run())


def test_weights_larger_than_the_store_are_refused_before_they_are_sent(make):
    async def run():
        store, _ = make(budget_kib=3)
        with pytest.raises(errors.WeightStoreFull, match="expected at most 3072 bytes, got 4096"):
            await store.put("", Set(1, kib=3).manifest)

    asyncio.run(run())


def test_delete_frees_the_memory_and_is_idempotent(make):
    async def run():
        store, _ = make()
        one = Set(1)
        await upload(store, one)
        async with store.use("", one.id) as weights:
            placed = weights.leaf(0)
            reference = weakref.ref(weights)
            await store.delete("", one.id)
            # A running use continues.
            assert np.array_equal(np.asarray(placed), one.structure.leaves[0])
        await store.delete("", one.id)
        assert store.used_bytes == 0
        assert not await holds(store, one)
        del weights, placed
        gc.collect()
        assert reference() is None

    asyncio.run(run())


def test_many_clients_may_send_the_same_weights_at_once(make):
    async def run():
        store, _ = make()
        one = Set(1, kib=20)
        await asyncio.gather(*(upload(store, one, chunk=100 + index) for index in range(8)))
        assert await holds(store, one)
        assert store.used_bytes == 21 * KIB

    asyncio.run(run())


def test_a_call_cancelled_in_the_middle_of_a_chunk_does_not_break_the_upload(make):
    async def run():
        store, _ = make()
        one = Set(1, kib=20)
        ((digest, _), _) = await store.put("", one.manifest)
        data = one.data(digest)
        task = asyncio.ensure_future(store.upload("", digest, 0, memoryview(data[: 10 * KIB])))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await upload(store, one)
        assert await holds(store, one)

    asyncio.run(run())


def test_weights_are_put_into_a_models_order_and_refused_if_they_do_not_fit(make):
    leaf = TensorSpec((KIB // 4,), manifests.of_tensor(np.float32(0)).spec.data_type)

    async def run():
        store, _ = make()
        one = Set(1)
        await upload(store, one)
        fits = StructureSpec.of([[leaf], [leaf]])
        other = StructureSpec.of(((leaf,), (TensorSpec((5,), leaf.data_type),)))
        async with store.use("", one.id) as weights:
            assert [np.asarray(found).tolist() for found in weights.leaves(b"a", fits)] == [
                expected.tolist() for expected in one.structure.leaves
            ]
            # The same object for the same model: the batcher compares identities.
            assert weights.leaves(b"a", fits) is weights.leaves(b"a", fits)
            with pytest.raises(errors.ShapeMismatch, match=r"model_weights\[1\]\[0\]: expected float32\[5\]"):
                weights.leaves(b"b", other)
            with pytest.raises(errors.StructureMismatch, match="model_weights"):
                weights.leaves(b"c", StructureSpec.of((leaf, leaf)))

    asyncio.run(run())


def test_a_restart_keeps_only_weights_on_disk(make):
    async def run():
        store, _ = make()
        one, deleted = Set(1), Set(2)
        await upload(store, one)
        await upload(store, deleted)
        await store.delete("", deleted.id)
        again, counts = make()
        assert await holds(again, one) is make.is_durable
        assert not await holds(again, deleted)
        assert counts.misses == 2
        if make.is_durable:
            assert await again.put("", one.manifest) == []

    asyncio.run(run())


def test_evicted_weights_are_restored_only_from_disk(make):
    async def run():
        store, _ = make(budget_kib=2)
        first, second = Set(1), Set(2)
        await upload(store, first)
        await upload(store, second)
        assert await holds(store, first) is make.is_durable
        assert store.used_bytes == 2 * KIB
        # Concurrent callers share one read.
        if make.is_durable:
            assert all(await asyncio.gather(*(holds(store, second) for _ in range(5))))

    asyncio.run(run())


def test_reading_gives_every_byte_after_an_offset(make):
    async def run():
        store, _ = make()
        one = Set(1)
        await upload(store, one)
        async with store.use("", one.id) as weights:
            found = [b"".join(chunk) async for chunk in store.read(weights, 1, 100)]
            assert b"".join(found) == one.data(one.manifest.tensors[1].digest)[100:]
            for leaf, offset in ((2, 0), (-1, 0), (0, KIB + 1), (0, -1)):
                with pytest.raises(errors.InvalidRequest):
                    await anext(store.read(weights, leaf, offset))

    asyncio.run(run())


def test_an_upload_of_many_tensors_may_take_longer_than_the_expiry(make):
    async def run():
        store, _ = make(expiry_s=0.3)
        one = Set(1)
        for digest, _ in await store.put("", one.manifest):
            data = one.data(digest)
            for start in range(0, KIB, KIB // 4):
                await asyncio.sleep(0.1)
                store.sweep()
                await store.upload("", digest, start, memoryview(data[start : start + KIB // 4]))
        store.sweep()
        assert await store.put("", one.manifest) == []
        assert await holds(store, one)

    asyncio.run(run())


def test_a_stored_digest_cannot_be_announced_with_another_shape(make):
    async def run():
        store, _ = make()
        one = Set(1)
        await upload(store, one)
        tensors_ = list(one.manifest.tensors)
        larger = dataclasses.replace(
            tensors_[0], spec=dataclasses.replace(tensors_[0].spec, shape=(KIB,)), size_bytes=4 * KIB
        )
        claim = dataclasses.replace(one.manifest, tensors=(larger, tensors_[1]))
        await store.delete("", one.id)
        await upload(store, Set(1, shared=True))
        with pytest.raises(errors.InvalidRequest, match=r"expected float32\[256\], got float32\[1024\]"):
            await store.put("", claim)

    asyncio.run(run())


def test_a_wrong_announcement_does_not_block_a_right_one(make):
    async def run():
        store, _ = make()
        one = Set(1)
        first = one.manifest.tensors[0]
        wrong = dataclasses.replace(first, spec=dataclasses.replace(first.spec, shape=(2,)), size_bytes=8)
        await store.put("", dataclasses.replace(one.manifest, tensors=(wrong, one.manifest.tensors[1])))
        await upload(store, one)
        assert await holds(store, one)

    asyncio.run(run())


@pytest.mark.parametrize("ttl_s", [-1, float("nan"), float("inf"), 1e308])
def test_an_infinite_lease_is_refused(make, ttl_s):
    async def run():
        store, _ = make()
        one = Set(1)
        await upload(store, one)
        with pytest.raises(errors.InvalidRequest, match="ttl_s: expected 0 to 2592000 seconds"):
            await store.lease("", one.id, b"lease", ttl_s)

    asyncio.run(run())


def test_leases_of_one_set_are_bounded(make):
    async def run():
        store, _ = make()
        one = Set(1)
        await upload(store, one)
        for number in range(1024):
            await store.lease("", one.id, number.to_bytes(16, "big"), 60)
        with pytest.raises(errors.WeightStoreFull, match="leases of these weights: expected at most 1024"):
            await store.lease("", one.id, b"another", 60)
        await store.lease("", one.id, (7).to_bytes(16, "big"), 60)

    asyncio.run(run())


def test_room_is_reserved_for_a_set_while_it_is_written(tmp_path):
    class Slow(WeightFiles):
        def save(self, *arguments):
            import time

            time.sleep(0.3)
            super().save(*arguments)

    async def run():
        options = StoreOptions(budget_bytes=3 * KIB, upload_expiry_s=0.05)
        store = WeightStore(options, TensorFlowDevice("/device:CPU:0"), Counts(), Slow(tmp_path, 100 * KIB))
        one = Set(1)
        putting = asyncio.ensure_future(upload(store, one))
        await asyncio.sleep(0.2)
        store.sweep()
        assert store.used_bytes == 2 * KIB
        # Other puts wait in the meantime, or find no room.
        again = asyncio.ensure_future(store.put("", one.manifest))
        deleting = asyncio.ensure_future(store.delete("", one.id))
        with pytest.raises(errors.WeightStoreFull):
            await upload(store, Set(2), "other")
        await asyncio.gather(putting, again, return_exceptions=True)
        await deleting
        assert store.used_bytes <= 3 * KIB
        store.sweep()

    asyncio.run(run())


def files(folder, kib: int = 100) -> WeightFiles:
    return WeightFiles(folder, kib * KIB)


def save(one: Set, target: WeightFiles, principal: str = "") -> None:
    target.save(principal, one.manifest, zip(one.manifest.tensors, one.structure.leaves, strict=True))


def test_a_corrupt_tensor_on_disk_is_detected_and_sent_again(tmp_path):
    async def run():
        one = Set(1)
        save(one, files(tmp_path))
        path = tmp_path / "tensors" / one.manifest.tensors[0].digest.hex()
        path.write_bytes(bytes(KIB))
        store, counts = over(files(tmp_path))
        assert not await holds(store, one)
        assert counts.disk_failures == [("read", "corrupt")]
        # After a new upload the set is complete.
        await upload(store, one)
        assert await holds(store, one)

    asyncio.run(run())


def test_a_tensor_that_cannot_be_read_from_disk_is_sent_again(tmp_path):
    async def run():
        one = Set(1)
        save(one, files(tmp_path))
        store, counts = over(files(tmp_path))
        path = tmp_path / "tensors" / one.manifest.tensors[0].digest.hex()
        path.unlink()
        path.mkdir()
        assert not await holds(store, one)
        assert counts.disk_failures == [("read", "error")]
        await upload(store, one)
        assert await holds(store, one)

    asyncio.run(run())


def test_a_failed_save_leaves_no_file(tmp_path):
    target = files(tmp_path)
    one = Set(1)

    def arrays():
        yield one.manifest.tensors[0], one.structure.leaves[0]
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        target.save("", one.manifest, arrays())
    assert list((tmp_path / "tensors").iterdir()) == []
    assert target.size_bytes == 0


def test_a_truncated_file_is_skipped_at_the_next_start(tmp_path):
    one, other = Set(1, shared=True), Set(2, shared=True)
    before = files(tmp_path)
    save(one, before)
    save(other, before)
    (tmp_path / "tensors" / one.manifest.tensors[0].digest.hex()).write_bytes(b"short")
    (tmp_path / "tensors" / ("00" * 32)).write_bytes(b"of no set")
    (tmp_path / "new" / "half").write_bytes(b"written")
    again = files(tmp_path)
    assert not again.has("", one.id)
    assert again.has("", other.id)
    assert again.size_bytes == 2 * KIB
    assert len(list((tmp_path / "tensors").iterdir())) == 2
    assert list((tmp_path / "new").iterdir()) == []


def test_the_folder_stays_below_its_limit(tmp_path):
    target = files(tmp_path, kib=5)
    sets = [Set(seed) for seed in range(3)]
    save(sets[0], target)
    save(sets[1], target)
    target.manifest("", sets[0].id)
    save(sets[2], target)
    assert [target.has("", one.id) for one in sets] == [True, False, True]
    assert target.size_bytes == sum(path.stat().st_size for path in (tmp_path / "tensors").iterdir()) == 4 * KIB
    with pytest.raises(OSError, match="the folder may hold at most"):
        save(Set(9, kib=9), target)


def over(target: WeightFiles) -> tuple[WeightStore, Counts]:
    counts = Counts()
    return WeightStore(StoreOptions(budget_bytes=100 * KIB), TensorFlowDevice("/device:CPU:0"), counts, target), counts


def test_a_set_over_the_limit_of_the_folder_is_served_from_memory(tmp_path):
    async def run():
        store, counts = over(files(tmp_path, kib=1))
        one = Set(1)
        await upload(store, one)
        assert await holds(store, one)
        assert counts.disk_failures == [("write", "limit")]

    asyncio.run(run())


def test_with_a_full_disk_weights_are_served_from_memory(tmp_path):
    async def run(folder):
        target = files(folder / "weights")
        store, counts = over(target)
        filler = folder / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(16 * KIB))
        one, other = Set(1, kib=20), Set(2, kib=20)
        await upload(store, one)
        assert await holds(store, one)
        assert counts.disk_failures == [("write", "full")]
        assert not target.has("", one.id)
        assert not list((folder / "weights" / "tensors").iterdir())
        assert not list((folder / "weights" / "new").iterdir())
        # A second put needs no upload. When there is room again, other sets are written.
        assert await store.put("", one.manifest) == []
        filler.unlink()
        await upload(store, other)
        assert target.has("", other.id)
        assert counts.disk_failures == [("write", "full")]

    with filesystems.mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as folder:
        asyncio.run(run(folder))


def test_a_disk_that_became_read_only_is_still_read(tmp_path):
    kept, new = Set(1), Set(2)

    async def run(target):
        store, counts = over(target)
        assert await holds(store, kept)
        await upload(store, new)
        assert await holds(store, new)
        assert counts.disk_failures == [("write", "denied")]
        # A file that cannot be deleted does not count any more.
        assert (target.set_count, target.size_bytes) == (0, 0)

    with filesystems.mounted(tmp_path / "small", "-t", "tmpfs", "tmpfs") as folder:
        save(kept, files(folder))
        # The limit has room for one of the sets.
        target = files(folder, kib=2)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        asyncio.run(run(target))


async def on_device(store, one: Set, principal: str) -> bool:
    weights = store.acquire(principal, one.id)
    if weights is not None:
        store.release(principal, one.id, weights)
    return weights is not None


def test_beyond_its_share_only_sets_of_the_same_principal_are_evicted(make):
    async def run():
        store, counts = make(budget_kib=10, share_kib=4)
        sets = [Set(seed) for seed in range(4)]
        await upload(store, sets[0], "bob")
        for one in sets[1:]:
            await upload(store, one, "alice")
        assert [await on_device(store, one, "alice") for one in sets[1:]] == [False, True, True]
        assert await on_device(store, sets[0], "bob")
        assert counts.evictions == 1
        assert store.used_bytes == 6 * KIB

    asyncio.run(run())


def test_weights_are_refused_if_the_share_is_in_use_and_nothing_is_evicted(make):
    async def run():
        store, counts = make(budget_kib=10, share_kib=4)
        one, other, third = Set(1), Set(2), Set(3)
        await upload(store, one, "alice")
        await upload(store, other, "alice")
        async with store.use("alice", one.id):
            await store.lease("alice", other.id, b"lease", 60)
            with pytest.raises(errors.WeightStoreFull, match="of this principal's 4096, 4096 are in use") as caught:
                await upload(store, third, "alice")
            assert caught.value.retry_after_s > 0
            assert counts.evictions == 0
            await upload(store, third, "bob")
        await upload(store, third, "alice")
        assert await on_device(store, other, "alice")
        with pytest.raises(errors.WeightStoreFull, match="manifest: expected at most 4096 bytes, got 6144"):
            await store.put("alice", Set(4, kib=5).manifest)

    asyncio.run(run())


def test_tensors_that_other_principals_hold_count_for_a_share(make):
    async def run():
        store, _ = make(budget_kib=10, share_kib=4)
        sets = [Set(seed) for seed in range(3)]
        for principal in ("bob", "alice"):
            for one in sets:
                await upload(store, one, principal)
        for principal in ("bob", "alice"):
            assert [await on_device(store, one, principal) for one in sets] == [False, True, True]
        assert store.used_bytes == 4 * KIB
        for one in sets:
            await store.delete("alice", one.id)
        await upload(store, sets[0], "alice")
        assert await on_device(store, sets[0], "alice")

    asyncio.run(run())


def test_uploads_count_for_a_share(make):
    async def run():
        store, _ = make(budget_kib=10, share_kib=3)
        one, other = Set(1), Set(2)
        for half in (one, other):
            ((digest, _), *_) = await store.put("alice", half.manifest)
            await store.upload("alice", digest, 0, memoryview(half.data(digest)[:100]))
        second = one.manifest.tensors[1].digest
        await store.upload("alice", second, 0, memoryview(one.data(second)))
        last = other.manifest.tensors[1].digest
        with pytest.raises(
            errors.WeightStoreFull, match=r"this principal's 3072, 0 are in use .* 3072 are being uploaded"
        ):
            await store.upload("alice", last, 0, memoryview(other.data(last)))
        await upload(store, other, "bob")

    asyncio.run(run())


def test_principals_have_separate_folders(tmp_path):
    target = files(tmp_path)
    one = Set(1)
    save(one, target, "alice")
    assert not target.has("mallory", one.id)
    save(one, target, "mallory")
    target.delete("alice", one.id)
    assert target.has("mallory", one.id)
    assert target.size_bytes == 2 * KIB
    assert target.tensor(one.manifest.tensors[0]).tolist() == one.structure.leaves[0].tolist()


class CountedDevice(TensorFlowDevice):
    """Counts the arrays that are placed."""

    placed = 0

    def place(self, array):
        self.placed += 1
        return super().place(array)


def test_weights_that_another_principal_holds_cause_the_same_work(tmp_path):
    one = Set(1)

    def written() -> int:
        """The number of tensor files written since the last call."""
        paths = list((tmp_path / "weights" / "tensors").iterdir())
        count = sum(path.stat().st_mtime != 1 for path in paths)
        for path in paths:
            os.utime(path, (1, 1))
        return count

    async def run():
        device = CountedDevice("/device:CPU:0")
        store = WeightStore(StoreOptions(budget_bytes=100 * KIB), device, Counts(), files(tmp_path / "weights"))
        await upload(store, one, "ann")
        assert (device.placed, written()) == (2, 2)
        await upload(store, one, "bob")
        assert (device.placed, written()) == (4, 2)
        assert store.tensor_count == 2
        # Work on tensors that the principal itself holds need not be repeated.
        other = Set(2)
        other.structure.leaves[0] = one.structure.leaves[0]
        other.manifest = manifests.of_structure(other.structure, "w")
        other.id = other.manifest.weights_id
        await upload(store, other, "bob")
        assert (device.placed, written()) == (5, 1)

    asyncio.run(run())


def test_a_full_store_does_not_reveal_weights_of_others(tmp_path):
    async def run():
        store = WeightStore(
            StoreOptions(budget_bytes=3 * KIB, principal_bytes=2 * KIB), TensorFlowDevice("/device:CPU:0"), Counts()
        )
        await upload(store, Set(1), "ann")
        async with store.use("ann", Set(1).id):
            with pytest.raises(errors.WeightStoreFull) as raised:
                await upload(store, Set(2), "bob")
        numbers = set(re.findall(r"\d+", str(raised.value)))
        # The size of the request: neither the 2048 bytes of the other principal nor the 3072 of the store.
        assert numbers == {"1024"}

    asyncio.run(run())


def placed(store, one: Set) -> list[object]:
    """The tensors of a set, as an operation of the device would leave them."""
    return [store._device.place(np.copy(leaf)) for leaf in one.structure.leaves]


async def add(store, one: Set, principal: str = "", room: Room | None = None) -> None:
    assert await store.add(principal, one.structure.tree, placed(store, one), room) == one.id


def test_a_computed_set_is_published_under_the_hash_of_its_contents(make):
    async def run():
        store, counts = make()
        one, other = Set(1), Set(2)
        await add(store, one)
        assert await holds(store, one)
        assert not await holds(store, one, "mallory")
        assert (store.used_bytes, store.set_count, counts.evictions) == (2 * KIB, 1, 0)
        # Like an uploaded set: a second one of the same contents changes nothing, and a put needs no upload.
        await add(store, one)
        assert await store.put("", one.manifest) == []
        assert (store.used_bytes, store.set_count) == (2 * KIB, 1)
        await store.delete("", one.id)
        assert store.used_bytes == 0
        await upload(store, other)
        await add(store, other)
        assert store.used_bytes == 2 * KIB
        again, _ = make()
        assert await holds(again, other) is make.is_durable
        assert not await holds(again, one)

    asyncio.run(run())


def test_a_computed_set_shares_equal_tensors(make):
    async def run():
        store, _ = make()
        first, second = Set(1, shared=True), Set(2, shared=True)
        await upload(store, first)
        await add(store, second)
        assert (store.used_bytes, store.tensor_count) == (3 * KIB, 3)
        async with store.use("", first.id) as one, store.use("", second.id) as other:
            assert one.leaf(1) is other.leaf(1)
        # The tensors of a computed set need no upload either.
        third = Set(3)
        third.structure.leaves[0] = second.structure.leaves[0]
        third.manifest = manifests.of_structure(third.structure, "w")
        assert [digest for digest, _ in await store.put("", third.manifest)] == [third.manifest.tensors[1].digest]

    asyncio.run(run())


def test_a_computed_set_may_hold_the_same_tensor_several_times_and_any_dtype(make):
    leaves = [np.float32([1, 2]), np.float32([1, 2]), np.array([b"ab", b""], object), np.zeros((0, 3)), np.int8(7)]

    async def run():
        store, _ = make()
        structure = Structure.of((tuple(leaves[:2]), tuple(leaves[2:])))
        weights_id = await store.add("", structure.tree, list(map(store._device.place, structure.leaves)))
        manifest = manifests.of_structure(structure, "w")
        assert weights_id == manifest.weights_id
        assert store.tensor_count == 4
        async with store.use("", weights_id) as weights:
            assert weights.manifest == manifest
            for index, leaf in enumerate(structure.leaves):
                found = np.asarray(weights.leaf(index))
                assert found.shape == leaf.shape
                assert np.array_equal(found, leaf)

    asyncio.run(run())


def test_a_computed_set_takes_room_like_an_uploaded_one(make):
    async def run():
        store, counts = make(budget_kib=10, share_kib=4)
        await upload(store, Set(1), "bob")
        for seed in (1, 2, 3):
            await add(store, Set(seed), "alice")
        assert [await on_device(store, Set(seed), "alice") for seed in (1, 2, 3)] == [False, True, True]
        assert (counts.evictions, store.used_bytes) == (1, 6 * KIB)
        async with store.use("alice", Set(2).id), store.use("alice", Set(3).id):
            with pytest.raises(errors.WeightStoreFull, match="of this principal's 4096, 4096 are in use") as caught:
                await add(store, Set(4), "alice")
            assert caught.value.retry_after_s > 0
        with pytest.raises(errors.WeightStoreFull, match="weights: expected at most 4096 bytes, got 6144"):
            await add(store, Set(4, kib=5), "alice")
        assert store.used_bytes == 6 * KIB

    asyncio.run(run())


def test_a_computed_set_has_room_although_a_tensor_that_it_shares_is_evicted(make):
    async def run():
        store, counts = make(budget_kib=6)
        await upload(store, Set(1, shared=True))
        await upload(store, Set(2))
        await upload(store, Set(3))
        # The first two sets must go for the larger tensor, and the third one for the shared tensor of the first.
        await add(store, Set(4, shared=True, kib=4))
        assert (store.used_bytes, counts.evictions) == (5 * KIB, 3)

    asyncio.run(run())


def test_room_is_kept_for_a_set_that_is_being_computed(make):
    async def run():
        store, counts = make(budget_kib=4)
        await upload(store, Set(1))
        await upload(store, Set(2))
        with store.room("", 2 * KIB) as room:
            assert counts.evictions == 1
            assert store.used_bytes == 4 * KIB
            async with store.use("", Set(2).id):
                with pytest.raises(errors.WeightStoreFull):
                    await upload(store, Set(3))
                await add(store, Set(4), room=room)
            assert store.used_bytes == 4 * KIB
        assert (store.used_bytes, counts.evictions) == (4 * KIB, 1)
        assert await holds(store, Set(2))
        assert await holds(store, Set(4))
        # A computation that fails gives its room back.
        with contextlib.suppress(ZeroDivisionError), store.room("", 4 * KIB):
            assert store.used_bytes == 4 * KIB
            raise ZeroDivisionError
        assert store.used_bytes == 0
        with pytest.raises(errors.WeightStoreFull, match="weights: expected at most 4096 bytes, got 5120"):
            with store.room("", 5 * KIB):
                pass

    asyncio.run(run())


def test_the_same_set_may_be_computed_and_uploaded_at_once(make):
    async def run():
        store, _ = make()
        # More tensors than are announced in one turn of the event loop.
        structure = Structure.of((tuple(np.arange(300, dtype=np.float32)), ()))
        manifest = manifests.of_structure(structure, "w")
        data = {
            tensor.digest: bytes(tensors.element_bytes(leaf))
            for tensor, leaf in zip(manifest.tensors, structure.leaves, strict=True)
        }

        async def put() -> None:
            while missing := await store.put("", manifest):
                for digest, received in missing:
                    with contextlib.suppress(errors.UploadOutOfStep):
                        await store.upload("", digest, received, memoryview(data[digest][received:]))

        def compute():
            return store.add("", structure.tree, list(map(store._device.place, structure.leaves)))

        for _ in range(3):
            await asyncio.gather(*(one for _ in range(3) for one in (put(), compute())))
            async with store.use("", manifest.weights_id) as weights:
                assert [float(np.asarray(weights.leaf(index))) for index in range(300)] == list(range(300))
            assert store.set_count == 1
            await store.delete("", manifest.weights_id)
            assert store.tensor_count == 0

    asyncio.run(run())


def test_a_computed_set_is_served_from_memory_if_the_disk_fails(tmp_path):
    async def run():
        store, counts = over(files(tmp_path, kib=1))
        await add(store, Set(1))
        assert await holds(store, Set(1))
        assert counts.disk_failures == [("write", "limit")]

    asyncio.run(run())


def test_a_cancelled_publication_leaves_no_room_taken(make):
    async def run():
        store, _ = make(budget_kib=4)
        with store.room("", 2 * KIB) as room:
            adding = asyncio.ensure_future(add(store, Set(1), room=room))
            await asyncio.sleep(0)
            adding.cancel()
            await asyncio.gather(adding, return_exceptions=True)
            assert adding.cancelled()
        assert store.used_bytes == 0
        await upload(store, Set(1))
        await add(store, Set(2))
        assert store.used_bytes == 4 * KIB

    asyncio.run(run())
