"""Graphs of predict_on_batch alone, judged and run as those of a loaded model. A model has nine more, slow to trace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire import specs
from forwardpass.wire.description import Function, ModelSpec
from forwardpass_server.models import separability, tf_specs
from forwardpass_server.models.execution import Execution


class Predictor:
    """A function of (leaves of x, leaves of weights) as a graph. It returns a list of tensors."""

    def __init__(self, predict: Callable[..., Any], x: Sequence[tf.TensorSpec], weights: Sequence[np.ndarray] = ()):
        self.weights = list(weights)
        weight_specs = [tf.TensorSpec(weight.shape, weight.dtype) for weight in self.weights]

        @tf.function(autograph=False)
        def flat(*leaves):
            return predict(leaves[len(weight_specs) :], leaves[: len(weight_specs)])

        self.concrete = flat.get_concrete_function(*weight_specs, *x)
        predictions = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in self.concrete.outputs]
        self.spec = ModelSpec(
            weights=tf_specs.to_wire(weight_specs, "weights"),
            input=tf_specs.to_wire((list(x), tf.TensorSpec([None], tf.float32)), "input"),
            predictions=tf_specs.to_wire(predictions, "predictions"),
            batch_output=specs.EMPTY,
            sample_weight=specs.EMPTY,
            loss=specs.EMPTY,
            metrics_state=specs.EMPTY,
            metrics=specs.EMPTY,
            unavailable={},
            has_own_forward_pass=False,
            unused_batch_output_fields=frozenset(),
        )
        self.execution = Execution({(Function.PREDICT_ON_BATCH, False): self.concrete}, "/device:CPU:0")
        self.run_flat = functools.partial(self.execution.run, Function.PREDICT_ON_BATCH, False)

    def run(self, x: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.run_flat([*self.weights, *x])

    def reason(self) -> str:
        """Why it may not be batched."""
        return separability.reason_against(self.execution, self.concrete, self.spec, self.weights)
