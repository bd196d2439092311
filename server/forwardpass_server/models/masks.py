"""Keras masks of predictions: which positions loss and metrics count.

Keras keeps the mask of a tensor in its attribute `_keras_mask`, where its losses and metrics read it. A tf.function
neither takes nor returns such attributes, so masks go in and out as tensors of their own and are set again inside.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

ATTRIBUTE = "_keras_mask"
"""Private to Keras: `private_keras.check` tries it when a server starts."""


def of(predictions: Any) -> Any:
    """The masks that predictions carry, in their structure, None where there is none; None if there is none at all."""
    masks = tf.nest.map_structure(lambda leaf: getattr(leaf, ATTRIBUTE, None), predictions)
    return masks if any(mask is not None for mask in tf.nest.flatten(masks)) else None


def attached(predictions: Any, masks: Any) -> Any:
    """Copies of the predictions that carry these masks, which are as `of` returns them."""
    if masks is None:
        return predictions
    return tf.nest.map_structure(_attached, predictions, masks, check_types=False)


def _attached(prediction: Any, mask: Any) -> Any:
    if mask is None:
        return prediction
    masked = tf.identity(prediction)
    setattr(masked, ATTRIBUTE, mask)
    return masked


def all_true(prediction: Any, spec: tf.TensorSpec) -> tf.Tensor:
    """The mask, of this spec, that counts every position of a prediction."""
    return tf.ones(tf.shape(prediction)[: spec.shape.rank], spec.dtype)
