"""Linear combinations of sets of weights, as weights.proto defines them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from forwardpass.wire import dtypes, errors, manifests
from forwardpass.wire.dtypes import DType
from forwardpass.wire.manifests import WeightsManifest
from forwardpass.wire.trees import Kind, TreeDef
from forwardpass_server.weights.store import Device, Room, WeightSet, WeightStore

Term = tuple[bytes, float]
"""A weights id and its coefficient."""

MAX_TERMS = 2**14
"""The clients of a large round of federated averaging. A request has 0.7 MB then, and its sets cost the event loop some
50 ms in all. A longer sum can begin with the result of another one as its first term.
"""

# Added in one go on the thread, before another combination gets its turn: about 100 ms.
_TERMS_AT_ONCE = 1024

# Sets that are read from a tier at the same time.
_READ_AHEAD = 16
_TENSORS_AT_ONCE = 2**14
_BYTES_AT_ONCE = 2**30

# Sets that are pinned or released in one turn of the event loop: about 1 ms.
_PINS_AT_ONCE = 256

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Combinations:
    """Computes combinations of the sets of a store, one part of one combination at a time."""

    def __init__(self, store: WeightStore, device: Device) -> None:
        self._store = store
        self._device = device
        # Sums are as fast as the memory, so more threads would not be faster.
        self._turn = asyncio.Lock()

    async def combine(
        self, principal: str, terms: Sequence[Term], float64: bool = False, integers_of_first: bool = False
    ) -> bytes:
        """Publishes the sum of sets, each multiplied by its coefficient. Returns the id of the result.

        terms: see `check`. float64, integers_of_first: see CombineWeightsRequest. The sets are pinned while they are
        read.
        Raises InvalidRequest or a subclass, which names the term and the leaf, WeightsNotFound, WeightStoreFull,
        OutOfMemory.
        """
        pins = _Pins(self._store, principal, [weights_id for weights_id, _ in terms])
        try:
            await pins.hold_present()
            combination = _Combination((await pins.get(0)).manifest, self._device, float64, integers_of_first)
            with self._room(principal, combination.size_bytes, pins) as room:
                start = 0
                while start < len(terms):
                    sets = await self._next(pins, start, len(terms))
                    coefficients = [coefficient for _, coefficient in terms[start : start + len(sets)]]
                    async with self._turn:
                        await asyncio.to_thread(combination.add, start, sets, coefficients)
                    pins.release(start, start + len(sets))
                    start += len(sets)
                async with self._turn:
                    leaves = await asyncio.to_thread(combination.finish)
                return await self._store.add(principal, combination.tree, leaves, room)
        finally:
            pins.close()

    @contextlib.contextmanager
    def _room(self, principal: str, size_bytes: int, pins: _Pins) -> Iterator[Room]:
        """Room for the sums. Sets that can be read from disk again make room if necessary."""
        with contextlib.ExitStack() as stack:
            try:
                room = stack.enter_context(self._store.room(principal, size_bytes))
            except errors.WeightStoreFull:
                if not self._store.has_files or not pins.release(1, None):
                    raise
                room = stack.enter_context(self._store.room(principal, size_bytes))
            yield room

    async def _next(self, pins: _Pins, start: int, end: int) -> list[WeightSet]:
        """The sets to add in one go, from the term `start` on: at least one."""
        sets: list[WeightSet] = []
        tensors = size_bytes = 0
        if self._store.is_shared:
            await pins.read_ahead(start, min(start + _READ_AHEAD, end))
        while start + len(sets) < end and len(sets) < _TERMS_AT_ONCE:
            try:
                weights = await pins.get(start + len(sets))
            except errors.WeightStoreFull:
                if not sets:
                    raise
                break
            sets.append(weights)
            tensors += len(weights.manifest.tensors)
            size_bytes += weights.manifest.size_bytes
            if tensors >= _TENSORS_AT_ONCE or size_bytes >= _BYTES_AT_ONCE:
                break
        return sets


class _Pins:
    """The sets that one combination has pinned, by the number of their term."""

    def __init__(self, store: WeightStore, principal: str, ids: Sequence[bytes]) -> None:
        self._store = store
        self._principal = principal
        self._ids = ids
        self._held: dict[int, WeightSet] = {}

    async def hold_present(self) -> None:
        """Pins the sets that are on the device, so that no other call evicts them."""
        for number, weights_id in enumerate(self._ids):
            if number and number % _PINS_AT_ONCE == 0:
                await asyncio.sleep(0)
            weights = self._store.acquire(self._principal, weights_id)
            if weights is not None:
                self._held[number] = weights
            elif not self._store.has_files:
                # Raises WeightsNotFound.
                await self.get(number)

    async def get(self, number: int) -> WeightSet:
        """The set of a term, which is read from disk if needed. Raises WeightsNotFound or WeightStoreFull."""
        if number not in self._held:
            try:
                await self._hold(number)
            except errors.WeightStoreFull:
                # The sets of later terms can be read from disk again.
                if not self.release(number + 1, None):
                    raise
                await self._hold(number)
        return self._held[number]

    async def read_ahead(self, start: int, end: int) -> None:
        """Reads the sets of these terms at the same time, as far as there is room. `get` raises the errors."""
        wanted = [number for number in range(start, end) if number not in self._held]
        await asyncio.gather(*map(self._hold, wanted), return_exceptions=True)

    async def _hold(self, number: int) -> None:
        names = self._principal, self._ids[number]
        self._held[number] = self._store.acquire(*names) or await self._store.restore(*names)

    def release(self, start: int, end: int | None) -> bool:
        """Releases the sets of the terms from `start` to before `end`; None for all. Returns whether there were any."""
        numbers = [number for number in self._held if start <= number and (end is None or number < end)]
        for number in numbers:
            self._store.release(self._principal, self._ids[number], self._held.pop(number))
        return bool(numbers)

    def close(self) -> None:
        """Releases all sets; of many, some in each turn of the event loop."""
        for number in list(itertools.islice(self._held, _PINS_AT_ONCE)):
            self._store.release(self._principal, self._ids[number], self._held.pop(number))
        if self._held:
            asyncio.get_running_loop().call_soon(self.close)


class _Combination:
    """The sums of one combination, one for each leaf. Its methods are called on threads, one at a time.

    first: the manifest of the first set, whose structure the others must have.
    """

    def __init__(self, first: WeightsManifest, device: Device, float64: bool, integers_of_first: bool) -> None:
        self.tree = first.tree
        self._manifest = first
        self._device = device
        self._dtypes = [_sum_dtype(tensor.spec.data_type, float64) for tensor in first.tensors]
        self._integers_of_first = integers_of_first
        self._results: list[Any] = [None] * len(first.tensors)

    @property
    def size_bytes(self) -> int:
        """The memory of the sums. The result needs no further memory, because each sum is freed when it is rounded."""
        return sum(
            math.prod(tensor.shape) * dtype.itemsize
            for tensor, dtype in zip(self._manifest.tensors, self._dtypes, strict=True)
            if dtype is not None
        )

    def add(self, start: int, sets: Sequence[WeightSet], coefficients: Sequence[float]) -> None:
        """Adds sets to the sums. start: the number of the first one's term.

        Raises StructureMismatch, DTypeMismatch, ShapeMismatch or InvalidRequest, which names the term and the leaf.
        """
        columns: list[list[tuple[Any, float]]] = [[] for _ in self._dtypes]
        for number, (weights, coefficient) in enumerate(zip(sets, coefficients, strict=True), start):
            self._check_coefficient(number, coefficient)
            indices = self._match(number, weights.manifest)
            for leaf, index in enumerate(indices):
                if index is None:
                    continue
                if self._dtypes[leaf] is not None:
                    columns[leaf].append((weights.leaf(index), coefficient))
                elif not number:
                    self._results[leaf] = weights.leaf(index)
        for leaf, (column, dtype) in enumerate(zip(columns, self._dtypes, strict=True)):
            if column and dtype is not None:
                self._results[leaf] = self._device.add(self._results[leaf], column, dtype)

    def finish(self) -> list[Any]:
        """The placed tensors of the result, in the order of the tree."""
        for leaf, (tensor, dtype) in enumerate(zip(self._manifest.tensors, self._dtypes, strict=True)):
            if dtype is not None:
                self._results[leaf] = self._device.rounded(self._results[leaf], tensor.spec.dtype)
        return self._results

    def _check_coefficient(self, number: int, coefficient: float) -> None:
        if abs(coefficient) > _FLOAT32_MAX and any(dtype in (np.float32, np.complex64) for dtype in self._dtypes):
            raise errors.InvalidRequest(
                place=f"terms[{number}].coefficient",
                expected="a number that float32 can hold, or the option float64",
                found=f"{coefficient}",
            )

    def _match(self, number: int, manifest: WeightsManifest) -> Sequence[int | None]:
        """For each leaf of the first set, the index of the same leaf of another; None where that set has None."""
        first = self._manifest
        if manifest is first:
            return range(len(first.tensors))
        is_same = manifest.tree == first.tree
        indices = range(len(first.tensors)) if is_same else _positions(first.tree, manifest.tree, number)
        for leaf, index in enumerate(indices):
            if index is None:
                continue
            wanted, found = first.tensors[leaf], manifest.tensors[index]
            if found.spec != wanted.spec:
                is_same_dtype = found.spec.data_type is wanted.spec.data_type
                error = errors.ShapeMismatch if is_same_dtype else errors.DTypeMismatch
                self._refuse(error, number, leaf, str(wanted.spec), str(found.spec))
            is_summed = self._dtypes[leaf] is not None
            if not is_summed and not self._integers_of_first and found.digest != wanted.digest:
                expected = (
                    f"the same {wanted.spec} as in terms[0], because such leaves are not combined, or the option to "
                    "take them from the first term"
                )
                self._refuse(errors.InvalidRequest, number, leaf, expected, "other values")
        return indices

    def _refuse(self, error: type[errors.InvalidRequest], number: int, leaf: int, expected: str, found: str) -> None:
        place = _paths(self._manifest.tree, number)[leaf]
        raise error(place=place, expected=expected, found=found)


def check(terms: Sequence[Term]) -> None:
    """Raises InvalidRequest for terms that no sets could make valid. Thread-safe; takes some ms for the most terms."""
    if not 1 <= len(terms) <= MAX_TERMS:
        raise errors.InvalidRequest(place="terms", expected=f"1 to {MAX_TERMS} terms", found=f"{len(terms)}")
    for number, (weights_id, coefficient) in enumerate(terms):
        if len(weights_id) != manifests.DIGEST_BYTES:
            manifests.check_digest(weights_id, f"terms[{number}].weights_id")
        if not math.isfinite(coefficient):
            raise errors.InvalidRequest(
                place=f"terms[{number}].coefficient", expected="a finite number", found=f"{coefficient}"
            )


def _sum_dtype(dtype: DType, float64: bool) -> np.dtype[Any] | None:
    """The dtype in which a leaf is summed; None for a leaf that is not summed."""
    if not dtype.is_differentiable:
        return None
    if dtype.numpy.kind == "c":
        return np.dtype(np.complex128 if float64 else dtype.numpy)
    is_long = float64 or dtype is dtypes.BY_NAME["float64"]
    return np.dtype(np.float64 if is_long else np.float32)


def _root(tree: TreeDef, number: int, index: int) -> str:
    """The place of a child of the root in an error: `terms[3].trainable`."""
    if tree.kind is Kind.TUPLE and len(tree.children) == 2:
        return f"terms[{number}].{('trainable', 'non_trainable')[index]}"
    return tree.child_path(f"terms[{number}]", index)


def _paths(tree: TreeDef, number: int) -> list[str]:
    """The place of each leaf of a term in an error."""
    if tree.kind is Kind.LEAF:
        return [f"terms[{number}]"]
    return [path for index, child in enumerate(tree.children) for path in child.paths(_root(tree, number, index))]


def _positions(first: TreeDef, found: TreeDef, number: int) -> list[int | None]:
    """For each leaf of the first tree, the index of the leaf of another; None where that one has None.

    Raises StructureMismatch, which names the container.
    """
    positions: list[int | None] = []
    leaves = itertools.count()

    def walk(wanted: TreeDef, tree: TreeDef, place: str) -> None:
        if wanted.kind is Kind.LEAF and tree.kind is Kind.NONE:
            positions.append(None)
            return
        is_same = (wanted.kind, wanted.type_name, wanted.names) == (tree.kind, tree.type_name, tree.names)
        if not is_same or len(wanted.children) != len(tree.children):
            raise errors.StructureMismatch(place=place, expected=_container(wanted), found=_container(tree))
        if tree.kind is Kind.LEAF:
            positions.append(next(leaves))
        for index, (child, other) in enumerate(zip(wanted.children, tree.children, strict=True)):
            is_root = wanted is first
            walk(child, other, _root(first, number, index) if is_root else wanted.child_path(place, index))

    walk(first, found, f"terms[{number}]")
    return positions


# Names of a container that an error quotes.
_NAMES_SHOWN = 8


def _container(tree: TreeDef) -> str:
    """A container in an error: its kind, its length, and some of its names."""
    if tree.kind in (Kind.LEAF, Kind.NONE):
        return "an array" if tree.kind is Kind.LEAF else "None"
    name = tree.type_name or tree.kind.value
    more = ", ..." if len(tree.names) > _NAMES_SHOWN else ""
    names = f" ({', '.join(tree.names[:_NAMES_SHOWN])}{more})" if tree.names else ""
    return f"{name} of {len(tree.children)}{names}"
