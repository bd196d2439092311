"""Traces functional models: each function becomes one graph with a fixed signature of flat tensors."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire import conform, errors, specs, trees
from forwardpass.wire.description import BatchOutput, ModelSpec
from forwardpass.wire.functions import Function
from forwardpass.wire.specs import StructureSpec, TensorSpec
from forwardpass_server.models import gradients, graphs, tf_specs
from forwardpass_server.models.functional import FunctionalModel, x_and_y

_LOGGER = logging.getLogger(__name__)

# Calls of Python. tf.py_function is another operation, which has a gradient.
_WITHOUT_GRADIENT = {"PyFunc", "PyFuncStateless"}
_PYTHON_WITHOUT_GRADIENT = "the model calls tf.numpy_function, which has no gradient: use tf.py_function"

Key = tuple[Function, bool]
"""A function, and whether it is for training; False for functions without `has_training`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedModel:
    """A functional model as graphs.

    functions: each takes the flat leaves of `spec.arguments` and returns those of `spec.results`, in order.
    initial_weights: the flat leaves of `spec.weights`.
    updates: the forward pass and gradients of an optimizer step, for batches without (False) and with (True) sample
      weights. Each takes what forward_backward takes. It returns what forward_backward returns for training, and then
      the non-trainable weights after the step. Empty for a model without gradients.
    unreached_weights: the places of the trainable weights on which the loss does not depend in training.
    """

    spec: ModelSpec
    functions: Mapping[Key, Any]
    initial_weights: Sequence[np.ndarray[Any, Any]]
    updates: Mapping[bool, Any] = dataclasses.field(default_factory=dict)
    unreached_weights: tuple[str, ...] = ()


def trace(
    model: FunctionalModel, on_trace: Callable[[], None] = lambda: None, without_gradients: str = ""
) -> TracedModel:
    """Traces every function that the model has.

    on_trace: called once for each graph that Python builds. without_gradients: why gradients are left out; "" to trace
    them.
    Raises whatever the model's own code raises, and StructureMismatch where its functions do not fit together.
    """
    return _Tracer(model, on_trace, without_gradients).traced()


class _Tracer:
    """Traces the functions in an order in which each one's arguments are known."""

    def __init__(self, model: FunctionalModel, on_trace: Callable[[], None], without_gradients: str) -> None:
        self._without_gradients = without_gradients
        self._updates: dict[bool, Any] = {}
        self._unreached: frozenset[int] = frozenset()
        self._model = model
        self._on_trace = on_trace
        self._functions: dict[Key, Any] = {}
        # The specs of the prediction masks, by the function that returns them.
        self._masks: dict[Key, StructureSpec] = {}
        self._unavailable = dict(model.unavailable)
        self._weights, self._initial_weights = _weights(model.initial_weights)
        self._input = tf_specs.to_wire(model.input_spec, "input_spec")

    def traced(self) -> TracedModel:
        x, y = (tf_specs.to_wire(item, "input_spec") for item in x_and_y(self._model.input_spec))
        sample_weight = tf_specs.to_wire(self._model.sample_weight_spec, "sample_weight_spec")
        predictions = self._both_modes(Function.PREDICT_ON_BATCH, self._model.predict_with_masks, [self._weights, x])
        batch_output = self._both_modes(Function.FORWARD_PASS, self._forward_pass, [self._weights, x, y])
        mask = self._prediction_mask(predictions, batch_output.named_child("predictions"))
        loss = self._trace((Function.LOSS, False), self._loss, [predictions, y, mask])
        self._trace_weighted(Function.WEIGHTED_LOSS, self._loss, [predictions, y, mask, sample_weight])
        state, metrics, unused_fields = self._trace_metrics(y, batch_output, mask, sample_weight)
        self._trace_gradients(x, y, sample_weight, predictions)
        paths = self._weights.child(0).tree.paths("model_weights.trainable")
        return TracedModel(
            spec=ModelSpec(
                weights=self._weights,
                input=self._input,
                predictions=predictions,
                batch_output=batch_output,
                sample_weight=sample_weight,
                loss=loss,
                metrics_state=state,
                metrics=metrics,
                unavailable=self._unavailable,
                has_own_forward_pass=self._model.has_own_forward_pass,
                unused_batch_output_fields=unused_fields,
                prediction_mask=mask,
            ),
            functions=self._functions,
            initial_weights=self._initial_weights,
            updates=self._updates,
            unreached_weights=tuple(paths[index] for index in sorted(self._unreached)),
        )

    def _forward_pass(self, model_weights: Any, x: Any, y: Any, training: bool) -> Any:
        return self._model.forward_pass_with_masks(model_weights, batch_input(self._input, x, y), training)

    def _trace_gradients(
        self, x: StructureSpec, y: StructureSpec, sample_weight: StructureSpec, predictions: StructureSpec
    ) -> None:
        batch = [self._weights, x, y]
        for function, arguments in (
            (Function.FORWARD_BACKWARD, batch),
            (Function.WEIGHTED_FORWARD_BACKWARD, [*batch, sample_weight]),
        ):
            self._trace_gradient(function, functools.partial(self._differentiate, function, arguments))
        cotangents = predictions.differentiable
        self._trace_gradient(Function.VJP, lambda: self._trace_vjp([self._weights, x, cotangents], predictions))

    def _trace_gradient(self, function: Function, trace: Callable[[], None]) -> None:
        """Traces a function of gradients. A model that cannot be differentiated is served without it."""
        if self._without_gradients:
            self._unavailable[function] = self._without_gradients
        if function in self._unavailable:
            return
        try:
            trace()
        except Exception as error:  # The model's own code: anything may come out of it.
            for training in (True, False):
                self._functions.pop((function, training), None)
            self._updates.pop(function.takes_sample_weight, None)
            self._unavailable[function] = _why_without_gradient(error)
            _LOGGER.info("%s is not available", function.title, exc_info=True)

    def _differentiate(self, function: Function, arguments: Sequence[StructureSpec]) -> None:
        """Traces forward_backward, with or without sample weights.

        The graph for training calls the graph of an optimizer step, and drops the new non-trainable weights.
        """
        num_new = len(self._weights.child(1).leaves)

        def update(training: bool) -> Callable[..., Any]:
            def method(model_weights: Any, x: Any, y: Any, weight: Any = None) -> Any:
                batch = batch_input(self._input, x, y)
                found = gradients.forward_backward(self._model, self._weights, model_weights, batch, weight, training)
                if training:
                    self._check_reached(found)
                    self._unreached = found.unreached
                new = conform.arrange(found.non_trainable, self._weights.child(1).tree, "non_trainable")
                return (*found.output, found.mask, list(found.gradients), new)

            return method

        whole = self._concrete(function.title, update(True), arguments)
        self._updates[function.takes_sample_weight] = whole

        def without_new(*leaves: Any) -> list[tf.Tensor]:
            return list(whole(*leaves))[: -num_new or None]

        self._functions[function, True] = self._concrete_flat(function.title, without_new, arguments)

        def inferred(*arguments: Any) -> Any:
            return update(False)(*arguments)[:-1]

        self._functions[function, False] = self._concrete(function.title, inferred, arguments)

    def _check_reached(self, found: gradients.Differentiated) -> None:
        """Raises FunctionNotAvailable where no gradient exists, or where a Python function may have cut it off."""
        forward_pass = self._functions[Function.FORWARD_PASS, True]
        if found.unreached and not _WITHOUT_GRADIENT.isdisjoint(graphs.operations(forward_pass)):
            raise errors.FunctionNotAvailable(_PYTHON_WITHOUT_GRADIENT)
        if len(found.unreached) == len(found.gradients):
            raise errors.FunctionNotAvailable("the loss depends on no trainable weight")

    def _trace_vjp(self, arguments: Sequence[StructureSpec], predictions: StructureSpec) -> None:
        if self._unavailable.get(Function.FORWARD_BACKWARD) == _PYTHON_WITHOUT_GRADIENT:
            raise errors.FunctionNotAvailable(_PYTHON_WITHOUT_GRADIENT)
        weights, x, _ = arguments
        for training in (True, False):
            method = functools.partial(gradients.vjp, self._model, weights, x, predictions, training=training)
            self._functions[Function.VJP, training] = self._concrete(Function.VJP.title, method, arguments)

    def _loss(self, output: Any, label: Any, mask: Any, sample_weight: Any = None) -> Any:
        return self._model.loss(output, label, sample_weight, mask=mask)

    def _update(self, state: Any, labels: Any, batch_output: Any, mask: Any, sample_weight: Any = None) -> Any:
        return self._model.update_metrics_state(state, labels, batch_output, sample_weight, mask=mask)

    def _prediction_mask(self, *predictions: StructureSpec) -> StructureSpec:
        """The spec that the masks of every function and mode fit.

        predictions: of predict_on_batch and of a forward pass. Raises StructureMismatch where one masks other leaves
        than another.
        """
        mask = functools.reduce(lambda one, other: _common_spec(one, other, "prediction_mask"), self._masks.values())
        if mask.leaves and predictions[0].tree != predictions[1].tree:
            raise errors.StructureMismatch(
                place="forward_pass.predictions",
                expected=predictions[0].tree.describe(),
                found=predictions[1].tree.describe(),
            )
        return mask

    def _trace_metrics(
        self, y: StructureSpec, batch_output: StructureSpec, mask: StructureSpec, sample_weight: StructureSpec
    ) -> tuple[StructureSpec, StructureSpec, frozenset[str]]:
        if Function.INITIALIZE_METRICS_STATE in self._unavailable:
            return specs.EMPTY, specs.EMPTY, frozenset()
        state = self._trace((Function.INITIALIZE_METRICS_STATE, False), self._model.initialize_metrics_state, [])
        while True:
            arguments = [state, y, batch_output, mask]
            updated = self._trace((Function.UPDATE_METRICS_STATE, False), self._update, arguments, state.tree)
            common = _common_spec(state, updated, Function.UPDATE_METRICS_STATE.title)
            if common == state:
                break
            # An update may change the shape of the state, or make it unknown: each round frees at least one dimension.
            state = common
        arguments_weighted = [*arguments, sample_weight]
        self._trace_weighted(Function.WEIGHTED_UPDATE_METRICS_STATE, self._update, arguments_weighted, state.tree)
        metrics = self._trace((Function.FINALIZE_METRICS, False), self._model.finalize_metrics, [state])
        return state, metrics, self._unused_batch_output_fields(arguments)

    def _unused_batch_output_fields(self, arguments: Sequence[StructureSpec]) -> frozenset[str]:
        """The fields that no update reads, with sample weights or without."""
        unused = [
            graphs.unused_arguments(self._functions[function, False])
            for function in Function.UPDATE_METRICS_STATE.variants
            if (function, False) in self._functions
        ]
        state, y, batch_output, mask = arguments
        position = len(state.leaves) + len(y.leaves)
        parts = {name: batch_output.named_child(name) for name in BatchOutput._fields}
        if mask.leaves:
            parts["prediction_mask"] = mask
        fields = set()
        for name, part in parts.items():
            leaves = range(position, position + len(part.leaves))
            if all(leaf in positions for positions in unused for leaf in leaves):
                fields.add(name)
            position += len(leaves)
        return frozenset(fields)

    def _both_modes(
        self, function: Function, method: Callable[..., Any], arguments: Sequence[StructureSpec]
    ) -> StructureSpec:
        """Traces for training and inference, and returns a spec that both results fit."""
        trained, inferred = (
            self._trace((function, training), _with_training(method, training), arguments) for training in (True, False)
        )
        return _common_spec(trained, inferred, function.title)

    def _trace_weighted(
        self,
        function: Function,
        method: Callable[..., Any],
        arguments: Sequence[StructureSpec],
        result_tree: trees.TreeDef | None = None,
    ) -> None:
        if function in self._unavailable:
            return
        try:
            self._trace((function, False), method, arguments, result_tree)
        except Exception as error:  # The model's own code: anything may come out of it.
            # A loss or a metric may take no sample weights. Only calls with sample weights fail.
            _LOGGER.info("%s is not available", function.title, exc_info=True)
            self._unavailable[function] = f"the model's own code raised {type(error).__name__}; see the server's log"

    def _trace(
        self,
        key: Key,
        method: Callable[..., Any],
        arguments: Sequence[StructureSpec],
        result_tree: trees.TreeDef | None = None,
    ) -> StructureSpec:
        """Traces one function and returns the spec of its result, rearranged to `result_tree` where one is given.

        A method that makes predictions returns a pair, its result and the masks; the graph returns the leaves of both.
        """
        name = key[0].title
        found: list[StructureSpec] = []

        def flat(*leaves: Any) -> list[tf.Tensor]:
            returned = method(*nested(leaves, arguments))
            returned, mask = returned if key[0].has_training else (returned, None)
            if result_tree is None:
                tree, results = trees.flatten(returned, name)
            else:
                tree, results = result_tree, conform.arrange(returned, result_tree, name)
            tensors = [_to_tensor(leaf, path) for leaf, path in zip(results, tree.paths(name), strict=True)]
            found.append(tf_specs.to_wire(tree.unflatten(tensors), name))
            if key[0].has_training:
                self._masks[key] = tf_specs.to_wire(mask, f"the masks of {name}")
            return [*tensors, *trees.flatten(mask)[1]]

        self._functions[key] = self._concrete_flat(name, flat, arguments)
        return found[-1]

    def _concrete(self, name: str, method: Callable[..., Any], arguments: Sequence[StructureSpec]) -> Any:
        """The concrete function of a method of structures; it returns the leaves of what the method returns."""

        def flat(*leaves: Any) -> list[tf.Tensor]:
            tree, results = trees.flatten(method(*nested(leaves, arguments)), name)
            return [_to_tensor(leaf, path) for leaf, path in zip(results, tree.paths(name), strict=True)]

        return self._concrete_flat(name, flat, arguments)

    def _concrete_flat(
        self, name: str, flat: Callable[..., list[tf.Tensor]], arguments: Sequence[StructureSpec]
    ) -> Any:
        """The concrete function of a Python function of the flat leaves of these arguments."""

        # No AutoGraph for our own code, which it cannot convert. The model's functions have their own.
        @tf.function(autograph=False)
        def counted(*leaves: Any) -> list[tf.Tensor]:
            self._on_trace()
            return flat(*leaves)

        concrete = counted.get_concrete_function(*(tf_specs.to_tf(leaf) for spec in arguments for leaf in spec.leaves))
        _check_captures(concrete, name)
        return concrete


def batch_input(spec: StructureSpec, x: Any, y: Any) -> Any:
    """A batch in the container of an input spec."""
    names = spec.tree.names or ("x", "y")
    pair = trees.TreeDef(spec.tree.kind, (trees.LEAF, trees.LEAF), spec.tree.names)
    return pair.unflatten([{"x": x, "y": y}[name] for name in names])


def nested(leaves: Sequence[Any], arguments: Sequence[StructureSpec]) -> list[Any]:
    """Flat leaves as the structures of these specs."""
    values = iter(leaves)
    return [spec.tree.unflatten([next(values) for _ in range(spec.tree.num_leaves)]) for spec in arguments]


def _why_without_gradient(error: Exception) -> str:
    if isinstance(error, errors.FunctionNotAvailable):
        return str(error)
    if isinstance(error, LookupError):
        # TensorFlow's message names the operation that has no gradient.
        return f"TensorFlow cannot differentiate the model: {error}"
    return f"the model's own code raised {type(error).__name__}; see the server's log"


def _with_training(method: Callable[..., Any], training: bool) -> Callable[..., Any]:
    return lambda *arguments: method(*arguments, training=training)


def _to_tensor(value: Any, place: str) -> tf.Tensor:
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        raise errors.StructureMismatch(place=place, expected="a dense tensor", found=type(value).__name__)
    return tf.convert_to_tensor(value)


def _check_captures(concrete: Any, name: str) -> None:
    """Raises StructureMismatch for a captured variable: it would hold weights that no caller can give."""
    variables = [variable.name for variable in concrete.graph.variables]
    if variables:
        raise errors.StructureMismatch(
            place=name, expected="all weights as arguments", found=f"captured variables {variables}"
        )


def _common_spec(first: StructureSpec, second: StructureSpec, place: str) -> StructureSpec:
    """The narrowest spec that both specs fit."""
    if first.tree != second.tree:
        raise errors.StructureMismatch(place=place, expected=first.tree.describe(), found=second.tree.describe())
    leaves = []
    for one, other, path in zip(first.leaves, second.leaves, first.tree.paths(place), strict=True):
        if one.data_type is not other.data_type:
            raise errors.DTypeMismatch(place=path, expected=str(one), found=str(other))
        leaves.append(TensorSpec(_common_shape(one.shape, other.shape), one.data_type))
    return StructureSpec(first.tree, tuple(leaves))


def _common_shape(
    first: tuple[int | None, ...] | None, second: tuple[int | None, ...] | None
) -> tuple[int | None, ...] | None:
    if first is None or second is None or len(first) != len(second):
        return None
    return tuple(one if one == other else None for one, other in zip(first, second, strict=True))


def _weights(initial_weights: Any) -> tuple[StructureSpec, list[np.ndarray[Any, Any]]]:
    """The spec of the weights and their leaves as arrays."""
    tree, leaves = trees.flatten(initial_weights, "initial_weights")
    if len(tree.children) != 2:
        raise errors.StructureMismatch(
            place="initial_weights", expected="a pair (trainable, non_trainable)", found=tree.describe()
        )
    # Through tensors: to TensorFlow a Python number has 32 bits, to numpy 64.
    tensors = [tf.convert_to_tensor(leaf) for leaf in leaves]
    spec = tf_specs.to_wire(tree.unflatten(tensors), "initial_weights")
    return spec, [np.asarray(tensor) for tensor in tensors]
