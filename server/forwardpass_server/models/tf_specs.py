"""Specs between the wire's terms and TensorFlow's."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from forwardpass.wire import dtypes, errors, trees
from forwardpass.wire.specs import StructureSpec, TensorSpec


def to_wire(value: Any, place: str) -> StructureSpec:
    """The spec of a structure of tf.TensorSpec, tensors or placeholders.

    Raises StructureMismatch or DTypeMismatch, naming the leaf, for ragged and sparse tensors and for resources.
    """
    tree, leaves = trees.flatten(value, place, is_leaf=lambda node: isinstance(node, (tf.TensorSpec, tf.TensorShape)))
    paths = tree.paths(place)
    return StructureSpec(tree, tuple(_leaf(leaf, path) for leaf, path in zip(leaves, paths, strict=True)))


def _leaf(value: Any, place: str) -> TensorSpec:
    if not isinstance(value, (tf.TensorSpec, tf.Tensor)):
        raise errors.StructureMismatch(place=place, expected="a dense tensor", found=type(value).__name__)
    data_type = dtypes.BY_NAME.get(value.dtype.name)
    if data_type is None:
        raise errors.DTypeMismatch(place=place, expected="a data type of the protocol", found=value.dtype.name)
    shape = None if value.shape.rank is None else tuple(value.shape.as_list())
    return TensorSpec(shape, data_type)


def to_tf(spec: TensorSpec) -> tf.TensorSpec:
    """The tf.TensorSpec of one leaf."""
    return tf.TensorSpec(spec.shape, tf.dtypes.as_dtype(spec.data_type.name))


def nested_to_tf(spec: StructureSpec) -> Any:
    """The structure with a tf.TensorSpec for each leaf."""
    return spec.tree.unflatten([to_tf(leaf) for leaf in spec.leaves])


def zeros(nested: Any) -> Any:
    """Zeros for each tf.TensorSpec of a structure; dimensions that may differ are 1."""
    return tf.nest.map_structure(
        lambda spec: tf.zeros([1 if dim is None else dim for dim in spec.shape.as_list()], spec.dtype), nested
    )
