"""Whether the graph that is served gives what the Keras model gives when it is called directly.

Some layers of Keras trace another computation than they run directly. Keras reports no error. `TimeDistributed` over
a free length takes the batch size for the length. `RandomElasticTransform` traces one image for a batch of any size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from forwardpass.wire import conform
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass.wire.specs import StructureSpec
from forwardpass_server.models import probing, tf_specs
from forwardpass_server.models.examples import Examples, Runs

# Rows by training. Both differ from the sizes of other dimensions: a layer that mistakes one for the other shows. More
# in training: a layer may change some rows at random, and leave others as they are.
_ROWS = {False: 2, True: 5}


def warning(model: keras.Model, execution: Runs, found: Examples, weights: Sequence[Array]) -> str:
    """A sentence that names the first layer that differs; "" where predictions agree or cannot be compared."""
    for training in (False, True):
        for shape in found.shapes:
            x = found.x(np.random.default_rng(0), dataclasses.replace(shape, rows=_ROWS[training]))
            try:
                differs = _differs(model, execution, found, weights, x, training)
            except Exception:  # The model may refuse made-up inputs. It is served without a comparison.
                continue
            if differs:
                mode = "in training" if training else "in inference"
                return (
                    f"predictions {mode} differ from those of the Keras model when it is called directly: "
                    f"{_place(model, found, x, training)} traces another graph than it computes, which is a defect of "
                    "Keras; fix the free dimensions in input_spec, or replace the layer"
                )
    return ""


def _differs(
    model: keras.Model, execution: Runs, found: Examples, weights: Sequence[Array], x: Sequence[Array], training: bool
) -> bool:
    predictions = found.spec.predictions
    # Behind the predictions are masks.
    served = execution.run(Function.PREDICT_ON_BATCH, training, [*weights, *x])[: len(predictions.leaves)]

    def direct() -> list[Array]:
        nested = _nested(found.spec.x, x)
        if training:
            trainable = len(model.trainable_variables)
            outputs, _ = model.stateless_call(weights[:trainable], weights[trainable:], nested, training=True)
        else:
            outputs = model(nested, training=False)
        # In the order of the spec, which for mappings is not the sorted one of tf.nest.
        return list(map(np.asarray, conform.arrange(outputs, predictions.tree, "predictions")))

    def agree(some: Sequence[Array], others: Sequence[Array]) -> bool:
        return all(map(probing.agree, some, others, predictions.leaves))

    first = direct()
    if not len(first) == len(served) == len(predictions.leaves) or agree(served, first):
        return False
    # A layer that draws random numbers without its seed gives other numbers in each call.
    return agree(first, direct())


def _place(model: keras.Model, found: Examples, x: Sequence[Array], training: bool) -> str:
    """The first layer that differs, or "a layer" where the model does not list its layers in order."""
    try:
        layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
        every = keras.Model(model.inputs, [layer.output for layer in layers])
        values = (
            [variable.numpy() for variable in every.trainable_variables],
            [variable.numpy() for variable in every.non_trainable_variables],
        )

        def outputs(value: Any) -> Any:
            found = every.stateless_call(*values, value, training=training)[0]
            return found if len(layers) > 1 else [found]

        nested = _nested(found.spec.x, x)
        traced = tf.function(outputs, autograph=False).get_concrete_function(tf_specs.nested_to_tf(found.spec.x))
        for layer, one, other in zip(layers, outputs(nested), traced(nested), strict=True):
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
