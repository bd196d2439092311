"""Whether the graph that is served gives what the Keras model gives when it is called directly.

Some layers of Keras make another graph than they compute directly: `TimeDistributed` over a free length takes the batch
size for the length. Neither is an error that Keras reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from forwardpass.wire import conform
from forwardpass.wire.description import Function
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import StructureSpec
from forwardpass_server.models import probing, tf_specs
from forwardpass_server.models.examples import Examples, Runs

# Another number than the sizes of the other dimensions: a layer that mistakes one for the other shows.
_ROWS = 2


def warning(model: keras.Model, execution: Runs, found: Examples, weights: Sequence[Array]) -> str:
    """A sentence that names the first layer that differs; "" where predictions agree or cannot be compared."""
    for shape in found.shapes:
        x = found.x(np.random.default_rng(0), dataclasses.replace(shape, rows=_ROWS))
        try:
            results = execution.run(Function.PREDICT_ON_BATCH, False, [*weights, *x])
            # Behind them are masks.
            served = results[: len(found.spec.predictions.leaves)]
            outputs = model(_nested(found.spec.x, x), training=False)
            # In the order of the spec, which for mappings is not the sorted one of tf.nest.
            direct = list(map(np.asarray, conform.arrange(outputs, found.spec.predictions.tree, "predictions")))
        except Exception:  # The model may refuse made-up inputs. What it is asked to do is served all the same.
            continue
        predictions = found.spec.predictions
        if len(direct) == len(served) == len(predictions.leaves) and not all(
            probing.agree(one, other, leaf) for one, other, leaf in zip(served, direct, predictions.leaves, strict=True)
        ):
            return (
                "predictions differ from those of the Keras model when it is called directly: "
                f"{_place(model, found, x)} makes another graph than it computes, which is a defect of Keras's; fix "
                "the free dimensions in input_spec, or replace the layer"
            )
    return ""


def _place(model: keras.Model, found: Examples, x: Sequence[Array]) -> str:
    """The first layer that differs, or the model where it has no layers in order."""
    try:
        layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
        every = keras.Model(model.inputs, [layer.output for layer in layers])
        nested = _nested(found.spec.x, x)
        graph = tf.function(lambda value: every(value, training=False), autograph=False)
        traced = graph.get_concrete_function(tf_specs.nested_to_tf(found.spec.x))
        pairs = zip(layers, every(nested, training=False), traced(nested), strict=True)
        for layer, one, other in pairs:
            for direct, served in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True):
                if direct.shape != served.shape or not np.allclose(
                    direct, served, rtol=1e-3, atol=1e-5, equal_nan=True
                ):
                    return f"layer {layer.name!r} ({type(layer).__name__})"
    except Exception:  # A model of its own class has no such layers.
        pass
    return "a layer"


def _nested(spec: StructureSpec, leaves: Sequence[Array]) -> Any:
    return spec.tree.unflatten(
        [tf.constant(leaf, tf_specs.to_tf(one).dtype) for leaf, one in zip(leaves, spec.leaves, strict=True)]
    )
