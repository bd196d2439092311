"""The table of a functional model's functions: one row for each, with its RPC, arguments and results."""

from __future__ import annotations

import dataclasses
import enum
import functools

from forwardpass import v1

_WEIGHTS = ("model_weights.trainable", "model_weights.non_trainable")
_BATCH = (*_WEIGHTS, "batch_input.x", "batch_input.y")
_BATCH_OUTPUT = (
    "batch_output.loss",
    "batch_output.predictions",
    "batch_output.num_examples",
    "batch_output.prediction_mask",
)
_LOSS = ("output", "label", "output_mask")
_UPDATE = ("state", "labels", *_BATCH_OUTPUT)

SAMPLE_WEIGHT = "sample_weight"

MASKS_OF = {
    "output_mask": "output",
    "prediction_mask": "predictions",
    "batch_output.prediction_mask": "batch_output.predictions",
}
"""The places of Keras masks, each with the place of the predictions that it is for.

A model has these places only if its predictions have masks.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """One row of the table.

    title: the function's name for people. method: the RPC that calls it; two functions share an RPC where the second
    takes sample weights too.
    arguments, results: the places of their structures in the request and the response, in order: `ModelSpec.places`
    has the spec of each.
    has_training: whether there is one graph for training and one for inference.
    """

    title: str
    method: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    has_training: bool = False


class Function(enum.IntEnum):
    """A function of a functional model; the value is its number in `forwardpass.v1.Function`."""

    PREDICT_ON_BATCH = (
        v1.Function.FUNCTION_PREDICT_ON_BATCH,
        Signature(
            title="predict_on_batch",
            method="PredictOnBatch",
            arguments=(*_WEIGHTS, "x"),
            results=("predictions", "prediction_mask"),
            has_training=True,
        ),
    )
    FORWARD_PASS = (
        v1.Function.FUNCTION_FORWARD_PASS,
        Signature(
            title="forward_pass",
            method="ForwardPass",
            arguments=_BATCH,
            results=_BATCH_OUTPUT,
            has_training=True,
        ),
    )
    LOSS = (
        v1.Function.FUNCTION_LOSS,
        Signature(title="loss", method="Loss", arguments=_LOSS, results=("loss",)),
    )
    WEIGHTED_LOSS = (
        v1.Function.FUNCTION_WEIGHTED_LOSS,
        Signature(title="loss with sample_weight", method="Loss", arguments=(*_LOSS, SAMPLE_WEIGHT), results=("loss",)),
    )
    INITIALIZE_METRICS_STATE = (
        v1.Function.FUNCTION_INITIALIZE_METRICS_STATE,
        Signature(title="initialize_metrics_state", method="InitializeMetricsState", arguments=(), results=("state",)),
    )
    UPDATE_METRICS_STATE = (
        v1.Function.FUNCTION_UPDATE_METRICS_STATE,
        Signature(title="update_metrics_state", method="UpdateMetricsState", arguments=_UPDATE, results=("state",)),
    )
    WEIGHTED_UPDATE_METRICS_STATE = (
        v1.Function.FUNCTION_WEIGHTED_UPDATE_METRICS_STATE,
        Signature(
            title="update_metrics_state with sample_weight",
            method="UpdateMetricsState",
            arguments=(*_UPDATE, SAMPLE_WEIGHT),
            results=("state",),
        ),
    )
    FINALIZE_METRICS = (
        v1.Function.FUNCTION_FINALIZE_METRICS,
        Signature(title="finalize_metrics", method="FinalizeMetrics", arguments=("state",), results=("metrics",)),
    )

    FORWARD_BACKWARD = (
        v1.Function.FUNCTION_FORWARD_BACKWARD,
        Signature(
            title="forward_backward",
            method="ForwardBackward",
            arguments=_BATCH,
            results=(*_BATCH_OUTPUT, "gradients"),
            has_training=True,
        ),
    )
    WEIGHTED_FORWARD_BACKWARD = (
        v1.Function.FUNCTION_WEIGHTED_FORWARD_BACKWARD,
        Signature(
            title="forward_backward with sample_weight",
            method="ForwardBackward",
            arguments=(*_BATCH, SAMPLE_WEIGHT),
            results=(*_BATCH_OUTPUT, "gradients"),
            has_training=True,
        ),
    )
    VJP = (
        v1.Function.FUNCTION_VJP,
        Signature(
            title="vjp",
            method="Vjp",
            arguments=(*_WEIGHTS, "x", "cotangents"),
            results=("weights_cotangents", "x_cotangents"),
            has_training=True,
        ),
    )

    _value_: int
    signature: Signature

    def __new__(cls, number: int, signature: Signature) -> Function:
        member = int.__new__(cls, number)
        member._value_ = number
        member.signature = signature
        return member

    @property
    def has_training(self) -> bool:
        """Whether the function comes in two kinds, for training and for inference."""
        return self.signature.has_training

    @property
    def title(self) -> str:
        """The function's name for people."""
        return self.signature.title

    @property
    def takes_sample_weight(self) -> bool:
        """Whether sample weights are an argument."""
        return SAMPLE_WEIGHT in self.signature.arguments

    @functools.cached_property
    def variants(self) -> tuple[Function, ...]:
        """The functions of the same RPC: without sample weights, and with them where the RPC takes some."""
        return tuple(function for function in Function if function.signature.method == self.signature.method)

    @functools.cached_property
    def with_sample_weight(self) -> Function:
        """The function of the same RPC that takes sample weights. Raises LookupError where there is none."""
        for function in self.variants:
            if function.takes_sample_weight:
                return function
        raise LookupError(f"{self.title} does not take sample weights")


METRICS_FUNCTIONS = tuple(
    function for function in Function if "state" in (*function.signature.arguments, *function.signature.results)
)
"""The functions that a model without metrics lacks."""

GRADIENT_FUNCTIONS = (Function.FORWARD_BACKWARD, Function.WEIGHTED_FORWARD_BACKWARD, Function.VJP)
"""The functions that a model without gradients lacks."""
