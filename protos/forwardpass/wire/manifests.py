"""Sets of weights by the hashes of what they hold: the same numbers have the same id everywhere."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import struct
from collections.abc import Sequence
from typing import Any

from forwardpass import v1
from forwardpass.wire import dtypes, errors, specs, tensors, trees
from forwardpass.wire.dtypes import Array, DType
from forwardpass.wire.limits import DEFAULT, Limits
from forwardpass.wire.specs import TensorSpec
from forwardpass.wire.structures import Structure

DIGEST_BYTES = 32

_TENSOR = b"forwardpass.tensor.v1\0"
_WEIGHTS = b"forwardpass.weights.v1\0"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorManifest:
    """One tensor without its numbers.

    digest: SHA-256, as weights.proto says. spec: without free dimensions. size_bytes: of its elements on the wire.
    """

    digest: bytes
    spec: TensorSpec
    size_bytes: int

    @property
    def shape(self) -> list[int]:
        return [dim or 0 for dim in self.spec.shape or ()]

    def decode(self, data: Any, place: str) -> Array:
        """The tensor whose elements fill a buffer: see `tensors.decode_elements`."""
        return tensors.decode_elements(data, self.spec.data_type, self.shape, place)


@dataclasses.dataclass(frozen=True)
class WeightsManifest:
    """A set of weights without its numbers. tensors: one for each leaf of `tree`, in order."""

    tree: trees.TreeDef
    tensors: tuple[TensorManifest, ...]

    @functools.cached_property
    def weights_id(self) -> bytes:
        """SHA-256 over the tree and the tensors' digests, as weights.proto says."""
        tree = self.tree.encoded
        hasher = hashlib.sha256(_WEIGHTS + struct.pack("<q", len(tree)) + tree)
        for tensor in self.tensors:
            hasher.update(tensor.digest)
        return hasher.digest()

    @functools.cached_property
    def distinct(self) -> dict[bytes, TensorManifest]:
        """The tensors by their digests, each once."""
        return {tensor.digest: tensor for tensor in self.tensors}

    @functools.cached_property
    def size_bytes(self) -> int:
        """What the set takes, tensors that stand in it several times counted once."""
        return sum(tensor.size_bytes for tensor in self.distinct.values())


def hasher_of(spec: TensorSpec) -> hashlib._Hash:
    """A hasher that gives a tensor's digest once it has been fed the tensor's elements."""
    shape = [dim or 0 for dim in spec.shape or ()]
    return hashlib.sha256(_TENSOR + struct.pack(f"<BB{len(shape)}q", spec.data_type.code, len(shape), *shape))


def of_tensor(array: Array, dtype: DType | None = None, place: str = "array") -> TensorManifest:
    """The manifest of an array. dtype: as of `tensors.encode`."""
    dtype = dtype or dtypes.of(array, place)
    data = tensors.element_bytes(array, dtype, place)
    spec = TensorSpec(array.shape, dtype)
    hasher = hasher_of(spec)
    hasher.update(data)
    return TensorManifest(hasher.digest(), spec, len(data))


def of_structure(structure: Structure, place: str) -> WeightsManifest:
    """The manifest of a set of weights."""
    wire_dtypes: Sequence[DType | None] = structure.dtypes or (None,) * len(structure.leaves)
    paths = structure.tree.paths(place)
    return WeightsManifest(structure.tree, tuple(map(of_tensor, structure.leaves, wire_dtypes, paths)))


def encode(manifest: WeightsManifest) -> v1.WeightsManifest:
    """A manifest as its message."""
    message = v1.WeightsManifest()
    message.tree.ParseFromString(manifest.tree.encoded)
    for tensor in manifest.tensors:
        message.tensors.add(digest=tensor.digest, spec=specs.encode_tensor(tensor.spec), size_bytes=tensor.size_bytes)
    return message


def decode(message: v1.WeightsManifest, limits: Limits = DEFAULT) -> WeightsManifest:
    """The manifest that a message holds, in which every size agrees with its shape.

    Raises InvalidRequest or a subclass, naming the leaf.
    """
    tree = trees.decode(message.tree.SerializeToString(deterministic=True), "manifest.tree", limits)
    if len(message.tensors) != tree.num_leaves:
        raise errors.StructureMismatch(
            place="manifest.tensors", expected=f"{tree.num_leaves}", found=f"{len(message.tensors)}"
        )
    # Of 65,536 tensors few differ in their specs.
    known: dict[tuple[bytes, int], TensorSpec] = {}
    manifest = WeightsManifest(
        tree,
        tuple(_tensor(tensor, index, known, limits) for index, tensor in enumerate(message.tensors)),
    )
    for index, tensor in enumerate(manifest.tensors):
        first = manifest.distinct[tensor.digest]
        if first is not tensor and first != tensor:
            raise errors.InvalidRequest(
                place=f"manifest.tensors[{index}]",
                expected=str(manifest.distinct[tensor.digest].spec),
                found=f"{tensor.spec} under the same digest",
            )
    return manifest


def _tensor(
    message: v1.TensorManifest, index: int, known: dict[tuple[bytes, int], TensorSpec], limits: Limits
) -> TensorManifest:
    """known: specs that were found to be sound, by their message and the size of the elements."""
    digest, size_bytes = message.digest, message.size_bytes
    if len(digest) != DIGEST_BYTES:
        check_digest(digest, f"manifest.tensors[{index}].digest")
    key = message.spec.SerializeToString(), size_bytes
    spec = known.get(key)
    if spec is None:
        spec = known[key] = _spec(message, f"manifest.tensors[{index}]", limits)
    return TensorManifest(digest, spec, size_bytes)


def _spec(message: v1.TensorManifest, place: str, limits: Limits) -> TensorSpec:
    """The spec of a tensor, which agrees with the size of its elements."""
    spec = specs.decode_tensor(message.spec, place)
    if spec.shape is None or None in spec.shape or len(spec.shape) > limits.max_rank:
        raise errors.ShapeMismatch(
            place=place, expected=f"at most {limits.max_rank} dimensions, none of them free", found=str(spec)
        )
    count = tensors.element_count([dim or 0 for dim in spec.shape], spec.data_type, place, limits)
    if spec.data_type is dtypes.STRING:
        is_sound = message.size_bytes >= count * tensors.STRING_LENGTH_BYTES
    else:
        is_sound = message.size_bytes == count * spec.data_type.itemsize
    if not is_sound:
        raise errors.ShapeMismatch(place=place, expected=f"the bytes of {spec}", found=f"{message.size_bytes}")
    return spec


def check_digest(digest: bytes, place: str) -> None:
    """Raises InvalidRequest for what cannot be a SHA-256."""
    if len(digest) != DIGEST_BYTES:
        raise errors.InvalidRequest(place=place, expected=f"{DIGEST_BYTES} bytes", found=f"{len(digest)}")
