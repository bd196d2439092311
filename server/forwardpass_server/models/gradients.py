"""Differentiates the forward pass and the predictions of a functional model by TensorFlow's GradientTape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from forwardpass.wire import conform, trees
from forwardpass.wire.specs import StructureSpec
from forwardpass_server.models.functional import FunctionalModel


class Differentiated(NamedTuple):
    """A forward pass with its gradients.

    output: the BatchOutput. mask: of its predictions. gradients: leaves in the order of `ModelSpec.gradients`.
    non_trainable: the non-trainable weights after an optimizer step.
    unreached: the indices of the trainable leaves on which the loss does not depend.
    """

    output: Any
    mask: Any
    gradients: Sequence[tf.Tensor]
    non_trainable: Any
    unreached: frozenset[int]


def forward_backward(
    model: FunctionalModel,
    weights: StructureSpec,
    model_weights: Any,
    batch_input: Any,
    sample_weight: Any,
    training: bool,
) -> Differentiated:
    """The batch output of one batch, and the gradients of its loss; of the sum where the loss has several values.

    weights: the spec of the model's weights. sample_weight: None for equal weights.
    Raises FunctionNotAvailable where the loss takes no sample weights.
    """
    positions, leaves = _differentiable(weights.child(0), trees.flatten(model_weights)[1])
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(leaves)
        output, mask, non_trainable = model.update(model_weights, batch_input, sample_weight, training)
        # A loss of several values is a structure, or an array.
        losses = trees.flatten(output.loss)[1]
    found = tape.gradient(losses, leaves)
    unreached = frozenset(position for position, one in zip(positions, found, strict=True) if one is None)
    return Differentiated(output, mask, _dense(found, leaves), non_trainable, unreached)


def vjp(
    model: FunctionalModel,
    weights: StructureSpec,
    x: StructureSpec,
    predictions: StructureSpec,
    model_weights: Any,
    x_value: Any,
    cotangents: Any,
    training: bool,
) -> tuple[Any, Any]:
    """The cotangents of the trainable weights and of x for cotangents of the predictions.

    weights, x, predictions: the specs of the model's. cotangents: in the structure of `predictions.differentiable`.
    Returns structures like `weights.child(0).differentiable` and `x.differentiable`.
    """
    _, weights_leaves = _differentiable(weights.child(0), trees.flatten(model_weights)[1])
    _, x_leaves = _differentiable(x, trees.flatten(x_value)[1])
    leaves = [*weights_leaves, *x_leaves]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(leaves)
        output, _ = model.predict_with_masks(model_weights, x_value, training)
        _, targets = _differentiable(predictions, conform.arrange(output, predictions.tree, "predictions"))
        given = [
            _of_shape(cotangent, target)
            for cotangent, target in zip(trees.flatten(cotangents)[1], targets, strict=True)
        ]
    found = _dense(tape.gradient(targets, leaves, output_gradients=given), leaves)
    count = len(weights_leaves)
    return (
        weights.child(0).differentiable.tree.unflatten(found[:count]),
        x.differentiable.tree.unflatten(found[count:]),
    )


def _differentiable(spec: StructureSpec, leaves: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """The positions of the leaves of a spec that have derivatives, and these leaves. Further leaves are left out."""
    positions = [index for index, data_type in enumerate(spec.data_types) if data_type.is_differentiable]
    return positions, [leaves[index] for index in positions]


def _dense(gradients: Sequence[Any], leaves: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Each gradient as a tensor of the shape of its leaf: zeros for None, and the sum of an IndexedSlices."""
    dense = []
    for gradient, leaf in zip(gradients, leaves, strict=True):
        tensor = tf.zeros_like(leaf) if gradient is None else tf.convert_to_tensor(gradient)
        tensor.set_shape(leaf.shape)
        dense.append(tensor)
    return dense


def _of_shape(cotangent: tf.Tensor, prediction: tf.Tensor) -> tf.Tensor:
    """The cotangent, checked when it runs: TensorFlow would broadcast one of another shape, and kernels may crash."""
    check = tf.debugging.assert_equal(
        tf.shape(cotangent), tf.shape(prediction), "cotangents must have the shape of the predictions"
    )
    with tf.control_dependencies([check] if check is not None else []):
        return tf.identity(cotangent)
