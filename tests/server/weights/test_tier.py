"""The tier of weights that servers share: two stores over one tier, once in a folder and once in S3."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import threading

import numpy as np
import pytest

from forwardpass.wire import errors, manifests, tensors
from forwardpass.wire.structures import Structure
from forwardpass_server.models.placement import TensorFlowDevice
from forwardpass_server.storage.objects import StoreUnreachable
from forwardpass_server.weights import tier as weight_tier
from forwardpass_server.weights.combinations import Combinations
from forwardpass_server.weights.deletions import Deletions
from forwardpass_server.weights.store import StoreOptions, WeightStore
from forwardpass_server.weights.tier import WeightTier
from support.servers import wait_until

KIB = 1024
DEVICE = TensorFlowDevice("/device:CPU:0")


@dataclasses.dataclass
class Events:
    """What a store and its tier report."""

    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    read: list[int] = dataclasses.field(default_factory=list)
    written: list[int] = dataclasses.field(default_factory=list)

    def weights_hit(self):
        pass

    def weights_missed(self):
        pass

    def weights_evicted(self):
        pass

    def weights_disk_failed(self, operation, reason):
        raise AssertionError("a tier is no folder")

    def weights_tier_read(self, size_bytes, seconds):
        assert seconds >= 0
        self.read.append(size_bytes)

    def weights_tier_written(self, size_bytes, seconds):
        assert seconds >= 0
        self.written.append(size_bytes)

    def weights_tier_failed(self, operation, reason):
        self.failures.append((operation, reason))


class Failing:
    """An object store that fails in calls whose name and object a test chooses."""

    def __init__(self, store):
        self._store = store
        self.fails = lambda call, name: None
        self.calls: list[tuple[str, str]] = []

    def __getattr__(self, call):
        method = getattr(self._store, call)
        if not callable(method):
            return method

        def called(*arguments):
            name = arguments[0] if arguments else ""
            self.calls.append((call, name))
            error = self.fails(call, name)
            if error is not None:
                raise error
            return method(*arguments)

        return called


@dataclasses.dataclass
class Replica:
    """One server's part: its store on the device, and its view of the tier."""

    store: WeightStore
    tier: WeightTier
    objects: Failing
    events: Events
    deletions: Deletions


def replica(place, budget_kib: int = 100_000) -> Replica:
    objects, events = Failing(place.store()), Events()
    tier = WeightTier(objects, events)
    tier.open()
    store = WeightStore(StoreOptions(budget_bytes=budget_kib * KIB), DEVICE, events, tier)
    return Replica(store, tier, objects, events, Deletions(store, tier))


@pytest.fixture
def place(places):
    return places.make()


class Set:
    """A set of two tensors: one of `kib` KiB from a seed, and one of 1 KiB; with `backbone_kib` a third in all sets."""

    def __init__(self, seed: int, kib: int = 1, backbone_kib: int = 0) -> None:
        rng = np.random.default_rng(seed)
        leaves = [rng.standard_normal(KIB // 4 * kib).astype(np.float32), rng.standard_normal(256).astype(np.float32)]
        backbone = [np.arange(KIB // 4 * backbone_kib, dtype=np.float32)] if backbone_kib else []
        self.structure = Structure.of((tuple(leaves), tuple(backbone)))
        self.manifest = manifests.of_structure(self.structure, "w")
        self.id = self.manifest.weights_id

    def data(self, digest: bytes) -> bytes:
        index = [tensor.digest for tensor in self.manifest.tensors].index(digest)
        return bytes(tensors.element_bytes(self.structure.leaves[index]))


async def upload(store: WeightStore, one: Set, principal: str = "") -> int:
    """Puts a set. Returns the number of bytes that were uploaded."""
    uploaded = 0
    for digest, received in await store.put(principal, one.manifest):
        data = one.data(digest)
        await store.upload(principal, digest, received, memoryview(data)[received:])
        uploaded += len(data)
    assert await store.put(principal, one.manifest) == []
    return uploaded


async def assert_holds(store: WeightStore, one: Set, principal: str = "") -> None:
    async with store.use(principal, one.id) as weights:
        for index, expected in enumerate(one.structure.leaves):
            np.testing.assert_array_equal(np.asarray(weights.leaf(index)), expected)


async def holds(store: WeightStore, one: Set, principal: str = "") -> bool:
    try:
        await assert_holds(store, one, principal)
    except errors.WeightsNotFound:
        return False
    return True


def names(place, prefix: str = "") -> list[str]:
    return [one.name for one in place.store().list(prefix)]


def test_a_set_that_one_server_has_acknowledged_is_used_by_another(place):
    async def run():
        one, other = replica(place), replica(place)
        small, large = Set(1), Set(2, kib=40_000)
        for weights in (small, large):
            await upload(one.store, weights)
            await assert_holds(other.store, weights)
        assert one.events.written == [small.manifest.size_bytes, large.manifest.size_bytes]
        assert other.events.read == one.events.written
        assert not await holds(other.store, Set(3))
        assert other.events.failures == []

    asyncio.run(run())


def test_a_set_that_is_in_the_tier_is_not_uploaded_again(place):
    async def run():
        one, other = replica(place), replica(place)
        weights = Set(1)
        await upload(one.store, weights)
        assert await other.store.put("", weights.manifest) == []

    asyncio.run(run())


def test_a_large_tensor_that_another_server_has_written_is_not_uploaded_again(place):
    async def run():
        one, other = replica(place), replica(place)
        first, second = Set(1, backbone_kib=100), Set(2, backbone_kib=100)
        assert await upload(one.store, first) == 102 * KIB
        assert await upload(other.store, second) == 2 * KIB
        await assert_holds(other.store, second)
        await assert_holds(one.store, second)
        # Another principal gets no advantage of it.
        assert await upload(other.store, second, "mallory") == 102 * KIB
        backbone = first.manifest.tensors[2].digest.hex()
        assert sum(name.endswith(backbone) for name in names(place, "tensors/")) == 2

    asyncio.run(run())


def test_a_damaged_tensor_of_another_set_is_uploaded(place):
    async def run():
        one, other = replica(place), replica(place)
        first, second = Set(1, backbone_kib=100), Set(2, backbone_kib=100)
        await upload(one.store, first)
        backbone = first.manifest.tensors[2].digest.hex()
        (name,) = [name for name in names(place) if name.endswith(backbone)]
        place.store().write(name, bytes(100 * KIB))
        assert await upload(other.store, second) == 102 * KIB

    asyncio.run(run())


def test_a_principal_has_no_access_to_the_sets_of_another_one(place):
    async def run():
        one, other = replica(place), replica(place)
        weights = Set(1)
        await upload(one.store, weights, "alice")
        assert await holds(other.store, weights, "alice")
        for server in (one, other):
            assert not await holds(server.store, weights, "mallory")
            # Neither does the delete of a set that others have put.
            await server.store.delete("mallory", weights.id)
        assert len(await other.store.put("mallory", weights.manifest)) == 2
        # What the tier is asked for names the principal alone, so its answers show nothing of others.
        folder = hashlib.sha256(b"mallory").hexdigest()
        other.objects.calls.clear()
        assert not await holds(other.store, weights, "mallory")
        await other.store.put("mallory", Set(2, kib=100).manifest)
        assert other.objects.calls
        assert all(folder in name for _, name in other.objects.calls)
        assert await holds(one.store, weights, "alice")

    asyncio.run(run())


def test_a_deleted_set_is_gone_for_every_server(place):
    async def run():
        one, other, third = replica(place), replica(place), replica(place)
        deleted, kept = Set(1, backbone_kib=100), Set(2, backbone_kib=100)
        for weights in (deleted, kept):
            await upload(one.store, weights)
            await assert_holds(other.store, weights)
        await one.store.delete("", deleted.id)
        assert not await holds(one.store, deleted)
        # One that has not used it yet.
        assert not await holds(third.store, deleted)
        await other.deletions.follow()
        assert not await holds(other.store, deleted)
        # A set that shares a tensor stays usable, also where the device does not have it.
        for server in (one, other, third):
            await assert_holds(server.store, kept)

    asyncio.run(run())


def test_a_set_that_was_put_again_after_its_deletion_stays(place):
    async def run():
        one, other = replica(place), replica(place)
        weights = Set(1)
        await upload(one.store, weights)
        await assert_holds(other.store, weights)
        await one.store.delete("", weights.id)
        await upload(one.store, weights)
        await other.deletions.follow()
        assert other.store.keys() == [("", weights.id)]
        await assert_holds(other.store, weights)

    asyncio.run(run())


def test_a_put_of_a_set_on_the_device_is_acknowledged_only_if_the_tier_has_it(place):
    async def run():
        one, other = replica(place), replica(place)
        weights = Set(1)
        await upload(one.store, weights)
        await assert_holds(other.store, weights)
        await one.store.delete("", weights.id)
        # It has not followed the deletion yet. The put needs no upload, and makes the set usable everywhere.
        assert await other.store.put("", weights.manifest) == []
        await assert_holds(one.store, weights)

    asyncio.run(run())


def test_a_server_that_was_cut_off_for_long_checks_every_set(place, monkeypatch):
    async def run():
        one, other = replica(place), replica(place)
        deleted, kept = Set(1), Set(2)
        for weights in (deleted, kept):
            await upload(one.store, weights)
            await assert_holds(other.store, weights)
        await one.store.delete("", deleted.id)
        # Its notice was removed in the meantime.
        (notice,) = names(place, "deleted/")
        place.store().remove(notice)
        await other.deletions.follow()
        assert other.store.set_count == 2
        monkeypatch.setattr(weight_tier, "_NOTICE_S", 0.0)
        await other.deletions.follow()
        assert other.store.keys() == [("", kept.id)]

    asyncio.run(run())


def test_notices_of_deletions_are_removed_after_some_time(place, monkeypatch):
    async def run():
        one = replica(place)
        weights = Set(1)
        await upload(one.store, weights)
        await one.store.delete("", weights.id)
        await one.deletions.follow()
        assert len(names(place, "deleted/")) == 1
        monkeypatch.setattr(weight_tier, "_NOTICE_S", 0.0)
        await one.deletions.follow()
        assert names(place, "deleted/") == []

    asyncio.run(run())


def damaged(place, weights: Set, how: str) -> None:
    """Damages what the tier holds of a set."""
    store = place.store()
    digest = weights.manifest.tensors[0].digest.hex()
    (tensor,) = [name for name in names(place, "tensors/") if name.endswith(digest)]
    (manifest,) = [name for name in names(place, "sets/") if name.endswith(weights.id.hex())]
    match how:
        case "other bytes":
            store.write(tensor, bytes(KIB))
        case "truncated":
            store.write(tensor, store.read(tensor)[:-1])
        case "empty":
            store.write(tensor, b"")
        case "missing":
            store.remove(tensor)
        case "manifest of another set":
            store.write(manifest, manifests.encode(Set(9).manifest).SerializeToString())
        case "no manifest":
            store.write(manifest, b"\xff\xff")


@pytest.mark.parametrize(
    "how", ["other bytes", "truncated", "empty", "missing", "manifest of another set", "no manifest"]
)
def test_damaged_objects_are_not_used_and_can_be_put_again(place, how):
    async def run():
        one, other = replica(place), replica(place)
        weights = Set(1)
        await upload(one.store, weights)
        damaged(place, weights, how)
        assert not await holds(other.store, weights)
        assert other.events.failures == [("read", "corrupt")]
        await upload(other.store, weights)
        await assert_holds(replica(place).store, weights)

    asyncio.run(run())


def test_a_read_that_fails_once_is_repeated(place):
    async def run():
        one, other = replica(place), replica(place)
        weights = Set(1)
        await upload(one.store, weights)
        missed: list[str] = []

        def late(call, name):
            if call == "read_into" and name not in missed:
                missed.append(name)
                return FileNotFoundError(name)
            return None

        other.objects.fails = late
        await assert_holds(other.store, weights)
        assert len(missed) == 2
        assert other.events.failures == []

    asyncio.run(run())


def test_a_set_is_visible_only_when_all_its_tensors_are_written(place):
    async def run():
        one, other = replica(place), replica(place)
        weights = Set(1)
        digest = weights.manifest.tensors[1].digest.hex()
        one.objects.fails = lambda call, name: (
            StoreUnreachable("cut") if call == "write" and name.endswith(digest) else None
        )
        with pytest.raises(errors.WeightStoreUnavailable):
            await upload(one.store, weights)
        assert names(place, "sets/") == []
        assert not await holds(other.store, weights)
        # Not acknowledged, but the numbers are on the device: the next put needs no upload.
        one.objects.fails = lambda call, name: None
        await one.deletions.follow()
        assert await one.store.put("", weights.manifest) == []
        await assert_holds(other.store, weights)

    asyncio.run(run())


def test_without_an_answer_of_the_tier_sets_on_the_device_are_used(place):
    async def run():
        one, other = replica(place), replica(place)
        there, elsewhere = Set(1), Set(2)
        await upload(one.store, there)
        await upload(other.store, elsewhere)
        one.objects.fails = lambda call, name: StoreUnreachable("no answer")
        for _ in range(2):
            await assert_holds(one.store, there)
            with pytest.raises(errors.WeightStoreUnavailable) as caught:
                await assert_holds(one.store, elsewhere)
            assert caught.value.retry_after_s == 1.0
            with pytest.raises(errors.WeightStoreUnavailable):
                await one.store.put("", Set(3).manifest)
            with pytest.raises(errors.WeightStoreUnavailable):
                await one.store.delete("", elsewhere.id)
        # The first failure ends the waiting of others: they fail at once, until `follow` gets an answer.
        assert one.events.failures == [("read", "unreachable")]
        assert one.tier.problem == "no answer"
        with pytest.raises(errors.WeightStoreUnavailable):
            await one.deletions.follow()
        one.objects.fails = lambda call, name: None
        await one.deletions.follow()
        assert one.tier.problem == ""
        await assert_holds(one.store, elsewhere)

    asyncio.run(run())


@pytest.mark.parametrize(
    "error, reason, expected",
    [
        (OSError(28, "no space left"), "full", errors.WeightStoreFull),
        (PermissionError(13, "denied"), "denied", errors.WeightStoreUnavailable),
        (OSError(5, "broken"), "error", errors.WeightStoreUnavailable),
        (FileNotFoundError(2, "no bucket"), "error", errors.WeightStoreUnavailable),
    ],
)
def test_a_tier_that_cannot_be_written_has_a_reason(place, error, reason, expected):
    async def run():
        one = replica(place)
        weights = Set(1)
        one.objects.fails = lambda call, name: error if call == "write" else None
        with pytest.raises(expected) as caught:
            await upload(one.store, weights)
        # Callers are not told where the tier is.
        assert str(error) not in str(caught.value)
        assert one.events.failures == [("write", reason)]
        # Other calls go on.
        await assert_holds(one.store, weights)
        one.objects.fails = lambda call, name: None
        await upload(one.store, weights)

    asyncio.run(run())


def test_several_servers_write_the_same_set_at_once(place):
    async def run():
        servers = [replica(place) for _ in range(4)]
        sets = [Set(seed, kib=100) for seed in range(4)]
        await asyncio.gather(*(upload(server.store, one) for server in servers for one in sets))
        fresh = replica(place)
        for one in sets:
            await assert_holds(fresh.store, one)
        assert len(names(place, "tensors/")) == 8

    asyncio.run(run())


def test_computed_sets_are_kept_too(place):
    async def run():
        one, other = replica(place), replica(place)
        first, second = Set(1), Set(2)
        await upload(one.store, first)
        await upload(one.store, second)
        # On a server that has neither: it reads both at the same time.
        mean = await Combinations(other.store, DEVICE).combine("", [(first.id, 0.5), (second.id, 0.5)])
        third = replica(place)
        async with third.store.use("", mean) as weights:
            for index, leaves in enumerate(zip(first.structure.leaves, second.structure.leaves, strict=True)):
                # Exact: a float32 sum of two halves, in one order.
                np.testing.assert_array_equal(
                    np.asarray(weights.leaf(index)), leaves[0] * np.float32(0.5) + leaves[1] * np.float32(0.5)
                )

    asyncio.run(run())


def test_a_computed_set_is_not_acknowledged_without_the_tier(place):
    async def run():
        one = replica(place)
        arrays = [np.ones(8, np.float32), np.zeros(8, np.float32)]
        tree = Structure.of(((arrays[0],), (arrays[1],))).tree
        one.objects.fails = lambda call, name: OSError(5, "broken") if call == "write" else None
        for _ in range(2):
            with pytest.raises(errors.WeightStoreUnavailable):
                await one.store.add_arrays("", tree, arrays)
        one.objects.fails = lambda call, name: None
        weights_id = await one.store.add_arrays("", tree, arrays)
        async with replica(place).store.use("", weights_id) as weights:
            assert np.asarray(weights.leaf(0)).tolist() == [1.0] * 8

    asyncio.run(run())


def test_a_combination_of_missing_sets_names_the_error(place):
    async def run():
        one = replica(place)
        weights = Set(1)
        await upload(one.store, weights)
        with pytest.raises(errors.WeightsNotFound):
            await Combinations(one.store, DEVICE).combine("", [(weights.id, 0.5), (Set(2).id, 0.5)])
        # Nothing stays pinned: a set that needs nearly all of the budget has room.
        small = replica(place, budget_kib=5)
        with pytest.raises(errors.WeightsNotFound):
            await Combinations(small.store, DEVICE).combine("", [(weights.id, 0.5), (Set(2).id, 0.5)])
        await upload(small.store, Set(3, kib=3))

    asyncio.run(run())


def test_sets_of_a_combination_may_exceed_the_budget(place):
    async def run():
        sets = [Set(seed) for seed in range(8)]
        one = replica(place)
        for weights in sets:
            await upload(one.store, weights)
        small = replica(place, budget_kib=8)
        mean = await Combinations(small.store, DEVICE).combine("", [(weights.id, 0.125) for weights in sets])
        async with one.store.use("", mean) as weights:
            expected = sum(one.structure.leaves[0].astype(np.float64) for one in sets) / 8
            # Eight additions in float32.
            np.testing.assert_allclose(np.asarray(weights.leaf(0)), expected, atol=8 * 2**-24 * 4)

    asyncio.run(run())


def test_reads_of_many_sets_run_at_the_same_time_and_leave_the_event_loop_free(place):
    async def run():
        one, other = replica(place), replica(place)
        sets = [Set(seed) for seed in range(40)]
        for weights in sets:
            await upload(one.store, weights)
        reading, most, turns = set(), 0, 0
        lock, enough = threading.Lock(), threading.Event()

        def wait(call, name):
            nonlocal most
            if call == "read":
                with lock:
                    reading.add(name)
                    most = max(most, len(reading))
                    if len(reading) == 16:
                        enough.set()
                assert enough.wait(30), "the reads wait for each other"
                with lock:
                    reading.discard(name)

        other.objects.fails = wait
        uses = asyncio.gather(*(assert_holds(other.store, weights) for weights in sets))
        while not uses.done():
            await asyncio.sleep(0)
            turns += 1
        await uses
        # 16 sets at once, and no more.
        assert most == 16
        assert turns > 1

    asyncio.run(run())


def test_a_cancelled_read_does_not_pin_the_set(place):
    async def run():
        one, other = replica(place), replica(place, budget_kib=3)
        weights = Set(1)
        await upload(one.store, weights)
        going, go = threading.Event(), threading.Event()

        def wait(call, name):
            if call == "read":
                going.set()
                assert go.wait(30)

        other.objects.fails = wait
        reading = asyncio.ensure_future(assert_holds(other.store, weights))
        await asyncio.to_thread(going.wait, 30)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        go.set()
        # The read goes on for others who may wait for it.
        await asyncio.to_thread(wait_until, lambda: other.store.set_count == 1)
        other.objects.fails = lambda call, name: None
        # The store has room for one of the sets.
        await upload(other.store, Set(2))
        await assert_holds(other.store, weights)

    asyncio.run(run())


def test_a_lease_protects_on_the_device_of_its_server_only(place):
    async def run():
        one, other = replica(place, budget_kib=3), replica(place, budget_kib=3)
        leased, next_one = Set(1), Set(2)
        await upload(one.store, leased)
        await one.store.lease("", leased.id, bytes(16), 60)
        with pytest.raises(errors.WeightStoreFull):
            await upload(one.store, next_one)
        await assert_holds(other.store, leased)
        await upload(other.store, next_one)
        # Evicted there, and read again.
        await assert_holds(other.store, leased)

    asyncio.run(run())
