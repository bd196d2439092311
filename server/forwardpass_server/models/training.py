"""Optimizer steps as graphs: gradients, optimizer, metrics and sums in one call of TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire import dtypes, errors
from forwardpass.wire.description import BatchOutput, ModelSpec
from forwardpass.wire.functions import Function
from forwardpass.wire.specs import StructureSpec, TensorSpec
from forwardpass_server.calls.model import Leaf, Totals, TrainingOptions
from forwardpass_server.models import execution, failures, placement, private_tensorflow, tf_specs
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.optimizers import GraphOptimizer
from forwardpass_server.models.runtime_functions import RuntimeFunction
from forwardpass_server.models.tracing import TracedModel

# On a GPU each of these has kernels, so that a step does not wait for it. TensorFlow keeps int32 on the host.
_TOTALS = StructureSpec.of(
    {
        "loss": TensorSpec((), dtypes.BY_NAME["float64"]),
        "num_examples": TensorSpec((), dtypes.BY_NAME["int64"]),
        "num_steps": TensorSpec((), dtypes.BY_NAME["int64"]),
    },
    "totals",
)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainableModel:
    """What a step calls of a model. It does not need the Python graphs of these functions.

    updates: as `tracing.TracedModel.updates`. unreached: the indices of the trainable leaves on which the loss does not
    depend. device: of the tensors.
    """

    spec: ModelSpec
    execution: Execution
    updates: Mapping[bool, RuntimeFunction]
    unreached: frozenset[int]
    device: str

    @classmethod
    def of(cls, traced: TracedModel, execution: Execution, device: str) -> TrainableModel:
        """The model that was traced, with its functions in TensorFlow's runtime."""
        paths = traced.spec.weights.child(0).tree.paths("model_weights.trainable")
        updates = {weighted: RuntimeFunction(concrete) for weighted, concrete in traced.updates.items()}
        unreached = frozenset(map(paths.index, traced.unreached_weights))
        return cls(traced.spec, execution, updates, unreached, device)


class GraphTrainer:
    """Optimizer steps of one model: see `calls.model.Trainer`.

    optimizer: as `optimizers.resolved` returns it. options: the others; their optimizer is ignored.
    on_trace: called once for each graph that Python builds.

    Keras skips weights on which the loss does not depend, and so does a step: weight decay does not change them. A leaf
    that is frozen, or that has no derivatives, is not an argument of the optimizer either, so that it does not count in
    a global norm.
    Raises OptimizerNotSupported, FunctionNotAvailable for a model without such gradients, and StructureMismatch for
    another number of booleans in `trainable` than there are leaves.
    """

    def __init__(
        self, model: TrainableModel, optimizer: str, options: TrainingOptions, on_trace: Callable[[], None]
    ) -> None:
        self._model = model
        self._is_proximal = options.proximal
        # What builds the graphs has cycles of references, and is dropped.
        graphs = _Graphs(model, optimizer, options)
        try:
            self._begin = graphs.compiled(graphs.first, [], on_trace)
            self._step = graphs.compiled(graphs.next, graphs.arguments(), on_trace)
        except errors.ForwardPassError:
            raise
        except Exception as error:  # Keras, for a data type or a shape that an optimizer does not take.
            raise _unfit(error) from error
        self._spec = graphs.spec
        self._state_bytes = sum(
            math.prod(1 if dim is None else dim for dim in leaf.shape or ()) * max(leaf.data_type.itemsize, 1)
            for leaf in (*model.spec.weights.leaves, *self._spec.leaves)
        )
        self._changed = graphs.changed
        self._has_schedule = graphs.optimizer.has_schedule
        self._num_metrics = graphs.num_metrics
        self._num_weights = len(model.spec.weights.leaves)
        num_trainable = len(model.spec.weights.child(0).leaves)
        self._changes_all = len(self._changed) == num_trainable
        self._positions = [*self._changed, *range(num_trainable, self._num_weights + len(self._spec.leaves))]
        # Most steps of an update take the same learning rate.
        self._number = functools.lru_cache(maxsize=64)(functools.partial(_number, model.device))

    @property
    def state_bytes(self) -> int:
        """See `calls.model.Trainer.state_bytes`. A dimension that may vary counts as 1."""
        return self._state_bytes

    @property
    def has_schedule(self) -> bool:
        """See `calls.model.Trainer.has_schedule`."""
        return self._has_schedule

    @property
    def state_spec(self) -> StructureSpec:
        """See `calls.model.Trainer.state_spec`. "optimizer" maps the names of variables to their specs."""
        return self._spec

    def begin(self, weights: Sequence[Leaf]) -> Sequence[Leaf]:
        """See `calls.model.Trainer.begin`."""
        placed = _placed(weights, self._model.spec.weights.leaves, self._model.device)
        try:
            return [*placed, *self._begin([])]
        except execution.CAUSED_BY_ARGUMENTS as error:
            raise execution.explained(error) from None

    def restored(self, weights: Sequence[Leaf], saved: Sequence[Leaf], *, with_totals: bool) -> Sequence[Leaf]:
        """See `calls.model.Trainer.restored`."""
        placed = _placed(saved, self._spec.leaves, self._model.device)
        if with_totals:
            return [*_placed(weights, self._model.spec.weights.leaves, self._model.device), *placed]
        begun, count = self.begin(weights), len(self._spec.named_child("optimizer").leaves)
        return [*begun[: self._num_weights], *placed[:count], *begun[self._num_weights + count :]]

    def step(
        self,
        state: Sequence[Leaf],
        batch: Sequence[Any],
        learning_rate: float,
        proximal: float,
        start: Sequence[Leaf],
    ) -> Sequence[Leaf]:
        """See `calls.model.Trainer.step`."""
        leaves = [*state, *batch]
        if not self._has_schedule:
            leaves.append(self._number(learning_rate))
        if self._is_proximal:
            leaves.append(self._number(proximal))
            leaves += [start[index] for index in self._changed]
        try:
            results = self._step(leaves)
        except execution.CAUSED_BY_ARGUMENTS as error:
            raise execution.explained(error) from None
        if self._changes_all:
            return results
        following = list(state)
        for position, result in zip(self._positions, results, strict=True):
            following[position] = result
        return following

    def weights(self, state: Sequence[Leaf]) -> Sequence[Leaf]:
        """See `calls.model.Trainer.weights`."""
        return state[: self._num_weights]

    def saved(self, state: Sequence[Leaf]) -> Sequence[Leaf]:
        """See `calls.model.Trainer.saved`."""
        return state[self._num_weights :]

    def totals(self, state: Sequence[Leaf]) -> Totals:
        """See `calls.model.Trainer.totals`."""
        *before, loss, num_examples, num_steps = state
        metrics: Sequence[Any] = ()
        if self._num_metrics:
            metrics_state = before[len(before) - self._num_metrics :]
            metrics = self._model.execution.run(Function.FINALIZE_METRICS, False, metrics_state)
        return Totals(float(loss), int(num_examples), int(num_steps), metrics)


class _Graphs:
    """Builds the graphs of a trainer.

    spec: of the state behind the weights. changed: the indices of the trainable leaves that a step changes.
    num_metrics: the number of leaves of the metrics state; 0 for a model without metrics.
    """

    def __init__(self, model: TrainableModel, optimizer: str, options: TrainingOptions) -> None:
        self._model = model
        self._options = options
        self._update = _update_of(model, options)
        self._update_metrics = _metrics_update_of(model, options)
        self.changed = _changed_leaves(model, options)
        self.num_metrics = len(model.spec.metrics_state.leaves) if self._update_metrics is not None else 0
        trainable = model.spec.weights.child(0).leaves
        specs = [
            tf.TensorSpec(trainable[index].shape, trainable[index].data_type.name, f"trainable_{index}")
            for index in self.changed
        ]
        try:
            self.optimizer = GraphOptimizer(optimizer, specs)
        except errors.ForwardPassError:
            raise
        except Exception as error:  # Keras, for a data type or a shape that an optimizer does not take.
            raise _unfit(error) from error
        self.spec = self._spec_of_state()

    def _spec_of_state(self) -> StructureSpec:
        variables = {spec.name: tf_specs.to_wire(spec, spec.name).leaves[0] for spec in self.optimizer.variables}
        nested = {
            "optimizer": variables,
            "metrics": self._model.spec.metrics_state.nested() if self._update_metrics is not None else None,
            "totals": _TOTALS.nested(),
        }
        return StructureSpec.of(nested, "optimizer_state")

    def arguments(self) -> list[tf.TensorSpec]:
        """The specs of a step's arguments."""
        spec = self._model.spec
        weighted = spec.sample_weight.leaves if self._options.weighted else ()
        leaves = [*spec.weights.leaves, *self.spec.leaves, *spec.x.leaves, *spec.y.leaves, *weighted]
        arguments = list(map(tf_specs.to_tf, leaves))
        if not self.optimizer.has_schedule:
            arguments.append(tf.TensorSpec([], tf.float32))
        if self._options.proximal:
            arguments.append(tf.TensorSpec([], tf.float32))
            arguments += [tf_specs.to_tf(spec.weights.leaves[index]) for index in self.changed]
        return arguments

    def compiled(
        self, function: Callable[..., list[tf.Tensor]], arguments: Sequence[tf.TensorSpec], on_trace: Callable[[], None]
    ) -> Callable[[Sequence[Leaf]], list[Any]]:
        """A function of tensors as a graph: what calls it. arguments: their specs."""

        @tf.function(autograph=False)
        def traced(*leaves: tf.Tensor) -> list[tf.Tensor]:
            on_trace()
            return function(*leaves)

        unnamed = [tf.TensorSpec(spec.shape, spec.dtype) for spec in arguments]
        concrete = traced.get_concrete_function(*unnamed)
        return execution.caller(RuntimeFunction(concrete), concrete, self._model.device)

    def first(self) -> list[tf.Tensor]:
        """The state behind the weights before the first step."""
        metrics: list[tf.Tensor] = []
        if self._update_metrics is not None:
            metrics = self._model.execution.functions[Function.INITIALIZE_METRICS_STATE, False].in_graph([])
        sums = [tf.zeros([], leaf.data_type.name) for leaf in _TOTALS.leaves]
        return [*self.optimizer.initial(), *metrics, *sums]

    def next(self, *leaves: tf.Tensor) -> list[tf.Tensor]:
        """The changed trainable weights, and the state behind them, after one batch."""
        spec, remaining = self._model.spec, _Remaining(leaves)
        trainable, non_trainable = (remaining.take(len(spec.weights.child(index).leaves)) for index in (0, 1))
        variables = remaining.take(len(self.optimizer.variables))
        metrics = remaining.take(self.num_metrics)
        totals = remaining.take(len(_TOTALS.leaves))
        x, y = remaining.take(len(spec.x.leaves)), remaining.take(len(spec.y.leaves))
        sample_weight = remaining.take(len(spec.sample_weight.leaves) if self._options.weighted else 0)
        learning_rate = None if self.optimizer.has_schedule else remaining.take(1)[0]

        output = _Remaining(self._update.in_graph([*trainable, *non_trainable, *x, *y, *sample_weight]))
        parts = {
            f"batch_output.{name}": output.take(len(spec.batch_output.named_child(name).leaves))
            for name in BatchOutput._fields
        }
        parts["batch_output.prediction_mask"] = output.take(len(spec.prediction_mask.leaves))
        gradients = _by_leaf(spec, output.take(len(spec.gradients.leaves)))
        new_non_trainable = output.take(len(non_trainable))

        changed = [trainable[index] for index in self.changed]
        slopes = [gradients[index] for index in self.changed]
        if self._options.proximal:
            coefficient = remaining.take(1)[0]
            slopes = [
                slope + tf.cast(coefficient, weight.dtype) * (weight - begun)
                for slope, weight, begun in zip(slopes, changed, remaining.take(len(changed)), strict=True)
            ]
        if changed:
            changed, variables = self.optimizer.step(variables, slopes, changed, learning_rate)
        if self._update_metrics is not None:
            function, parts["state"], parts["labels"] = self._update_metrics, metrics, y
            parts["sample_weight"] = sample_weight
            places = spec.arguments[function]
            arguments = [leaf for place in places for leaf in parts[place]]
            metrics = self._model.execution.functions[function, False].in_graph(arguments)
        sums = _added(totals, parts["batch_output.loss"], parts["batch_output.num_examples"])
        return [tf.identity(leaf) for leaf in (*changed, *new_non_trainable, *variables, *metrics, *sums)]


def _unfit(error: Exception) -> errors.OptimizerNotSupported:
    return errors.OptimizerNotSupported(
        f"cannot change the weights of this model: {failures.sentence(error)}", place="optimizer"
    )


def _placed(leaves: Sequence[Leaf], wanted: Sequence[TensorSpec], device: str) -> list[Any]:
    """The leaves as tensors on the device. They fit these specs."""
    eager_tensor, make_tensor = private_tensorflow.eager_tensor_class(), private_tensorflow.tensor_maker()
    placed = []
    for leaf, spec in zip(leaves, wanted, strict=True):
        dtype = tf.dtypes.as_dtype(spec.data_type.name)
        place = placement.device_of(dtype, device)
        is_placed = type(leaf) is eager_tensor
        placed.append(leaf if is_placed else make_tensor(np.asarray(leaf), place, dtype.as_datatype_enum))
    return placed


def _number(device: str, value: float) -> Any:
    """A float32 on the device."""
    return _placed([np.float32(value)], [TensorSpec((), dtypes.BY_NAME["float32"])], device)[0]


class _Remaining:
    """Takes leaves from the front of a list."""

    def __init__(self, leaves: Sequence[tf.Tensor]) -> None:
        self._leaves = list(leaves)

    def take(self, count: int) -> list[tf.Tensor]:
        taken, self._leaves = self._leaves[:count], self._leaves[count:]
        return taken


def _update_of(model: TrainableModel, options: TrainingOptions) -> RuntimeFunction:
    function = Function.WEIGHTED_FORWARD_BACKWARD if options.weighted else Function.FORWARD_BACKWARD
    if options.weighted not in model.updates:
        reason = model.spec.unavailable.get(function, "it has no gradients")
        weights = " with sample weights" if options.weighted else ""
        raise errors.FunctionNotAvailable(f"the model cannot be trained{weights}: {reason}")
    return model.updates[options.weighted]


def _metrics_update_of(model: TrainableModel, options: TrainingOptions) -> Function | None:
    """The function that updates the metrics; None for a model without metrics."""
    unavailable = model.spec.unavailable
    if Function.INITIALIZE_METRICS_STATE in unavailable or not model.spec.metrics.leaves:
        return None
    function = Function.WEIGHTED_UPDATE_METRICS_STATE if options.weighted else Function.UPDATE_METRICS_STATE
    if function in unavailable:
        raise errors.FunctionNotAvailable(
            f"the model cannot be trained with sample weights: {function.title}: {unavailable[function]}"
        )
    return function


def _changed_leaves(model: TrainableModel, options: TrainingOptions) -> list[int]:
    """The indices of the trainable leaves that a step changes."""
    spec = model.spec.weights.child(0)
    wanted = options.trainable or (True,) * len(spec.leaves)
    if len(wanted) != len(spec.leaves):
        raise errors.StructureMismatch(
            place="trainable", expected=f"{len(spec.leaves)} booleans", found=f"{len(wanted)}"
        )
    changed = [
        index
        for index, leaf in enumerate(spec.leaves)
        if wanted[index] and leaf.data_type.is_differentiable and index not in model.unreached
    ]
    paths = spec.tree.paths("model_weights.trainable")
    for index in changed:
        if spec.leaves[index].dtype.kind == "c":
            raise errors.OptimizerNotSupported(
                f"expected real weights, got {spec.leaves[index]}: freeze this leaf", place=paths[index]
            )
    return changed


def _by_leaf(spec: ModelSpec, gradients: Sequence[tf.Tensor]) -> dict[int, tf.Tensor]:
    """The gradients by the indices of their trainable leaves."""
    positions = [index for index, leaf in enumerate(spec.weights.child(0).leaves) if leaf.data_type.is_differentiable]
    return dict(zip(positions, gradients, strict=True))


def _added(totals: Sequence[tf.Tensor], losses: Sequence[tf.Tensor], counts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The sums after one more batch. A loss of several values counts as their sum, as it does for its gradients."""
    loss, num_examples, num_steps = totals
    of_batch = tf.add_n([tf.reduce_sum(tf.cast(one, tf.float64)) for one in losses])
    count = tf.add_n([tf.reduce_sum(tf.cast(one, tf.int64)) for one in counts])
    return [loss + of_batch * tf.cast(count, tf.float64), num_examples + count, num_steps + 1]
