"""Steps of an evaluation as graphs: forward pass and update of the metrics in one call of TensorFlow."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire import errors
from forwardpass.wire.description import ModelSpec
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import SAMPLE_WEIGHT, Function
from forwardpass.wire.specs import TensorSpec
from forwardpass_server.calls.model import CannotVectorize, Leaf
from forwardpass_server.models import execution, placement, probing, tf_specs, weight_stacks
from forwardpass_server.models.examples import Examples
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.runtime_functions import RuntimeFunction
from forwardpass_server.models.tracing import Key
from forwardpass_server.models.weight_stacks import GraphSource, Probed, Variants, vectorized

_LOGGER = logging.getLogger(__name__)

# The sets and rows of the probe of stacks. Kernels choose their order of summation by these sizes.
_STACKED_SETS = (2, 9)
_STACKED_ROWS = (3, 33)

# Batches in the larger graph. With MLP 784-128-10 and batch 32, a batch takes 85 us in two calls, 53 us in one call,
# and 39 us in a call of eight batches (measured). Four keep a call below the 300 us that may run on the event loop.
_BATCHES = 4

# Slower models gain nothing from the larger graph: a CNN that takes 1.2 ms a batch is 6 % slower with it (measured).
_MAX_JOINED_S = 300e-6

# A call less is not measurable here, and the graphs of a large network take seconds to warm.
_MAX_STEP_S = 5e-3

# Kernels may sum in another order for another number of rows.
_PROBED_ROWS = (None, 33)


class GraphEvaluator:
    """Steps of one model, for inference: see `calls.model.Evaluator`.

    functions: the concrete functions of the model. one: the concrete function for one batch, until `Evaluators` has it.
    weighted: whether batches have sample weights. joined: whether there is a graph for several batches too.
    on_trace: called once for each graph that Python builds.
    """

    def __init__(
        self,
        spec: ModelSpec,
        functions: Mapping[Key, Any],
        device: str,
        *,
        weighted: bool,
        joined: bool,
        on_trace: Callable[[], None],
    ) -> None:
        graph = _Graph(spec, functions, weighted)
        self._num_state = len(spec.metrics_state.leaves)
        one = graph.concrete(1, on_trace)
        self._one = execution.caller(RuntimeFunction(one), one, device)
        self.one = one
        self._several = None
        if joined:
            several = graph.concrete(_BATCHES, on_trace)
            self._several = execution.caller(RuntimeFunction(several), several, device)
        self._joined = _BATCHES if joined else 1

    @property
    def joined(self) -> int:
        """See `calls.model.Evaluator.joined`."""
        return self._joined

    def step(self, weights: Sequence[Leaf], state: Sequence[Leaf], batches: Sequence[Sequence[Leaf]]) -> Sequence[Leaf]:
        """See `calls.model.Evaluator.step`."""
        position = 0
        try:
            while position < len(batches):
                if self._several is not None and len(batches) - position >= _BATCHES:
                    joined = [leaf for batch in batches[position : position + _BATCHES] for leaf in batch]
                    state = self._several([*weights, *state, *joined])[: self._num_state]
                    position += _BATCHES
                else:
                    state = self._one([*weights, *state, *batches[position]])[: self._num_state]
                    position += 1
        except execution.CAUSED_BY_ARGUMENTS as error:
            raise execution.explained(error) from None
        return state

    def arrays(self, state: Sequence[Leaf]) -> list[Array]:
        """See `calls.model.Evaluator.arrays`."""
        return [leaf if isinstance(leaf, np.ndarray) else placement.array_of(leaf) for leaf in state]


class GraphStackedEvaluator:
    """Steps of several sets of weights at once: see `calls.model.StackedEvaluator`.

    concrete: as `weight_stacks.vectorized` makes it of the graph for one batch. differing: the leaves of the weights
    that it takes stacked.
    """

    def __init__(self, concrete: Any, differing: Sequence[bool], device: str) -> None:
        self.difference = 0.0
        self._differing = tuple(differing)
        self._device = device
        self._call = execution.caller(RuntimeFunction(concrete), concrete, device)

    def stack(self, sets: Sequence[Sequence[Leaf]]) -> Sequence[Leaf]:
        """See `calls.model.StackedEvaluator.stack`."""
        return weight_stacks.stack(sets, self._differing, self._device)

    def join(self, states: Sequence[Sequence[Leaf]]) -> Sequence[Leaf]:
        """See `calls.model.StackedEvaluator.join`."""
        return [np.stack([placement.array_of(leaf) for leaf in leaves]) for leaves in zip(*states, strict=True)]

    def step(
        self, weights: Sequence[Leaf], states: Sequence[Leaf], batches: Sequence[Sequence[Leaf]]
    ) -> Sequence[Leaf]:
        """See `calls.model.StackedEvaluator.step`."""
        try:
            for batch in batches:
                states = self._call([*weights, *states, *batch])[: len(states)]
        except execution.CAUSED_BY_ARGUMENTS as error:
            raise execution.explained(error) from None
        return states

    def split(self, states: Sequence[Leaf]) -> list[list[Array]]:
        """See `calls.model.StackedEvaluator.split`."""
        arrays = [placement.array_of(leaf) for leaf in states]
        # np.asarray: an element of an array with one dimension is a number.
        return [[np.asarray(array[index]) for array in arrays] for index in range(len(arrays[0]))]


class Evaluators:
    """The evaluators of one model. Any number of threads may use them.

    single: for batches without (False) and with (True) sample weights. probed: what those of stacks are compared with.
    reason: why there are none of stacks; "" if they may be made.
    """

    def __init__(self, single: Mapping[bool, GraphEvaluator], probed: Probed, reason: str = "") -> None:
        self._single = single
        self._probed = probed
        self._reason = reason
        # By whether batches have sample weights, and then the leaves that differ.
        self._stacked: Variants[GraphStackedEvaluator] = Variants()
        # Or why there is none.
        self._sources: dict[bool, GraphSource | str] = {}
        for weighted, evaluator in single.items() if not reason else ():
            try:
                self._sources[weighted] = GraphSource.of(evaluator.one)
            except CannotVectorize as error:
                self._sources[weighted] = str(error)
        for evaluator in single.values():
            # The graph has cycles of references; the call needs the function in TensorFlow's runtime only.
            evaluator.one = None

    def get(self, weighted: bool) -> GraphEvaluator | None:
        """See `calls.model.LoadedModel.evaluator`."""
        return self._single.get(weighted)

    def of_stacks(self, weighted: bool, differing: Sequence[bool]) -> GraphStackedEvaluator:
        """See `calls.model.LoadedModel.evaluator_of_stacks`."""
        return self._stacked.get((weighted, *differing), lambda: self._made(weighted, tuple(differing)))

    def _made(self, weighted: bool, differing: tuple[bool, ...]) -> GraphStackedEvaluator:
        probed, source = self._probed, self._sources.get(weighted)
        if source is None or not any(differing):
            raise CannotVectorize(self._reason or "there is nothing to stack")
        if isinstance(source, str):
            raise CannotVectorize(source)
        state = probed.execution.run(Function.INITIALIZE_METRICS_STATE, False, [])
        others = len(source.specs) - len(differing) - len(state)
        concrete = vectorized(source, [*differing, *[True] * len(state), *[False] * others])
        batches = [self._batch(weighted, rows) for rows in (*_STACKED_ROWS, 1)]
        states = [np.stack([leaf] * weight_stacks.CHILD_SETS) for leaf in state]
        weight_stacks.check_in_child(probed, concrete, differing, [[*states, *batch] for batch in batches])
        evaluator = GraphStackedEvaluator(concrete, differing, probed.device)
        evaluator.difference = self._difference(evaluator, weighted, differing, state, batches)
        return evaluator

    def _batch(self, weighted: bool, rows: int) -> list[Array]:
        found, rng = self._probed.found, np.random.default_rng(rows)
        shape = dataclasses.replace(found.shape, rows=rows)
        predicted = [(rows, *sizes[1:]) for sizes in found.predicted]
        batch = [*found.x(rng, shape), *found.y(rng, shape, predicted)]
        if weighted:
            batch += [probing.random(leaf, rows, rng, rng.random) for leaf in found.spec.sample_weight.leaves]
        return batch

    def _difference(
        self,
        stacked: GraphStackedEvaluator,
        weighted: bool,
        differing: Sequence[bool],
        state: Sequence[Array],
        batches: Sequence[Sequence[Array]],
    ) -> float:
        """The largest difference from single steps. Raises CannotVectorize where it exceeds rounding."""
        probed, single, largest = self._probed, self._single[weighted], 0.0
        rng, is_probed = np.random.default_rng(0), False
        for most in _STACKED_SETS:
            count = weight_stacks.probed_sets(probed, differing, most)
            sets = [weight_stacks.varied(probed.weights, differing, rng) for _ in range(count)]
            for batch in batches:
                try:
                    expected = [single.arrays(single.step(weights, state, [batch] * 2)) for weights in sets]
                except errors.ForwardPassError:
                    # The model refuses random inputs of this size.
                    continue
                try:
                    states = stacked.step(stacked.stack(sets), stacked.join([state] * count), [batch] * 2)
                except errors.ForwardPassError as error:
                    raise CannotVectorize(f"it refuses a batch that the model accepts: {error}") from None
                for found, wanted in zip(stacked.split(states), expected, strict=True):
                    for one, other, leaf in zip(found, wanted, probed.found.spec.metrics_state.leaves, strict=True):
                        largest = max(largest, weight_stacks.relative(one, other, leaf))
                is_probed = True
        if not is_probed:
            raise CannotVectorize("the model refused the inputs of the probe")
        return largest


class _Graph:
    """Builds the graphs of an evaluator."""

    def __init__(self, spec: ModelSpec, functions: Mapping[Key, Any], weighted: bool) -> None:
        update = Function.UPDATE_METRICS_STATE
        self._update_function = update.with_sample_weight if weighted else update
        self._spec = spec
        self._weighted = weighted
        self._forward_pass = functions[Function.FORWARD_PASS, False]
        self._update = functions[self._update_function, False]
        self._batch = [*spec.x.leaves, *spec.y.leaves, *(spec.sample_weight.leaves if weighted else ())]

    def concrete(self, batches: int, on_trace: Callable[[], None]) -> Any:
        """The concrete function that takes weights, state and so many batches.

        It returns the state, and then the results and states on the way.
        """
        spec = self._spec
        num_weights, num_state = len(spec.weights.leaves), len(spec.metrics_state.leaves)

        @tf.function(autograph=False)
        def traced(*leaves: tf.Tensor) -> list[tf.Tensor]:
            on_trace()
            weights, rest = list(leaves[:num_weights]), leaves[num_weights:]
            state, rest = list(rest[:num_state]), rest[num_state:]
            size = len(self._batch)
            # TensorFlow leaves out what no result needs, and with it the errors of a batch. So all that the functions
            # return is a result, although only the last state is used.
            others: list[tf.Tensor] = []
            for start in range(0, batches * size, size):
                others += state if start else []
                state, results = self._next(weights, state, list(rest[start : start + size]))
                others += results
            return [tf.identity(leaf) for leaf in (*state, *others)]

        arguments = [*spec.weights.leaves, *spec.metrics_state.leaves, *self._batch * batches]
        return traced.get_concrete_function(*map(_unnamed, arguments))

    def _next(
        self, weights: list[tf.Tensor], state: list[tf.Tensor], batch: list[tf.Tensor]
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """The state after one batch, and the results of the forward pass."""
        spec, num_x, num_y = self._spec, len(self._spec.x.leaves), len(self._spec.y.leaves)
        x, y, sample_weight = batch[:num_x], batch[num_x : num_x + num_y], batch[num_x + num_y :]
        results = [_checked(leaf) for leaf in self._forward_pass(*weights, *x, *y)]
        arguments = _update_arguments(spec, self._update_function, state, y, sample_weight, results)
        return [_checked(leaf) for leaf in self._update(*arguments)], results


def _update_arguments(
    spec: ModelSpec,
    function: Function,
    state: Sequence[Any],
    labels: Sequence[Any],
    sample_weight: Sequence[Any],
    results: Sequence[Any],
) -> list[Any]:
    """The leaves of an update's arguments. results: the leaves of what the forward pass returns."""
    parts = {"state": state, "labels": labels, SAMPLE_WEIGHT: sample_weight}
    for place, part in spec.results[Function.FORWARD_PASS].items():
        parts[place], results = results[: len(part.leaves)], results[len(part.leaves) :]
    return [leaf for place in spec.arguments[function] for leaf in parts[place]]


def _unnamed(leaf: TensorSpec) -> tf.TensorSpec:
    spec = tf_specs.to_tf(leaf)
    return tf.TensorSpec(spec.shape, spec.dtype)


def _checked(result: tf.Tensor) -> tf.Tensor:
    """A result whose shape is checked when it runs, as `result_shapes` does: a graph may claim a wrong one."""
    return result if result.shape.rank is None else tf.ensure_shape(result, result.shape)


def prepared(
    spec: ModelSpec,
    functions: Mapping[Key, Any],
    run: Execution,
    device: str,
    found: Examples,
    weights: Sequence[Array],
    on_trace: Callable[[], None],
) -> Mapping[bool, GraphEvaluator]:
    """The evaluators of a model: for batches without (False) and with (True) sample weights.

    functions: the concrete functions of the model. run: runs them.
    found, weights: examples with which the evaluators are compared with the functions themselves. An evaluator is left
    out where its results have other bits, and where the functions are too slow to gain anything.
    Raises whatever the model's own code raises.
    """
    unavailable = spec.unavailable
    evaluators: dict[bool, GraphEvaluator] = {}
    if not spec.metrics_state.leaves:
        return evaluators
    for weighted in (False, True):
        update = Function.UPDATE_METRICS_STATE
        function = update.with_sample_weight if weighted else update
        if function in unavailable or Function.INITIALIZE_METRICS_STATE in unavailable:
            continue
        separate = _Separate(spec, run, function)
        probes = _probes(spec, separate, found, weights, weighted)
        if not probes:
            _LOGGER.info("no evaluator%s: the model refuses the example batches", " with sample weights" * weighted)
            continue
        seconds = min(_seconds(separate, used, batch) for used, batches in probes for batch in batches * 2)
        if seconds > _MAX_STEP_S:
            continue
        evaluator = GraphEvaluator(
            spec, functions, device, weighted=weighted, joined=seconds < _MAX_JOINED_S, on_trace=on_trace
        )
        if all(_agree(separate, evaluator, used, batches) for used, batches in probes):
            evaluators[weighted] = evaluator
        else:
            _LOGGER.info("no evaluator%s: its results have other bits", " with sample weights" * weighted)
    return evaluators


class _Separate:
    """One call of the forward pass, and one of the update."""

    def __init__(self, spec: ModelSpec, functions: Execution, function: Function) -> None:
        self._spec = spec
        self._functions = functions
        self._function = function

    def step(self, weights: Sequence[Array], state: Sequence[Array], batch: Sequence[Array]) -> list[Array]:
        """The state after one batch. Raises whatever the model's own code raises."""
        spec, num_x, num_y = self._spec, len(self._spec.x.leaves), len(self._spec.y.leaves)
        inputs, labels = batch[: num_x + num_y], batch[num_x : num_x + num_y]
        results = self._functions.run(Function.FORWARD_PASS, False, [*weights, *inputs])
        arguments = _update_arguments(spec, self._function, state, labels, batch[num_x + num_y :], results)
        return self._functions.run(self._function, False, arguments)

    def initial(self) -> list[Array]:
        """The state before the first batch."""
        return self._functions.run(Function.INITIALIZE_METRICS_STATE, False, [])


_Probe = tuple[Sequence[Array], list[list[Array]]]
"""The leaves of weights, and batches that the model accepts with them."""


def _probes(
    spec: ModelSpec, separate: _Separate, found: Examples, weights: Sequence[Array], weighted: bool
) -> list[_Probe]:
    """Random weights, and those given, each with at least one batch."""
    rng = np.random.default_rng(0)
    batches = []
    for rows in _PROBED_ROWS:
        shape = found.shape if rows is None else dataclasses.replace(found.shape, rows=rows)
        predicted = [(shape.rows, *sizes[1:]) for sizes in found.predicted]
        for random in (rng, None):
            batch = [*found.x(random, shape), *found.y(random, shape, predicted)]
            if weighted:
                batch += [probing.random(leaf, shape.rows, rng, rng.random) for leaf in spec.sample_weight.leaves]
            batches.append(batch)
    probes: list[_Probe] = []
    for used in ([probing.random(leaf, shape.rows, rng) for leaf in spec.weights.leaves], weights):
        accepted = [batch for batch in batches if _accepts(separate, used, batch)]
        if accepted:
            probes.append((used, accepted))
    return probes


def _accepts(separate: _Separate, weights: Sequence[Array], batch: Sequence[Array]) -> bool:
    try:
        separate.step(weights, separate.initial(), batch)
    except Exception:  # The model may refuse random weights, these labels, or this number of rows.
        _LOGGER.debug("the model refuses a probe", exc_info=True)
        return False
    return True


def _seconds(separate: _Separate, weights: Sequence[Array], batch: Sequence[Array]) -> float:
    state = separate.initial()
    started = time.perf_counter()
    separate.step(weights, state, batch)
    return time.perf_counter() - started


def _agree(
    separate: _Separate, evaluator: GraphEvaluator, weights: Sequence[Array], batches: Sequence[Sequence[Array]]
) -> bool:
    """Whether the states after these batches have the same bits, from each graph of the evaluator."""
    state = separate.initial()
    # Both graphs see each batch.
    for count in {1, evaluator.joined}:
        order = [*batches] * count
        found: Sequence[Any] = state
        try:
            for start in range(0, len(order), count):
                found = evaluator.step(weights, found, order[start : start + count])
        except errors.ForwardPassError:
            # The model may refuse a batch because of the state: a metric may have a number for each row.
            return False
        for batch in order:
            state = separate.step(weights, state, batch)
        if not all(map(_are_equal, state, evaluator.arrays(found))):
            return False
    return True


def _are_equal(one: Array, other: Array) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.tolist() == other.tolist() if one.dtype.kind == "O" else one.tobytes() == other.tobytes()
