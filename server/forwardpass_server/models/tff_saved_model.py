"""SavedModels of tff.learning.models.save_functional_model, of every generation since 0.51, read without TFF.

Every function in such a file takes and returns flat tensors in tf.nest's order, mapping keys sorted; a type beside it
says what they are the leaves of.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from forwardpass.wire.description import BatchOutput
from forwardpass.wire.functions import METRICS_FUNCTIONS, Function
from forwardpass_server.models import tff_types
from forwardpass_server.models.functional import FunctionalModel, MetricsFns, x_and_y

_NO_SAMPLE_WEIGHT = "TFF saves this function without sample_weight"


def is_functional_model(root: Any) -> bool:
    """Whether a loaded SavedModel was written by TFF's save_functional_model."""
    return all(hasattr(root, name) for name in ("predict_on_batch_training", "loss", "serialized_input_spec"))


def generation(root: Any) -> str:
    """Which TFF wrote the model: "tff-0.51" to 0.52, "tff-0.53" to 0.89, or "tff-head"."""
    if hasattr(root, "initialize_metrics_state"):
        return "tff-head"
    return "tff-0.51" if hasattr(root, "flat_forward_pass_training") else "tff-0.53"


def functional_model(root: Any, metrics_fns: Callable[[Any, Any], MetricsFns] | None = None) -> FunctionalModel:
    """The functional model in a loaded SavedModel.

    metrics_fns: makes metrics for a model that has none, from the specs of labels and predictions.
    """
    input_spec = _input_spec(root)
    unavailable = {Function.WEIGHTED_LOSS: _NO_SAMPLE_WEIGHT}
    metrics: MetricsFns | None = None
    if hasattr(root, "initialize_metrics_state"):
        metrics = _own_metrics(root)
        unavailable[Function.WEIGHTED_UPDATE_METRICS_STATE] = _NO_SAMPLE_WEIGHT
    if metrics_fns is not None:
        # The operator's choice goes before what was saved.
        metrics = metrics_fns(x_and_y(input_spec)[1], _result_type(root, "predict_on_batch_inference"))
        unavailable.pop(Function.WEIGHTED_UPDATE_METRICS_STATE, None)
    elif metrics is None:
        for function in METRICS_FUNCTIONS:
            unavailable[function] = (
                "no TFF release saves metrics; name Keras metrics in a forwardpass.json beside the model: "
                '{"metrics": ["SparseCategoricalAccuracy"]}'
            )
    return FunctionalModel(
        initial_weights=tf.nest.map_structure(lambda weight: weight.numpy(), root()),
        predict_on_batch_fn=_predict_on_batch(root),
        loss_fn=_loss(root),
        metrics_fns=metrics,
        input_spec=input_spec,
        forward_pass_fn=_forward_pass(root) if hasattr(root, "flat_forward_pass_training") else None,
        unavailable=unavailable,
    )


def _result_type(root: Any, name: str) -> Any:
    return tff_types.decode(getattr(root, f"{name}_type_spec").numpy(), name)


def _input_spec(root: Any) -> Any:
    """The input spec: kinds of containers from the traced signature, order of keys from TFF's type."""
    saved = tff_types.decode(root.serialized_input_spec.numpy(), "serialized_input_spec")
    x, y = x_and_y(saved)
    # The arguments are (model_weights, x, training) and (output, label, ...), named anew by every TFF.
    x_traced = root.predict_on_batch_training.structured_input_signature[0][1]
    y_traced = root.loss.structured_input_signature[0][1]
    pair = _with_containers(x, x_traced), _with_containers(y, y_traced)
    return collections.OrderedDict(x=pair[0], y=pair[1]) if isinstance(saved, Mapping) else pair


def _with_containers(saved: Any, traced: Any) -> Any:
    """TFF's type keeps names and their order, the traced signature the kinds of containers."""
    if isinstance(traced, Mapping):
        return collections.OrderedDict((name, _with_containers(saved[name], traced[name])) for name in saved)
    if isinstance(traced, tuple) and hasattr(traced, "_fields"):
        return type(traced)(*(_with_containers(saved[name], getattr(traced, name)) for name in traced._fields))
    if isinstance(traced, (tuple, list)):
        return type(traced)(_with_containers(*items) for items in zip(saved, traced, strict=True))
    return saved


def _pack(structure: Any, flat: Any) -> Any:
    """The structure with flat tensors of tf.nest's order in it, their static shapes as the structure knows them."""
    specs = tf.nest.flatten(structure)
    leaves = [tf.ensure_shape(leaf, spec.shape) for leaf, spec in zip(flat, specs, strict=True)]
    return tf.nest.pack_sequence_as(structure, leaves)


def _predict_on_batch(root: Any) -> Callable[..., Any]:
    functions = {True: root.predict_on_batch_training, False: root.predict_on_batch_inference}
    types = {
        True: _result_type(root, "predict_on_batch_training"),
        False: _result_type(root, "predict_on_batch_inference"),
    }

    @tf.function(autograph=False)
    def predict_on_batch(model_weights: Any, x: Any, training: bool = True) -> Any:
        mode = bool(training)
        return _pack(types[mode], functions[mode](*tf.nest.flatten((model_weights, x))))

    return predict_on_batch


def _forward_pass(root: Any) -> Callable[..., Any]:
    functions = {True: root.flat_forward_pass_training, False: root.flat_forward_pass_inference}
    types = {
        True: _result_type(root, "forward_pass_training"),
        False: _result_type(root, "forward_pass_inference"),
    }

    @tf.function(autograph=False)
    def forward_pass(model_weights: Any, batch_input: Any, training: bool = True) -> BatchOutput:
        mode = bool(training)
        # The flat order is that of the named tuple's fields, not of sorted names.
        output = BatchOutput(*(types[mode][name] for name in BatchOutput._fields))
        packed: BatchOutput = _pack(output, functions[mode](*tf.nest.flatten((model_weights, batch_input))))
        return packed

    return forward_pass


def _loss(root: Any) -> Callable[..., Any]:
    loss_type = _result_type(root, "loss")

    def loss(output: Any, label: Any, sample_weight: Any = None) -> Any:
        return _pack(loss_type, root.loss(*tf.nest.flatten((output, label))))

    return loss


def _own_metrics(root: Any) -> MetricsFns:
    state_type = _result_type(root, "initialize_metrics_state")
    metrics_type = _result_type(root, "finalize_metrics")

    @tf.function(autograph=False)
    def initialize() -> Any:
        return _pack(state_type, root.initialize_metrics_state())

    @tf.function(autograph=False)
    def update(state: Any, labels: Any, batch_output: BatchOutput, sample_weight: Any = None) -> Any:
        return _pack(state_type, root.update_metrics_state(*tf.nest.flatten((state, labels, batch_output))))

    @tf.function(autograph=False)
    def finalize(state: Any) -> Any:
        return _pack(metrics_type, root.finalize_metrics(*tf.nest.flatten(state)))

    return initialize, update, finalize
