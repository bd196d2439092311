"""Our own format: a SavedModel with every function of a functional model, and its spec beside it.

It keeps what TFF's format lacks: sample weights, a custom forward pass, metrics, every kind of container.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from forwardpass import v1
from forwardpass.wire import conform, description, trees
from forwardpass.wire.description import ModelDescription, ModelIdentity, ModelSpec
from forwardpass.wire.functions import GRADIENT_FUNCTIONS, Function
from forwardpass.wire.specs import StructureSpec
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import graphs, masks, tf_specs, tff_saved_model, tracing
from forwardpass_server.models.functional import FunctionalModel, x_and_y
from forwardpass_server.models.tracing import TracedModel

SPEC_FILE_NAME = "forwardpass_model.pb"
"""Holds a serialized `forwardpass.v1.ModelDescription` without an identity."""

FORMAT = "forwardpass"


def save_functional_model(functional_model: FunctionalModel, path: str | os.PathLike[str]) -> None:
    """Writes a functional model to the folder `path`, which must not exist or be empty.

    Kept: initial weights, predict_on_batch, loss and metrics with and without sample weight, a custom forward pass, how
    an optimizer step changes non-trainable weights, the containers of everything. Names of classes of named tuples are
    kept, the classes are not.
    Raises FileExistsError, ModelLoadError for a model with lookup tables or calls of Python, and what tracing the model
    raises.
    Source: tff.learning.models.save_functional_model.
    """
    folder = pathlib.Path(path)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    # A model that is loaded again is differentiated at its load.
    traced = tracing.trace(functional_model, without_gradients="gradients are not saved")
    _check_saveable(traced)
    module = tf.Module()
    module.functions = {_attribute(*key): concrete for key, concrete in traced.functions.items()}
    module.updates = _updates(functional_model, traced.spec) if functional_model.changes_weights else {}
    module.initial_weights = [tf.Variable(weight, trainable=False) for weight in traced.initial_weights]
    tf.saved_model.save(module, str(folder))
    message = description.encode(ModelDescription(ModelIdentity("", 0, b""), FORMAT, traced.spec))
    # Last: a folder with this file is whole.
    (folder / SPEC_FILE_NAME).write_bytes(message.SerializeToString(deterministic=True))


def _updates(model: FunctionalModel, spec: ModelSpec) -> dict[str, Any]:
    """The forward passes of an optimizer step, which return the new non-trainable weights too: see `_update_name`."""
    found = {}
    for weighted in (False, True):
        if weighted and Function.WEIGHTED_LOSS in spec.unavailable:
            continue
        arguments = [spec.weights, spec.x, spec.y, *([spec.sample_weight] if weighted else [])]
        for training in (False, True):
            update = functools.partial(_flat_update, model, spec, arguments, training)
            leaves = (tf_specs.to_tf(leaf) for one in arguments for leaf in one.leaves)
            concrete = tf.function(update, autograph=False).get_concrete_function(*leaves)
            found[_update_name(weighted, training)] = concrete
    return found


def _flat_update(
    model: FunctionalModel, spec: ModelSpec, arguments: Sequence[StructureSpec], training: bool, *leaves: Any
) -> list[tf.Tensor]:
    """The leaves of the batch output, of its masks, and of the new non-trainable weights."""
    model_weights, x, y, *sample_weight = tracing.nested(leaves, arguments)
    batch = tracing.batch_input(spec.input, x, y)
    output, mask, non_trainable = model.update(
        model_weights, batch, sample_weight[0] if sample_weight else None, training
    )
    found = trees.flatten((*output, mask))[1]
    found += conform.arrange(non_trainable, spec.weights.child(1).tree, "non_trainable")
    # An argument that is returned as it is has no name of its own in a SavedModel.
    return [tf.identity(leaf) for leaf in found]


def _update_name(weighted: bool, training: bool) -> str:
    return ("weighted_" if weighted else "") + ("update_training" if training else "update_inference")


def _check_saveable(traced: TracedModel) -> None:
    """A graph knows a table or a Python function only by its handle: the thing itself would be missing."""
    for (function, _), concrete in traced.functions.items():
        if any(tensor.dtype == tf.resource for tensor in concrete.captured_inputs):
            raise ModelLoadError(
                f"{function.title} uses a lookup table, which an export cannot contain: serve the model by --factory"
            )
        if graphs.calls_python(concrete):
            raise ModelLoadError(
                f"{function.title} calls Python (tf.py_function or tf.numpy_function), which an export cannot contain: "
                "serve the model by --factory"
            )


def load_functional_model(path: str | os.PathLike[str]) -> FunctionalModel:
    """The functional model in a folder written by `save_functional_model`, ours or that of any TFF since 0.51.

    Raises ModelLoadError for a folder that holds neither.
    Source: tff.learning.models.load_functional_model.
    """
    folder = pathlib.Path(path)
    if (folder / SPEC_FILE_NAME).exists():
        return _load_own(folder)
    if not (folder / "saved_model.pb").exists():
        raise ModelLoadError(f"{folder}: expected a SavedModel, found no saved_model.pb")
    root = tf.saved_model.load(str(folder))
    if not tff_saved_model.is_functional_model(root):
        raise ModelLoadError(f"{folder}: the SavedModel is not a functional model")
    return tff_saved_model.functional_model(root)


def _attribute(function: Function, training: bool) -> str:
    return function.name.lower() + ("_training" if training else "_inference" if function.has_training else "")


def _load_own(folder: pathlib.Path) -> FunctionalModel:
    message = v1.ModelDescription.FromString((folder / SPEC_FILE_NAME).read_bytes())
    spec = description.decode(message).spec
    root = tf.saved_model.load(str(folder))
    saved = _SavedFunctions(root, spec)
    has_metrics = Function.INITIALIZE_METRICS_STATE not in spec.unavailable
    return FunctionalModel(
        initial_weights=spec.weights.tree.unflatten([weight.numpy() for weight in root.initial_weights]),
        predict_on_batch_fn=tf.function(saved.predict_on_batch, autograph=False),
        loss_fn=saved.loss,
        metrics_fns=(saved.initialize, saved.update, saved.finalize) if has_metrics else None,
        input_spec=tf_specs.nested_to_tf(spec.input),
        forward_pass_fn=tf.function(saved.forward_pass, autograph=False) if spec.has_own_forward_pass else None,
        sample_weight_spec=tf_specs.nested_to_tf(spec.sample_weight),
        unavailable={
            function: reason for function, reason in spec.unavailable.items() if function not in GRADIENT_FUNCTIONS
        },
        has_prediction_masks=bool(spec.prediction_mask.leaves),
        # Exports of an earlier version have no updates.
        update_fn=saved.update_weights if getattr(root, "updates", None) else None,
    )


class _SavedFunctions:
    """The functions of a folder of ours, with structures in and out again."""

    def __init__(self, root: Any, spec: ModelSpec) -> None:
        # The functions live as long as what they were loaded from.
        self._root = root
        self._spec = spec

    def predict_on_batch(self, model_weights: Any, x: Any, training: bool = True) -> Any:
        return self._call_with_masks(
            Function.PREDICT_ON_BATCH,
            self._spec.predictions,
            (self._spec.weights, model_weights),
            (self._spec.x, x),
            training=training,
        )

    def forward_pass(self, model_weights: Any, batch_input: Any, training: bool = True) -> Any:
        x, y = x_and_y(batch_input)
        return self._call_with_masks(
            Function.FORWARD_PASS,
            self._spec.batch_output,
            (self._spec.weights, model_weights),
            (self._spec.x, x),
            (self._spec.y, y),
            training=training,
        )

    def update_weights(self, model_weights: Any, batch_input: Any, sample_weight: Any, training: bool) -> Any:
        spec, (x, y) = self._spec, x_and_y(batch_input)
        arguments = [(spec.weights, model_weights), (spec.x, x), (spec.y, y), *self._weight(sample_weight)]
        update = self._root.updates[_update_name(sample_weight is not None, training)]
        returned = iter(update(*_flat(arguments, "batch_input")))
        results = [
            one.tree.unflatten([tf.ensure_shape(next(returned), leaf.shape) for leaf in one.leaves])
            for one in (spec.batch_output, spec.prediction_mask, spec.weights.child(1))
        ]
        output, mask, non_trainable = results
        return ((output, mask) if spec.prediction_mask.leaves else output), non_trainable

    def loss(self, output: Any, label: Any, sample_weight: Any = None, prediction_mask: Any = None) -> Any:
        function = Function.LOSS if sample_weight is None else Function.WEIGHTED_LOSS
        return self._call(
            function,
            self._spec.loss,
            (self._spec.predictions, output),
            (self._spec.y, label),
            self._mask(output, prediction_mask),
            *self._weight(sample_weight),
        )

    def initialize(self) -> Any:
        return self._call(Function.INITIALIZE_METRICS_STATE, self._spec.metrics_state)

    def update(
        self, state: Any, labels: Any, batch_output: Any, sample_weight: Any = None, prediction_mask: Any = None
    ) -> Any:
        function = Function.UPDATE_METRICS_STATE if sample_weight is None else Function.WEIGHTED_UPDATE_METRICS_STATE
        return self._call(
            function,
            self._spec.metrics_state,
            (self._spec.metrics_state, state),
            (self._spec.y, labels),
            (self._spec.batch_output, batch_output),
            self._mask(batch_output.predictions, prediction_mask),
            *self._weight(sample_weight),
        )

    def finalize(self, state: Any) -> Any:
        return self._call(Function.FINALIZE_METRICS, self._spec.metrics, (self._spec.metrics_state, state))

    def _mask(self, predictions: Any, prediction_mask: Any) -> tuple[StructureSpec, Any]:
        """The masks as an argument: without any, masks that count every position."""
        spec = self._spec.prediction_mask
        if prediction_mask is None and spec.leaves:
            leaves = conform.arrange(predictions, self._spec.predictions.tree, "predictions")
            prediction_mask = spec.tree.unflatten(
                [
                    masks.all_true(leaves[index], tf_specs.to_tf(leaf))
                    for index, leaf in zip(self._spec.masked_leaves, spec.leaves, strict=True)
                ]
            )
        return spec, prediction_mask

    def _weight(self, sample_weight: Any) -> list[tuple[StructureSpec, Any]]:
        return [] if sample_weight is None else [(self._spec.sample_weight, sample_weight)]

    def _call_with_masks(
        self,
        function: Function,
        result: StructureSpec,
        *arguments: tuple[StructureSpec, Any],
        training: bool = False,
    ) -> Any:
        """The result, and the masks of the predictions for a model that has some."""
        mask = self._spec.prediction_mask
        if not mask.leaves:
            return self._call(function, result, *arguments, training=training)
        both = StructureSpec(trees.TreeDef(trees.Kind.TUPLE, (result.tree, mask.tree)), (*result.leaves, *mask.leaves))
        return self._call(function, both, *arguments, training=training)

    def _call(
        self,
        function: Function,
        result: StructureSpec,
        *arguments: tuple[StructureSpec, Any],
        training: bool = False,
    ) -> Any:
        flat = _flat(arguments, function.title)
        returned = self._root.functions[_attribute(function, bool(training))](*flat)
        leaves = [tf.ensure_shape(leaf, spec.shape) for leaf, spec in zip(returned, result.leaves, strict=True)]
        return result.tree.unflatten(leaves)


def _flat(arguments: Sequence[tuple[StructureSpec, Any]], place: str) -> list[Any]:
    return [leaf for spec, value in arguments for leaf in conform.arrange(value, spec.tree, place)]
