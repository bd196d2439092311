"""A remote model on TensorFlow's tensors, with derivatives for `tf.GradientTape`. Needs TensorFlow 2.14 or newer."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from forwardpass.wire import conform, errors, trees
from forwardpass.wire.description import BatchOutput, Function
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import StructureSpec, TensorSpec
from forwardpass_client import flat_model
from forwardpass_client.calls import batch_output_values, check_training, x_and_y
from forwardpass_client.flat_model import FlatModel
from forwardpass_client.model import RemoteFunctionalModel
from forwardpass_client.weights_handles import WeightsHandleApi

Tensors: TypeAlias = list[Any]

# AutoGraph would rewrite the methods below, and what they call, where a `tf.function` calls them.
_AS_IT_IS = tf.autograph.experimental.do_not_convert

# The attribute of predictions that names the call which returned them.
_CALL = "_forwardpass_call"
# Keras's own attribute.
_MASK = "_keras_mask"


def functional_model(model: RemoteFunctionalModel) -> Any:
    """The model as a functional model of TFF on tensors: see `TensorModel`.

    model: of `connect(...).model(name)`.
    Where TFF is installed, the result is an instance of its `tff.learning.models.FunctionalModel` too, which
    `tff.learning.models.model_from_functional` takes, for training loops under `tf.GradientTape`. TFF's learning
    processes (`tff.learning.algorithms`) cannot use it, because TFF's C++ runtime runs graphs in another process, which
    has no Python: `next` raises `grpc.RpcError` with "Failed to run computation: No OpKernel was registered to support
    Op 'PyFunc'". Give them the SavedModel itself.
    Raises TypeError for another object, the model of an AsyncClient included.
    """
    base = _tff_class()
    if base is None:
        return TensorModel(model)

    class TffTensorModel(TensorModel, base):  # type: ignore[misc, valid-type]
        """`TensorModel` as an instance of TFF's class. Its functions need no `tf.function` around them."""

    return TffTensorModel(model)


def _tff_class() -> Any:
    """`tff.learning.models.FunctionalModel`; None where TFF is not installed."""
    try:
        import tensorflow_federated as tff
    except ModuleNotFoundError as error:
        if error.name != "tensorflow_federated":
            raise
        return None
    return tff.learning.models.FunctionalModel


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """The arguments of a call that returns predictions, as tensors. handle: of the weights, which are then no tensors.

    inputs: leaves of x.
    """

    trainable: Tensors
    non_trainable: Tensors
    handle: WeightsHandleApi | None
    inputs: Tensors
    training: bool

    @property
    def weights(self) -> Tensors:
        return [*self.trainable, *self.non_trainable]

    def weights_of(self, arrays: Sequence[Any]) -> flat_model.Weights:
        """The weights for an RPC. arrays: the values of `weights`."""
        return arrays if self.handle is None else self.handle


class TensorModel:
    """A remote model with the methods of `tff.learning.models.FunctionalModel` on tensors.

    Arguments are tensors, `tf.Variable`s or arrays in the model's containers; results are tensors. The methods work
    eagerly and in `tf.function`, but not with `jit_compile=True`. They are differentiable with respect to the trainable
    weights, and predictions also with respect to x. Each call has the client's timeout.

    RPCs: `forward_pass` makes one, which also computes the gradients if a gradient can be asked for: if a tape records
    the trainable weights, or, in a `tf.function`, if TensorFlow has built the gradient of the call. `predict_on_batch`
    makes one, and its gradient another. `loss` makes one.

    Derivatives that the server does not give raise FunctionNotAvailable when the gradient is computed, or
    `tf.errors.UnimplementedError` in a `tf.function`. Where the tape is outside of the `tf.function`, TensorFlow asks
    for the derivatives of all arguments, used or not: those that the server does not give are then NaN.

    A model with random numbers that do not come from its weights draws them again in each RPC, so the gradient of
    `predict_on_batch` can belong to another draw than its predictions.

    Errors: eagerly those of `forwardpass_client.errors`. In a `tf.function` one of `tf.errors`, with the text of it.
    """

    def __init__(self, model: RemoteFunctionalModel) -> None:
        self._flat = FlatModel(model)
        self._model = model
        spec = self._flat.spec
        self._input_spec = spec.input.tree.unflatten([_tf_spec(leaf) for leaf in spec.input.leaves])

    @property
    def initial_weights(self) -> Any:
        """(trainable, non_trainable) as read-only arrays: see `RemoteFunctionalModel.initial_weights`."""
        return self._model.initial_weights

    @property
    def input_spec(self) -> Any:
        """(x, y) in the model's containers, with a `tf.TensorSpec` for each leaf."""
        return self._input_spec

    @_AS_IT_IS
    def predict_on_batch(self, model_weights: Any, x: Any, training: bool = True) -> Any:
        """Predictions for one batch: tensors of shape [B, ...], differentiable with respect to the weights and x.

        model_weights: (trainable, non_trainable), or a handle of `put_weights`, without derivatives.
        x: leaves of shape [B, ...] as in `input_spec`.
        A tensor of the predictions carries its Keras mask, if the model has one, as in Keras.
        Raises what the model's `predict_on_batch` raises.
        """
        call = self._call(model_weights, x, training)
        spec = self._flat.spec

        def predict(weights: Sequence[Any], inputs: Sequence[Any]) -> list[Array]:
            return self._flat.predict(call.weights_of(weights), inputs, call.training)

        found = _run(predict, [call.weights, call.inputs], [*spec.predictions.leaves, *spec.prediction_mask.leaves])
        return self._predictions(call, found[: len(spec.predictions.leaves)], found[len(spec.predictions.leaves) :])

    @_AS_IT_IS
    def forward_pass(self, model_weights: Any, batch_input: Any, training: bool = True) -> BatchOutput:
        """Loss, predictions and number of examples of one batch, differentiable with respect to the trainable weights.

        model_weights, training: as of `predict_on_batch`.
        batch_input: (x, y) or a mapping with x and y, leaves of shape [B, ...] as in `input_spec`.
        The predictions are differentiable with respect to x, too, unless the model's forward pass is a function of its
        own (`description.spec.has_own_forward_pass`): then they have no derivatives. A loss of several values gives the
        gradient of their sum; where they are scaled differently, FunctionNotAvailable is raised.
        Raises what the model's `forward_pass` raises.
        """
        x, y = x_and_y(batch_input)
        call = self._call(model_weights, x, training)
        labels = _tensors(y, self._flat.spec.y, "batch_input.y")
        outputs = self._flat.batch_output
        leaves = [*outputs.loss.leaves, *outputs.predictions.leaves, *outputs.num_examples.leaves]

        def forward(weights: Sequence[Any], inputs: Sequence[Any], labels: Sequence[Any]) -> list[Array]:
            return self._flat.forward(call.weights_of(weights), inputs, labels, call.training)

        found = self._with_gradients(
            Function.FORWARD_BACKWARD, call, labels, [], [], forward, [*leaves, *self._flat.spec.prediction_mask.leaves]
        )
        loss, rest = found[: len(outputs.loss.leaves)], found[len(outputs.loss.leaves) :]
        predictions, rest = rest[: len(outputs.predictions.leaves)], rest[len(outputs.predictions.leaves) :]
        if self._flat.spec.has_own_forward_pass:
            sources = [*call.weights, *call.inputs]
            attached = _without_derivatives(predictions, sources, flat_model.NO_OWN_FORWARD_PASS)
            predicted = outputs.predictions.tree.unflatten(_masked(attached, rest[1:], self._flat))
        else:
            predicted = self._predictions(call, predictions, rest[1:])
        return BatchOutput(outputs.loss.tree.unflatten(loss), predicted, rest[0])

    @_AS_IT_IS
    def loss(self, output: Any, label: Any, sample_weight: Any = None) -> Any:
        """The loss of predictions against labels.

        output: predictions, leaves of shape [B, ...]. label: leaves of shape [B, ...] as y of `input_spec`.
        sample_weight: one weight for each example, float32[B] unless the model says otherwise; None for no weights.
        The server does not give the derivatives of the loss with respect to predictions. But if `output` is what
        `predict_on_batch` or `forward_pass` returned, unchanged, the result is differentiable with respect to the
        trainable weights of that call, though not to `output`: the server then runs the forward pass again, with its
        gradients. Otherwise, and for models whose forward pass is a function of its own, the gradient raises
        FunctionNotAvailable: use `forward_pass`.
        Raises what the model's `loss` raises.
        """
        spec = self._flat.spec
        outputs = _tensors(output, spec.predictions, "output")
        masks = _carried(output, self._flat)
        labels = _tensors(label, spec.y, "label")
        weights_of_rows = [] if sample_weight is None else _tensors(sample_weight, spec.sample_weight, "sample_weight")

        def loss(outputs: Any, masks: Any, labels: Any, weights_of_rows: Any) -> list[Array]:
            return self._flat.loss(outputs, masks, labels, weights_of_rows)

        call = _source(output, spec.predictions)
        function = Function.FORWARD_BACKWARD if sample_weight is None else Function.WEIGHTED_FORWARD_BACKWARD
        if call is None or spec.has_own_forward_pass or not _may_be_differentiated(_differentiable(call.trainable)):
            groups = [outputs, masks, labels, weights_of_rows]
            found = _run(loss, groups, spec.loss.leaves)
            sources = [*outputs, *labels, *weights_of_rows]
            attached = _without_derivatives(found, sources, flat_model.NO_LOSS_DERIVATIVES)
            return spec.loss.tree.unflatten(attached)
        sizes = [len(outputs), len(masks)]

        def loss_of_call(weights: Any, inputs: Any, labels: Any, rows: Any, others: Any) -> list[Array]:
            return self._flat.loss(others[: sizes[0]], others[sizes[0] :], labels, rows)

        found = self._with_gradients(
            function, call, labels, weights_of_rows, [*outputs, *masks], loss_of_call, spec.loss.leaves
        )
        return spec.loss.tree.unflatten(found)

    @_AS_IT_IS
    def initialize_metrics_state(self) -> Any:
        """The metrics state before the first batch, as tensors. Raises what the model's function raises."""
        self._check_available(Function.INITIALIZE_METRICS_STATE)
        spec = self._flat.spec.metrics_state

        def initialize() -> list[Array]:
            return conform.arrange(self._model.initialize_metrics_state(), spec.tree, "state")

        return spec.tree.unflatten(_run(initialize, [], spec.leaves))

    @_AS_IT_IS
    def update_metrics_state(self, state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
        """The metrics state after one more batch. It has no derivatives.

        state: of `initialize_metrics_state` or of this method.
        labels: leaves of shape [B, ...] as y of `input_spec`.
        batch_output: of `forward_pass`, or an object with its fields; those that the metrics do not read may be None.
        sample_weight: as of `loss`.
        Raises what the model's `update_metrics_state` raises.
        """
        weighted = Function.WEIGHTED_UPDATE_METRICS_STATE
        self._check_available(Function.UPDATE_METRICS_STATE if sample_weight is None else weighted)
        spec = self._flat.spec
        values = batch_output_values(batch_output)
        present = {place: value for place, value in values.items() if value is not None}
        fields = {place: _tensors(value, spec.places[place], place) for place, value in present.items()}
        masks = _carried(values["batch_output.predictions"], self._flat)
        rows = [] if sample_weight is None else _tensors(sample_weight, spec.sample_weight, "sample_weight")

        def update(state: Any, labels: Any, masks: Any, rows: Any, *leaves: Any) -> list[Array]:
            found = {
                place.partition(".")[2]: spec.places[place].tree.unflatten(group)
                for place, group in zip(fields, leaves, strict=True)
            }
            return self._flat.update_metrics_state(state, labels, BatchOutput(**found), masks, rows)

        groups = [_tensors(state, spec.metrics_state, "state"), _tensors(labels, spec.y, "labels"), masks, rows]
        updated = _run(update, [*groups, *fields.values()], spec.metrics_state.leaves)
        return spec.metrics_state.tree.unflatten(updated)

    @_AS_IT_IS
    def finalize_metrics(self, state: Any) -> Any:
        """The metrics of a state, by name, as tensors. state: in the shapes of `initialize_metrics_state`.

        Raises what the model's `finalize_metrics` raises.
        """
        self._check_available(Function.FINALIZE_METRICS)
        spec = self._flat.spec

        def finalize(state: Any) -> list[Array]:
            metrics = self._model.finalize_metrics(spec.metrics_state.tree.unflatten(state))
            return conform.arrange(metrics, spec.metrics.tree, "metrics")

        found = _run(finalize, [_tensors(state, spec.metrics_state, "state")], spec.metrics.leaves)
        return spec.metrics.tree.unflatten(found)

    def _check_available(self, function: Function) -> None:
        """Raises FunctionNotAvailable: in a graph without outputs nothing else would."""
        reason = self._flat.spec.unavailable.get(function)
        if reason is not None:
            raise errors.FunctionNotAvailable(f"{function.title} is not available: {reason}")

    def _call(self, model_weights: Any, x: Any, training: Any) -> _Call:
        inputs = _tensors(x, self._flat.spec.x, "x")
        training = check_training(training)
        if isinstance(model_weights, WeightsHandleApi):
            return _Call([], [], model_weights, inputs, training)
        if isinstance(model_weights, (str, bytes)):
            raise TypeError("model_weights: expected weights or a handle, got an id: use model.weights_handle(id)")
        items = conform.items(model_weights, self._flat.spec.weights.tree, "model_weights")
        trainable = _tensors(items[0], self._flat.trainable, "model_weights.trainable")
        non_trainable = _tensors(items[1], self._flat.non_trainable, "model_weights.non_trainable")
        return _Call(trainable, non_trainable, None, inputs, training)

    def _predictions(self, call: _Call, predictions: Tensors, masks: Tensors) -> Any:
        """Predictions of `predict_on_batch` with their derivatives, their masks and the call that returned them."""
        spec = self._flat.spec
        reason = spec.unavailable.get(Function.VJP)
        sources = [*_differentiable(call.trainable), *_differentiable(call.inputs)]
        others = _recorded(_differentiable(call.non_trainable))
        graph = _graph()

        def vjp(weights: Any, inputs: Any, cotangents: Any) -> list[Array]:
            of_weights, of_x = self._flat.vjp(call.weights_of(weights), inputs, cotangents, call.training)
            return [*of_weights, *of_x] if call.handle is None else of_x

        def backward(*cotangents: Any) -> Tensors:
            specs = [*(self._flat.spec.gradients.leaves if call.handle is None else ()), *spec.x.differentiable.leaves]
            found = _run(vjp, [call.weights, call.inputs, list(cotangents)], specs) if specs else []
            found = [_of_shape(tensor, source) for tensor, source in zip(found, sources, strict=True)]
            all_sources = [*sources, *others, *cotangents]
            found = _without_derivatives(found, all_sources, flat_model.NO_SECOND_DERIVATIVES)
            return [*found, *_refuse(cotangents, others, flat_model.NO_VJP, graph)]

        if reason is None:
            attached = _attach(predictions, [*sources, *others], backward)
        else:
            attached = _without_derivatives(predictions, [*sources, *others], f"vjp is not available: {reason}")
        if any(tensor is not value for tensor, value in zip(attached, predictions, strict=True)):
            for index, tensor in enumerate(attached):
                setattr(tensor, _CALL, (call, index))
        return spec.predictions.tree.unflatten(_masked(attached, masks, self._flat))

    def _with_gradients(
        self,
        function: Function,
        call: _Call,
        labels: Tensors,
        weights_of_rows: Tensors,
        others: Tensors,
        compute: Callable[..., list[Array]],
        specs: Sequence[TensorSpec],
    ) -> Tensors:
        """The results of `compute`, the first of which are the loss with its gradients.

        Runs forward_backward instead of `compute` where a gradient can be asked for.
        others: further arguments of `compute`. specs: of the results.
        """
        num_losses = len(self._flat.spec.loss.leaves)
        sources = _differentiable(call.trainable)
        refused = [*_differentiable(call.inputs), *_differentiable(call.non_trainable)]
        refused += _differentiable([*labels, *weights_of_rows])
        groups = [call.weights, call.inputs, labels, weights_of_rows, others]
        reason = self._flat.spec.unavailable.get(function)
        if reason is not None or not sources:
            found = _run(lambda *groups: _of_groups(compute, groups), groups, specs)
            message = flat_model.NO_LOSS_DERIVATIVES if reason is None else f"{function.title}: {reason}"
            losses = _without_derivatives(found[:num_losses], [*sources, *refused], message)
            return [*losses, *found[num_losses:]]
        # In a graph, TensorFlow builds gradients before it runs the call: `backward` then sets `is_wanted`.
        is_wanted = [tf.executing_eagerly() and _is_recorded(sources)]

        def run(*groups: Any) -> list[Array]:
            if not is_wanted[0]:
                # These gradients are never read.
                return [
                    *_of_groups(compute, groups),
                    *(np.zeros(0, leaf.dtype) for leaf in self._flat.spec.gradients.leaves),
                ]
            weights, inputs, labels, rows = groups[:4]
            outputs, gradients = self._flat.forward_backward(
                call.weights_of(weights), inputs, labels, rows, call.training
            )
            return [*outputs[: len(specs)], *gradients]

        gradient_specs = [TensorSpec(None, leaf.data_type) for leaf in self._flat.spec.gradients.leaves]
        found = _run(run, groups, [*specs, *gradient_specs])
        results, gradients = found[: len(specs)], found[len(specs) :]
        graph = _graph()

        def backward(*upstream: Any) -> Tensors:
            is_wanted[0] = True
            scale = _common_scale(upstream)
            scaled = [
                tf.cast(scale, gradient.dtype) * _of_shape(gradient, source)
                for gradient, source in zip(gradients, sources, strict=True)
            ]
            all_sources = [*sources, *refused]
            scaled = _without_derivatives(scaled, all_sources, flat_model.NO_SECOND_DERIVATIVES)
            return [*scaled, *_refuse(upstream, refused, flat_model.NO_LOSS_DERIVATIVES, graph)]

        refused = _recorded(refused)
        return [*_attach(results[:num_losses], [*sources, *refused], backward), *results[num_losses:]]


def _of_groups(compute: Callable[..., list[Array]], groups: Sequence[Any]) -> list[Array]:
    """The results of a function that takes (weights, inputs, labels), or all five groups."""
    return compute(*groups) if groups[4] else compute(*groups[:3])


def _tf_spec(spec: TensorSpec) -> Any:
    return tf.TensorSpec(spec.shape, tf.as_dtype(spec.data_type.name))


def _tensors(value: Any, spec: StructureSpec, place: str) -> Tensors:
    """The leaves of a value as tensors. Raises StructureMismatch, DTypeMismatch or ShapeMismatch, naming the leaf."""
    leaves = conform.arrange(value, spec.tree, place)
    return [
        _tensor(leaf, leaf_spec, path)
        for leaf, leaf_spec, path in zip(leaves, spec.leaves, spec.tree.paths(place), strict=True)
    ]


def _tensor(value: Any, spec: TensorSpec, place: str) -> Any:
    if value is None or isinstance(value, (np.ndarray, np.generic, list, tuple, dict, str, bytes, int, float, complex)):
        return tf.convert_to_tensor(conform.conform_leaf(value, spec, place), tf.as_dtype(spec.data_type.name))
    try:
        # Reads a variable, in a way that a tape records.
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        found = f"a {type(value).__name__} that is no tensor"
        raise errors.StructureMismatch(place=place, expected=str(spec), found=found) from error
    if not tf.TensorShape(spec.shape).is_compatible_with(tensor.shape):
        found = f"{tensor.dtype.name}[{','.join(map(str, tensor.shape))}]"
        raise errors.ShapeMismatch(place=place, expected=str(spec), found=found)
    wanted = tf.as_dtype(spec.data_type.name)
    if tensor.dtype == wanted or not spec.data_type.is_differentiable:
        # The SDK casts other arrays: it checks that integers fit.
        return tensor
    if tensor.dtype == tf.string or not conform.can_cast(np.dtype(tensor.dtype.as_numpy_dtype), spec.data_type):
        found = f"{tensor.dtype.name}[{','.join(map(str, tensor.shape))}]"
        raise errors.DTypeMismatch(place=place, expected=str(spec), found=found)
    return tf.cast(tensor, wanted)


def _differentiable(tensors: Sequence[Any]) -> Tensors:
    return [tensor for tensor in tensors if tensor.dtype.is_floating or tensor.dtype.is_complex]


def _run(body: Callable[..., list[Array]], groups: Sequence[Sequence[Any]], specs: Sequence[TensorSpec]) -> Tensors:
    """The arrays of `body` as tensors without derivatives. `body` takes one list of values for each group.

    Eagerly it runs at once, and its errors are raised as they are. In a graph it runs each time the graph does.
    """
    ends = list(itertools.accumulate(map(len, groups)))
    starts = [0, *ends]

    def flat_body(*values: Any) -> list[Array]:
        return body(*[values[start:end] for start, end in zip(starts, ends, strict=False)])

    tensors = [tensor for group in groups for tensor in group]
    dtypes = [tf.as_dtype(spec.data_type.name) for spec in specs]
    if tf.executing_eagerly():
        return [tf.convert_to_tensor(array, dtype) for array, dtype in zip(flat_body(*tensors), dtypes, strict=True)]
    results = tf.numpy_function(flat_body, tensors, dtypes) if dtypes else []
    for result, spec in zip(results, specs, strict=True):
        result.set_shape(spec.shape)
    return list(results)


def _attach(values: Sequence[Any], inputs: Sequence[Any], backward: Callable[..., Tensors]) -> Tensors:
    """The values, with derivatives with respect to the inputs.

    backward: takes the derivatives with respect to those values that can have some, returns one for each input.
    """
    kept = _differentiable(values)
    if not kept or not inputs or (tf.executing_eagerly() and not _is_recorded(inputs)):
        return list(values)

    @tf.custom_gradient
    def attached(*inputs: Any) -> Any:
        return kept, lambda *upstream: backward(*upstream)

    results = iter(attached(*inputs))
    return [next(results) if _differentiable([value]) else value for value in values]


def _without_derivatives(values: Sequence[Any], inputs: Sequence[Any], message: str) -> Tensors:
    """The values, whose derivatives with respect to the inputs raise FunctionNotAvailable with this message."""
    sources = _differentiable(inputs)
    graph = _graph()
    return _attach(values, sources, lambda *upstream: _refuse(upstream, sources, message, graph))


def _refuse(upstream: Sequence[Any], inputs: Sequence[Any], message: str, graph: Any) -> Tensors:
    """Derivatives that do not exist, one for each input: zeros where `upstream` is; otherwise see `TensorModel`.

    graph: in which the results were computed.
    """

    def check(*arrays: Any) -> list[Array]:
        if any(np.any(np.asarray(array)) for array in arrays):
            raise errors.FunctionNotAvailable(message)
        return [np.float32(0)]

    if not inputs:
        return []
    if tf.executing_eagerly():
        check(*upstream)
        return [None] * len(inputs)
    if graph is _graph():
        # Stateless: pruned where nothing reads the derivative.
        (number,) = tf.numpy_function(check, list(upstream), [tf.float32], stateful=False)
        number.set_shape([])
    else:
        is_used = tf.reduce_any([tf.reduce_any(tensor != tf.zeros([], tensor.dtype)) for tensor in upstream])
        number = tf.where(is_used, np.float32(np.nan), np.float32(0))
    return [tf.fill(tf.shape(tensor), tf.cast(number, tensor.dtype)) for tensor in inputs]


def _is_recorded(tensors: Sequence[Any]) -> bool:
    """Whether a tape records eager operations on these tensors.

    TensorFlow has no public function for this. A tape keeps the gradient function of an operation that it records, and
    nothing else does.
    """
    if not tensors:
        return False

    def probe() -> tuple[Any, Any]:
        def gradient(*_: Any) -> Any:
            return [None] * len(tensors)

        return tf.custom_gradient(lambda *_: (tf.zeros([]), gradient))(*tensors), weakref.ref(gradient)

    # The result is kept until the end: a tape forgets an operation whose results are gone.
    result, reference = probe()
    is_recorded = reference() is not None
    del result
    return is_recorded


def _may_be_differentiated(tensors: Sequence[Any]) -> bool:
    return bool(tensors) and (not tf.executing_eagerly() or _is_recorded(tensors))


def _recorded(tensors: Tensors) -> Tensors:
    """The tensors; [] if no tape records them. In a graph this is not known."""
    return tensors if _may_be_differentiated(tensors) else []


def _common_scale(upstream: Sequence[Any]) -> Any:
    """The one number by which every value of the loss is scaled. Raises FunctionNotAvailable where they differ."""
    if len(upstream) == 1 and upstream[0].shape.rank == 0:
        return upstream[0]

    def common(*arrays: Any) -> list[Array]:
        return [flat_model.common_scale(list(map(np.asarray, arrays)))]

    if tf.executing_eagerly():
        return tf.convert_to_tensor(common(*upstream)[0])
    (scale,) = tf.numpy_function(common, list(upstream), [upstream[0].dtype])
    scale.set_shape([])
    return scale


def _of_shape(tensor: Any, source: Any) -> Any:
    return tensor if tf.executing_eagerly() else tf.ensure_shape(tensor, source.shape)


def _graph() -> Any:
    """The graph that is being built; None in eager execution."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _masked(predictions: Tensors, masks: Tensors, flat: FlatModel) -> Tensors:
    """The predictions, where each masked leaf carries its mask as in Keras."""
    for index, mask in zip(flat.spec.masked_leaves, masks, strict=True):
        setattr(predictions[index], _MASK, mask)
    return predictions


def _carried(predictions: Any, flat: FlatModel) -> Tensors:
    """The masks that predictions carry; [] where one is missing: the SDK then warns."""
    if predictions is None or not flat.spec.masked_leaves:
        return []
    leaves = conform.arrange(predictions, flat.spec.predictions.tree, "predictions")
    masks = [getattr(leaves[index], _MASK, None) for index in flat.spec.masked_leaves]
    return [] if any(mask is None for mask in masks) else list(map(tf.convert_to_tensor, masks))


def _source(output: Any, spec: StructureSpec) -> _Call | None:
    """The call that returned these predictions, unchanged; None for others."""
    _, leaves = trees.flatten(output, "output")
    sources = [getattr(leaf, _CALL, (None, None)) for leaf in leaves]
    call = sources[0][0] if sources else None
    is_whole = len(leaves) == len(spec.leaves) and sources == [(call, index) for index in range(len(leaves))]
    return call if is_whole and call is not None else None
