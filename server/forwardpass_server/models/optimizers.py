"""Keras optimizers as functions of tensors: configurations that are checked, and steps for a graph."""

from __future__ import annotations

import collections
import inspect
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from forwardpass.wire import optimizers
from forwardpass.wire.errors import OptimizerNotSupported
from forwardpass_server.models import failures, keras_names, private_keras

# Options of Keras's optimizers that a step cannot have, and why.
_REFUSED_OPTIONS = {
    "use_ema": "the result of training is the weights after the last step, and not their moving average",
    "gradient_accumulation_steps": "each step updates the weights: send larger batches instead",
    "loss_scale_factor": "the gradients are those of the loss itself",
    "exclude_embeddings": "weights have no names by which embeddings could be found: set it to false",
    "exclude_layers": "weights have no names of layers",
}

# Each Newton-Schulz iteration of Muon makes ten operations for each matrix. Keras's default is 5.
_MAX_ITERATIONS = 20

# A scalar, a vector, matrices that are higher and wider, and a kernel of a convolution.
_PROBED_SHAPES = ((), (7,), (5, 3), (3, 5), (2, 3, 4))
_PROBED_STEPS = 4
_PROBED_RATE = 0.05
# In graphs, TensorFlow may compute a sum in another order: centered RMSprop differs by 1 unit in the last place of the
# largest number, and all others are equal. A wrong step differs by millions.
_PROBED_ULPS = 4

# Each entry is a text and a sentence.
_MAX_PROBES = 256


class GraphOptimizer:
    """A Keras optimizer for weights of these shapes. Its methods take and return tensors, and it keeps none.

    text: the optimizer, as `resolved` returns it.
    weights: the specs of the weights that it changes, each with a name of its own. Their dtypes are floating-point.

    Raises OptimizerNotSupported where Keras refuses it.
    """

    def __init__(self, text: str, weights: Sequence[tf.TensorSpec]) -> None:
        self._text = text
        with private_keras.unallocated():
            self._weights = [
                keras.Variable(shape=tuple(spec.shape), dtype=spec.dtype.name, initializer="zeros", name=spec.name)
                for spec in weights
            ]
        with keras_names.fresh():
            self._optimizer = _made(text, stateless=True)
            try:
                with private_keras.unallocated():
                    self._optimizer.build(self._weights)
            except ValueError:
                # Adafactor and Nadam make variables of numbers, which Keras refuses inside a scope.
                self._optimizer = _made(text, stateless=True)
                self._optimizer.build(self._weights)

    @property
    def has_schedule(self) -> bool:
        """Whether the learning rate is a schedule, so that a step takes none."""
        return _has_schedule(self._text)

    @property
    def variables(self) -> list[tf.TensorSpec]:
        """The specs of the optimizer's variables, each with a name of its own. The learning rate is not one of them."""
        counts: collections.Counter[str] = collections.Counter()
        found = []
        for variable in _state_variables(self._optimizer):
            name = variable.name if not counts[variable.name] else f"{variable.name}_{counts[variable.name]}"
            counts[variable.name] += 1
            found.append(tf.TensorSpec(tuple(variable.shape), variable.dtype, name))
        return found

    def initial(self) -> list[tf.Tensor]:
        """The variables before the first step."""
        found = []
        for variable in _state_variables(self._optimizer):
            value = variable.value
            if isinstance(value, tf.Variable):
                # A graph would capture the variable.
                with tf.init_scope():
                    value = value.numpy()
            found.append(tf.convert_to_tensor(value))
        return found

    def step(
        self,
        variables: Sequence[tf.Tensor],
        gradients: Sequence[tf.Tensor],
        weights: Sequence[tf.Tensor],
        learning_rate: tf.Tensor | None,
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """The weights, and the variables, after one step.

        learning_rate: float32[]; None for a schedule.
        """
        optimizer, given = self._optimizer, iter(variables)
        values = [learning_rate if _is_rate(one, optimizer) else next(given) for one in optimizer.variables]
        new_weights, values = optimizer.stateless_apply(values, list(gradients), list(weights))
        pairs = zip(optimizer.variables, values, strict=True)
        # Keras may return the arguments as they are.
        return (
            [tf.convert_to_tensor(weight) for weight in new_weights],
            [tf.convert_to_tensor(value) for one, value in pairs if not _is_rate(one, optimizer)],
        )


def resolved(text: str) -> str:
    """The canonical text with all options of the optimizer's configuration, so that equal optimizers have equal texts.

    text: as `forwardpass.wire.optimizers.canonical` returns it. Raises OptimizerNotSupported, which names the option.
    """
    parsed = json.loads(text)
    _check_options(_optimizer_class(parsed), parsed["config"], "optimizer.config")
    schedule = parsed["config"].get("learning_rate")
    if schedule is not None:
        schedule_class = _schedule_class(schedule)
        _check_options(schedule_class, schedule["config"], "optimizer.config.learning_rate.config")
    with keras_names.fresh():
        config = _made(text).get_config()
    for option, reason in _REFUSED_OPTIONS.items():
        if config.get(option):
            raise OptimizerNotSupported(f"is not supported: {reason}", place=f"optimizer.config.{option}")
    return optimizers.canonical({"class_name": parsed["class_name"], "config": config}).text


class Probes:
    """Compares optimizers on tensors with Keras's own on variables. Each optimizer is compared once in a process.

    on_trace: called once for each graph that Python builds.
    """

    def __init__(self, on_trace: Callable[[], None]) -> None:
        self._on_trace = on_trace
        self._lock = threading.Lock()
        self._reasons: collections.OrderedDict[str, str] = collections.OrderedDict()

    def check(self, text: str) -> None:
        """Raises OptimizerNotSupported if the optimizer gives other results than Keras's. text: of `resolved`."""
        with self._lock:
            if text not in self._reasons:
                self._reasons[text] = self._reason_against(text)
                while len(self._reasons) > _MAX_PROBES:
                    self._reasons.popitem(last=False)
            reason = self._reasons[text]
        if reason:
            raise OptimizerNotSupported(
                f"{json.loads(text)['class_name']} is not supported: {reason}", place="optimizer"
            )

    def _reason_against(self, text: str) -> str:
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=shape).astype(np.float32) for shape in _PROBED_SHAPES]
        batches = [
            [rng.normal(size=shape).astype(np.float32) for shape in _PROBED_SHAPES] for _ in range(_PROBED_STEPS)
        ]
        try:
            expected = self._by_keras(text, weights, batches)
            found = self._by_graph(text, weights, batches)
        except Exception as error:  # Keras, for a combination of options that it does not check.
            return failures.sentence(error)
        if len(found) == len(expected) and all(map(_agree, found, expected)):
            return ""
        return "on the server its steps differ from those of Keras on variables"

    def _by_keras(self, text: str, weights: Sequence[Any], batches: Sequence[Any]) -> list[Any]:
        with keras_names.fresh():
            optimizer = _made(text)
            variables = [keras.Variable(weight, name=f"leaf{index}") for index, weight in enumerate(weights)]
            optimizer.build(variables)

            @tf.function(autograph=False)
            def step(*gradients: tf.Tensor) -> None:
                self._on_trace()
                optimizer.apply(gradients, variables)

            if not _has_schedule(text):
                optimizer.learning_rate = _PROBED_RATE
            for gradients in batches:
                step(*map(tf.constant, gradients))
            return [np.asarray(variable) for variable in (*variables, *_state_variables(optimizer))]

    def _by_graph(self, text: str, weights: Sequence[Any], batches: Sequence[Any]) -> list[Any]:
        specs = [tf.TensorSpec(weight.shape, weight.dtype, f"leaf{index}") for index, weight in enumerate(weights)]
        optimizer = GraphOptimizer(text, specs)
        count = len(weights)

        @tf.function(autograph=False)
        def step(*leaves: tf.Tensor) -> list[tf.Tensor]:
            self._on_trace()
            *state, rate = leaves
            new = optimizer.step(
                state[2 * count :], state[count : 2 * count], state[:count], None if optimizer.has_schedule else rate
            )
            return [*new[0], *new[1]]

        state = [*map(tf.constant, weights), *optimizer.initial()]
        rate = tf.constant(_PROBED_RATE)
        for gradients in batches:
            state = step(*state[:count], *map(tf.constant, gradients), *state[count:], rate)
        return [np.asarray(value) for value in state]


def _agree(found: Any, expected: Any) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if np.array_equal(found, expected, equal_nan=True):
        return True
    largest = np.max(np.abs(expected), initial=0)
    return bool(np.all(np.abs(found - expected) <= _PROBED_ULPS * np.spacing(largest)))


def _class_of(module: Any, names: Sequence[str], value: Mapping[str, Any]) -> Any:
    """The class of a serialized object of a module of Keras's. Raises OptimizerNotSupported for one not in `names`."""
    if value["class_name"] not in names:
        raise OptimizerNotSupported(place="optimizer", expected=f"one of {names}", found=value["class_name"])
    return getattr(module, value["class_name"])


def _optimizer_class(parsed: Mapping[str, Any]) -> Any:
    return _class_of(keras.optimizers, optimizers.OPTIMIZERS, parsed)


def _schedule_class(parsed: Mapping[str, Any]) -> Any:
    return _class_of(keras.optimizers.schedules, optimizers.SCHEDULES, parsed)


def _has_schedule(text: str) -> bool:
    return "learning_rate" in json.loads(text)["config"]


def _made(text: str, stateless: bool = False) -> Any:
    """The Keras optimizer, whose learning rate is any number unless it is a schedule. Raises OptimizerNotSupported."""
    parsed = json.loads(text)
    optimizer_class = _optimizer_class(parsed)
    config = {"learning_rate": _PROBED_RATE, **parsed["config"]}
    if stateless:
        optimizer_class = private_keras.stateless_optimizer(optimizer_class)
    place = "optimizer.config"
    try:
        schedule = config["learning_rate"]
        if isinstance(schedule, dict):
            place = "optimizer.config.learning_rate.config"
            config["learning_rate"] = _schedule_class(schedule)(**schedule["config"])
            place = "optimizer.config"
        return optimizer_class(**config)
    except (TypeError, ValueError) as error:
        raise OptimizerNotSupported(failures.sentence(error), place=place) from None


def _check_options(one: Any, config: Mapping[str, Any], place: str) -> None:
    """Checks the names and types of options by the signature of a class of Keras's."""
    parameters = inspect.signature(one.__init__).parameters
    known = [name for name in parameters if name not in ("self", "name", "kwargs")]
    for name, value in config.items():
        if name not in known:
            raise OptimizerNotSupported(
                place=place, expected=f"keys among {', '.join(known)}", found=json.dumps(name[:64])
            )
        default = parameters[name].default
        expected = ""
        if name in ("boundaries", "values", "exclude_layers"):
            expected = "" if isinstance(value, list) else "a list of numbers"
        elif isinstance(value, list):
            expected = "a number" if not isinstance(default, bool) else "a boolean"
        elif name != "learning_rate" and isinstance(default, bool) != isinstance(value, bool):
            expected = "a boolean" if isinstance(default, bool) else "a number"
        elif value is None and default is not None:
            expected = "a number"
        elif name == "ns_steps" and not (isinstance(value, int) and 0 <= value <= _MAX_ITERATIONS):
            expected = f"an integer from 0 to {_MAX_ITERATIONS}"
        if expected:
            raise OptimizerNotSupported(place=f"{place}.{name}", expected=expected, found=json.dumps(value)[:64])


def _is_rate(variable: Any, optimizer: Any) -> bool:
    return variable is optimizer.learning_rate


def _state_variables(optimizer: Any) -> list[Any]:
    return [variable for variable in optimizer.variables if not _is_rate(variable, optimizer)]
