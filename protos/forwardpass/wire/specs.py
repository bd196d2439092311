"""Specs: the dtypes, shapes and containers that arrays and structures must have, and their messages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from forwardpass import v1
from forwardpass.wire import dtypes, errors, trees


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """The dtype and shape that an array must have.

    shape: None in place of a dimension that may vary; None in place of the shape if the rank may vary.
    data_type: the element type on the wire.
    batched: the first dimension is the batch; it has the same size in all batched leaves of a call.
    """

    shape: tuple[int | None, ...] | None
    data_type: dtypes.DType
    batched: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the array in memory."""
        return self.data_type.numpy

    def admits_shape(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape fits."""
        if self.shape is None:
            return True
        if len(shape) != len(self.shape):
            return False
        for expected, found in zip(self.shape, shape, strict=False):
            if expected is not None and expected != found:
                return False
        return True

    def __str__(self) -> str:
        return f"{self.data_type}{describe_shape(self.shape)}"

    def __repr__(self) -> str:
        return f"TensorSpec(shape={self.shape}, dtype={self.data_type})"


def zeros(spec: TensorSpec, batch: int = 1, other: int = 1) -> dtypes.Array:
    """An array of zeros, or of empty strings, that fits a spec.

    batch: the size of the first dimension if it may vary. other: the size of other dimensions that may vary. If the
    rank may vary, the array has shape [batch].
    """
    dims = (None,) if spec.shape is None else spec.shape
    shape = [dim if dim is not None else other if index else batch for index, dim in enumerate(dims)]
    return np.full(shape, b"" if spec.data_type is dtypes.STRING else 0, spec.dtype)


def describe_shape(shape: Sequence[int | None] | None) -> str:
    """A shape for an error message: `[None,10]`, or `[...]` for any rank."""
    return "[...]" if shape is None else f"[{','.join(map(str, shape))}]"


@dataclasses.dataclass(frozen=True)
class StructureSpec:
    """The containers that a structure must have, and a spec for each leaf, in the order of the tree."""

    tree: trees.TreeDef
    leaves: tuple[TensorSpec, ...]

    @functools.cached_property
    def data_types(self) -> tuple[dtypes.DType, ...]:
        """The element types of the leaves on the wire."""
        return tuple(leaf.data_type for leaf in self.leaves)

    @classmethod
    def of(cls, value: trees.Nested, place: str = "spec") -> StructureSpec:
        """The spec of nested containers of TensorSpec. Raises StructureMismatch for other leaves."""
        tree, leaves = trees.flatten(value, place, is_leaf=lambda node: isinstance(node, TensorSpec))
        for leaf, path in zip(leaves, tree.paths(place), strict=True):
            if not isinstance(leaf, TensorSpec):
                raise errors.StructureMismatch(place=path, expected="a TensorSpec", found=type(leaf).__name__)
        return cls(tree, tuple(leaves))

    def nested(self) -> trees.Nested:
        """The containers with a TensorSpec for each leaf."""
        return self.tree.unflatten(self.leaves)

    def child(self, index: int) -> StructureSpec:
        """The spec of one item of the outermost container."""
        before = sum(child.num_leaves for child in self.tree.children[:index])
        tree = self.tree.children[index]
        return StructureSpec(tree, self.leaves[before : before + tree.num_leaves])

    def named_child(self, name: str) -> StructureSpec:
        """The spec of one key or field of the outermost mapping or named tuple."""
        return self.child(self.tree.names.index(name))

    @functools.cached_property
    def differentiable(self) -> StructureSpec:
        """The spec with None in place of each leaf that has no derivatives: integers, booleans and strings."""
        kept = [data_type.is_differentiable for data_type in self.data_types]
        leaves = tuple(leaf for leaf, is_kept in zip(self.leaves, kept, strict=True) if is_kept)
        return StructureSpec(self.tree.keeping(kept), leaves)

    def __str__(self) -> str:
        return str(self.tree.unflatten([_Text(str(leaf)) for leaf in self.leaves]))


class _Text(str):
    def __repr__(self) -> str:
        return str(self)


EMPTY = StructureSpec(trees.NONE, ())
"""The spec of None."""


def encode(spec: StructureSpec) -> v1.StructureSpec:
    """Encodes a spec."""
    message = v1.StructureSpec()
    message.tree.ParseFromString(spec.tree.encoded)
    message.leaves.extend(map(encode_tensor, spec.leaves))
    return message


def encode_tensor(spec: TensorSpec) -> v1.TensorSpec:
    """Encodes the spec of one tensor."""
    return v1.TensorSpec(
        data_type=cast(Any, spec.data_type.code),
        shape=[] if spec.shape is None else [-1 if dim is None else dim for dim in spec.shape],
        unknown_rank=spec.shape is None,
        batched=spec.batched,
    )


def decode(message: v1.StructureSpec, place: str = "spec") -> StructureSpec:
    """Decodes a spec. Raises InvalidRequest or a subclass for an invalid message."""
    tree = trees.decode(message.tree.SerializeToString(deterministic=True), place)
    if len(message.leaves) != tree.num_leaves:
        raise errors.StructureMismatch(
            place=place, expected=f"{tree.num_leaves} leaves", found=f"{len(message.leaves)}"
        )
    return StructureSpec(tree, tuple(map(decode_tensor, message.leaves, tree.paths(place))))


def decode_tensor(message: v1.TensorSpec, place: str = "spec") -> TensorSpec:
    """Decodes the spec of one tensor. Raises DTypeMismatch for an unknown data type."""
    dtype = dtypes.BY_CODE.get(message.data_type)
    if dtype is None:
        raise errors.DTypeMismatch(
            place=place, expected="a data type of the protocol", found=f"number {message.data_type}"
        )
    shape = None if message.unknown_rank else tuple(None if dim < 0 else dim for dim in message.shape)
    return TensorSpec(shape, dtype, message.batched)
