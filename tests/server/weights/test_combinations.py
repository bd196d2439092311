"""Combinations of the sets of a store, in memory only and with a folder."""

from __future__ import annotations

import asyncio
import threading

import ml_dtypes
import numpy as np
import pytest

from forwardpass.wire import errors, manifests
from forwardpass.wire.structures import Structure
from forwardpass_server.models.placement import CPU, TensorFlowDevice
from forwardpass_server.weights import combinations
from forwardpass_server.weights.combinations import Combinations
from forwardpass_server.weights.files import WeightFiles
from forwardpass_server.weights.store import StoreOptions, WeightStore

KIB = 1024


class Unobserved:
    def weights_hit(self):
        pass

    def weights_missed(self):
        pass

    def weights_evicted(self):
        pass

    def weights_disk_failed(self, operation, reason):
        raise AssertionError((operation, reason))


class World:
    """A store on a CPU and its combinations."""

    def __init__(self, folder=None, *, budget_kib: float = 1000, device: TensorFlowDevice | None = None) -> None:
        files = None if folder is None else WeightFiles(folder / "weights", 2**20)
        self.device = device or TensorFlowDevice(CPU)
        self.store = WeightStore(StoreOptions(budget_bytes=int(budget_kib * KIB)), self.device, Unobserved(), files)
        self.combinations = Combinations(self.store, self.device)

    async def add(self, trainable, non_trainable=(), principal: str = "") -> bytes:
        structure = Structure.of((trainable, non_trainable))
        return await self.store.add(principal, structure.tree, list(map(self.device.place, structure.leaves)))

    async def get(self, weights_id: bytes, principal: str = ""):
        async with self.store.use(principal, weights_id) as weights:
            leaves = [np.copy(self.device.fetch(weights.leaf(index))) for index in range(len(weights.manifest.tensors))]
            return weights.manifest.tree.unflatten(leaves)

    async def combine(self, *terms, principal: str = "", **options: bool) -> bytes:
        combinations.check(terms)
        return await self.combinations.combine(principal, terms, **options)


@pytest.fixture(params=["memory", "disk"])
def make(request, tmp_path):
    def make(**options) -> World:
        return World(tmp_path if request.param == "disk" else None, **options)

    make.has_files = request.param == "disk"
    return make


def vector(seed: int, kib: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(kib * KIB // 4).astype(np.float32)


def test_a_combination_is_the_sum_of_its_terms_under_the_hash_of_its_contents(make):
    async def run():
        world = make()
        first, second = await world.add((vector(1),)), await world.add((vector(2),))
        found = await world.combine((first, 0.25), (second, -2.0), (first, 1.0))
        wanted = vector(1) * np.float32(0.25) + vector(2) * np.float32(-2) + vector(1)
        ((leaf,), _) = await world.get(found)
        assert np.array_equal(leaf, wanted)
        assert found == manifests.of_structure(Structure.of(((wanted,), ())), "w").weights_id
        # The sets do not change, and nothing stays pinned or reserved.
        assert np.array_equal((await world.get(first))[0][0], vector(1))
        assert world.store.used_bytes == 3 * KIB
        assert not world.store._kept

    asyncio.run(run())


def test_every_dtype_is_summed_or_must_be_equal(make):
    bfloat16 = ml_dtypes.bfloat16
    summed = [np.float16, bfloat16, np.float32, np.float64, np.complex64, np.complex128]
    rng = np.random.default_rng(1)
    first = [
        np.asarray(rng.standard_normal((2, 3)) * (1 + 2j if dtype(0).dtype.kind == "c" else 1)) for dtype in summed
    ]
    first = [array.astype(dtype) for array, dtype in zip(first, summed, strict=True)]
    same = [np.int8(3), np.uint32([1, 2]), np.array([True]), np.array([b"a", b""], object), np.zeros((0, 2), np.int64)]
    scalars = [np.float32(2), np.array(3, bfloat16), np.zeros((0, 3), np.float32)]

    async def run():
        world = make()
        ids = [
            await world.add((*first, *scalars), tuple(same)),
            await world.add(tuple((array * array.dtype.type(2)) for array in (*first, *scalars)), tuple(same)),
        ]
        trainable, non_trainable = await world.get(await world.combine((ids[0], 1.0), (ids[1], 0.5)))
        # A product with 2 and with 0.5 is exact in every dtype, and so is the sum of two equal numbers.
        for found, array in zip(trainable, (*first, *scalars), strict=True):
            assert found.dtype == array.dtype
            assert np.array_equal(found, array * array.dtype.type(2))
        for found, array in zip(non_trainable, same, strict=True):
            assert found.dtype == array.dtype
            assert np.array_equal(found, array)

    asyncio.run(run())


def test_low_precision_is_summed_in_float32_and_everything_in_float64_on_request(make):
    async def run():
        world = make()
        # 1 + 1000 / 4096 is no sum of float16 numbers: 1 + 1 / 4096 is rounded to 1.
        one = await world.add((np.float16([1]), np.array([1], ml_dtypes.bfloat16), np.float32([1])))
        small = await world.add((np.float16([2**-12]), np.array([2**-12], ml_dtypes.bfloat16), np.float32([2**-25])))
        terms = [(one, 1.0), *[(small, 1.0)] * 1024]
        (half, brain, single), _ = await world.get(await world.combine(*terms))
        assert (float(half[0]), float(brain[0]), float(single[0])) == (1.25, 1.25, 1.0)
        (half, brain, single), _ = await world.get(await world.combine(*terms, float64=True))
        assert (float(half[0]), float(brain[0]), float(single[0])) == (1.25, 1.25, 1 + 2**-15)

    asyncio.run(run())


def test_a_leaf_may_be_none_in_any_set_but_the_first(make):
    async def run():
        world = make()
        weights = await world.add({"a": np.float32([1]), "b": np.int32([5])}, (np.float32([7]),))
        gradients = await world.add({"a": np.float32([10]), "b": None}, (None,))
        trainable, (other,) = await world.get(await world.combine((weights, 1.0), (gradients, -0.5)))
        assert {name: array.tolist() for name, array in trainable.items()} == {"a": [-4], "b": [5]}
        assert other.tolist() == [7]
        with pytest.raises(
            errors.StructureMismatch, match=r"^terms\[1\]\.trainable\['b'\]: expected None, got an array$"
        ):
            await world.combine((gradients, 1.0), (weights, 1.0))

    asyncio.run(run())


REFUSED = [
    (((np.zeros((784, 10), np.float32),), ()), errors.ShapeMismatch,
     "terms[1].trainable[0]: expected float32[784,128], got float32[784,10]"),
    (((np.zeros((784, 128), np.float64),), ()), errors.DTypeMismatch,
     "terms[1].trainable[0]: expected float32[784,128], got float64[784,128]"),
    (((np.zeros((784, 128), np.float32),) * 2, ()), errors.StructureMismatch,
     "terms[1].trainable: expected tuple of 1, got tuple of 2"),
    (([np.zeros((784, 128), np.float32)], ()), errors.StructureMismatch,
     "terms[1].trainable: expected tuple of 1, got list of 1"),
    (((np.zeros((784, 128), np.float32),), (np.int32(1),)), errors.StructureMismatch,
     "terms[1].non_trainable: expected tuple of 0, got tuple of 1"),
    ((({"w": np.zeros((784, 128), np.float32)},), ()), errors.StructureMismatch,
     "terms[1].trainable[0]: expected an array, got dict of 1 (w)"),
]  # fmt: skip


@pytest.mark.parametrize("value, error, sentence", REFUSED, ids=[sentence for _, _, sentence in REFUSED])
def test_sets_that_differ_are_refused_by_term_and_leaf(value, error, sentence):
    async def run():
        world = World(budget_kib=4000)
        first = await world.add((np.zeros((784, 128), np.float32),))
        other = await world.add(*value)
        with pytest.raises(error) as raised:
            await world.combine((first, 1.0), (other, 1.0), (first, 1.0))
        assert str(raised.value) == sentence
        assert not world.store._kept
        assert world.store.set_count == 2

    asyncio.run(run())


@pytest.mark.parametrize(
    "one, other", [(np.int32([1]), np.int32([2])), (np.array(b"a", object), np.array(b"b", object))]
)
def test_integers_and_strings_that_differ_are_refused(one, other):
    async def run():
        world = World()
        ids = [await world.add((np.float32([1]),), (leaf,)) for leaf in (one, other)]
        with pytest.raises(
            errors.InvalidRequest, match=r"^terms\[1\]\.non_trainable\[0\]: expected the same .* as in terms\[0\]"
        ):
            await world.combine((ids[0], 1.0), (ids[1], 1.0))

    asyncio.run(run())


def test_integers_and_strings_of_the_first_set_are_taken_on_request(make):
    def weights(seed: int) -> tuple:
        return (vector(seed),), (np.uint32([seed, 7]), np.array(seed > 1), np.array([b"a" * seed], object))

    async def run():
        world = make()
        ids = [await world.add(*weights(seed)) for seed in (1, 2, 3)]
        terms = [(one, coefficient) for one, coefficient in zip(ids, (0.5, 0.25, 0.25), strict=True)]
        (leaf,), integers = await world.get(await world.combine(*terms, integers_of_first=True))
        assert np.array_equal(leaf, vector(1) * np.float32(0.5) + vector(2) / 4 + vector(3) / 4)
        for found, wanted in zip(integers, weights(1)[1], strict=True):
            assert found.dtype == wanted.dtype
            assert np.array_equal(found, wanted)
        # Shapes and dtypes must agree still.
        for wrong, error, found in [
            (np.uint32([1]), errors.ShapeMismatch, r"uint32\[1\]"),
            (np.int32([1, 7]), errors.DTypeMismatch, r"int32\[2\]"),
        ]:
            other = await world.add((vector(1),), (wrong, *weights(1)[1][1:]))
            with pytest.raises(error, match=rf"^terms\[1\]\.non_trainable\[0\]: expected uint32\[2\], got {found}$"):
                await world.combine((ids[0], 1.0), (other, 1.0), integers_of_first=True)

    asyncio.run(run())


def test_terms_that_no_sets_could_make_valid_are_refused():
    async def run():
        world = World()
        one = await world.add((np.float32([1]),))
        for terms, sentence in [
            ([], "terms: expected 1 to 16384 terms, got 0"),
            ([(one, 1.0)] * 16385, "terms: expected 1 to 16384 terms, got 16385"),
            ([(one, 1.0), (b"short", 1.0)], "terms[1].weights_id: expected 32 bytes, got 5"),
            ([(one, float("nan"))], "terms[0].coefficient: expected a finite number, got nan"),
            ([(one, 1.0), (one, -float("inf"))], "terms[1].coefficient: expected a finite number, got -inf"),
            (
                [(one, 1e39)],
                "terms[0].coefficient: expected a number that float32 can hold, or the option float64, got 1e+39",
            ),
        ]:
            with pytest.raises(errors.InvalidRequest) as raised:
                await world.combine(*terms)
            assert str(raised.value) == sentence
        assert np.isinf((await world.get(await world.combine((one, 1e39), float64=True)))[0][0])

    asyncio.run(run())


def test_unknown_sets_and_those_of_others_are_not_found(make):
    async def run():
        world = make()
        own = await world.add((vector(1),), principal="alice")
        foreign = await world.add((vector(2),), principal="bob")
        sentences = []
        for wrong in (foreign, b"\1" * 32):
            for terms in ([(own, 1.0), (wrong, 1.0)], [(wrong, 1.0), (own, 1.0)]):
                with pytest.raises(errors.WeightsNotFound) as raised:
                    await world.combine(*terms, principal="alice")
                sentences.append(str(raised.value).replace(wrong.hex(), "ID"))
        assert len(set(sentences)) == 1
        assert not world.store._kept

    asyncio.run(run())


def test_sets_are_not_evicted_while_they_are_read():
    class Slow(TensorFlowDevice):
        begun, may_end = threading.Event(), threading.Event()

        def add(self, *arguments):
            self.begun.set()
            assert self.may_end.wait(60)
            return super().add(*arguments)

    async def run():
        world = World(budget_kib=4, device=Slow(CPU))
        first, second = await world.add((vector(1),)), await world.add((vector(2),))
        combining = asyncio.ensure_future(world.combine((first, 1.0), (second, 1.0)))
        await asyncio.to_thread(Slow.begun.wait, 60)
        # The sets and the sum take 3 KiB.
        assert world.store.used_bytes == 3 * KIB
        with pytest.raises(errors.WeightStoreFull):
            await world.add((vector(3, kib=2),))
        await world.store.delete("", second)
        Slow.may_end.set()
        ((leaf,), _) = await world.get(await combining)
        assert np.array_equal(leaf, vector(1) + vector(2))
        await world.add((vector(3, kib=4),))

    asyncio.run(run())


def test_a_combination_without_room_is_refused_and_evicts_none_of_its_terms():
    async def run():
        world = World(budget_kib=4)
        other = await world.add((vector(9),))
        ids = [await world.add((vector(seed),)) for seed in range(3)]
        # The other set makes room for the sum.
        found = await world.combine(*((one, 1.0) for one in ids))
        with pytest.raises(errors.WeightsNotFound):
            await world.get(other)
        await world.store.delete("", found)
        more = await world.add((vector(3),))
        with pytest.raises(errors.WeightStoreFull):
            await world.combine(*((one, 1.0) for one in (*ids, more)))
        assert world.store.set_count == 4
        with pytest.raises(errors.WeightStoreFull):
            await world.combine((ids[0], 1.0), (ids[1], 1.0), (more, 1.0), float64=True)

    asyncio.run(run())


def test_sets_on_disk_are_combined_although_they_do_not_fit_together(tmp_path):
    async def run():
        world = World(tmp_path, budget_kib=5)
        ids = [await world.add((vector(seed),)) for seed in range(20)]
        assert world.store.set_count == 5
        ((leaf,), _) = await world.get(await world.combine(*((one, 1.0) for one in ids)))
        wanted = vector(0)
        for seed in range(1, 20):
            wanted = wanted + vector(seed)
        assert np.array_equal(leaf, wanted)
        # Those that are on the device at the beginning, too.
        present = ids[-2:]
        ((leaf,), _) = await world.get(await world.combine(*((one, 1.0) for one in (*present, *ids[:8]))))
        assert world.store.used_bytes <= 5 * KIB
        assert not world.store._kept

    asyncio.run(run())


def test_thousands_of_terms_are_added_in_parts_that_change_no_bit(make):
    async def run():
        world = make()
        ids = [await world.add((vector(seed)[:3],)) for seed in range(7)]
        terms = [(ids[number % 7], 1 / (number + 1)) for number in range(5000)]
        ((leaf,), _) = await world.get(await world.combine(*terms))
        wanted = np.zeros(3, np.float32)
        for number in range(5000):
            wanted = wanted + vector(number % 7)[:3] * np.float32(1 / (number + 1))
        assert np.array_equal(leaf, wanted)
        # Released in several turns of the event loop.
        for _ in range(5000 // combinations._PINS_AT_ONCE + 1):
            await asyncio.sleep(0)
        assert not world.store._kept

    asyncio.run(run())


def test_a_cancelled_combination_leaves_nothing_pinned_or_reserved(make):
    async def run():
        world = make()
        ids = [await world.add((vector(seed),)) for seed in range(3)]
        used_bytes = world.store.used_bytes
        for turns in range(12):
            combining = asyncio.ensure_future(world.combine(*((one, 2.0) for one in ids)))
            for _ in range(turns):
                await asyncio.sleep(0)
            combining.cancel()
            await asyncio.gather(combining, return_exceptions=True)
            if not combining.cancelled():
                break
            assert not world.store._kept
            assert world.store.used_bytes == used_bytes
        await world.combine(*((one, 2.0) for one in ids))

    asyncio.run(run())
