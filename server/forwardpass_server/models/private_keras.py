"""The private interfaces of Keras that this server uses. No other module imports keras.src.

An upgrade of Keras may change them. Those that are imported are imported here, and the others are tried with a small
call when the server starts. Without one of them the server does not start: there are no public ones in their place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from forwardpass_server.errors import UnsupportedLibrary
from forwardpass_server.models import masks


def _unsupported(use: str, error: Exception) -> UnsupportedLibrary:
    return UnsupportedLibrary(
        f"Keras {keras.__version__} is not supported: {use} failed ({type(error).__name__}: {error}): install the "
        "TensorFlow version that forwardpass[server] asks for, and the Keras version that comes with it"
    )


try:
    # What an operation returns for symbolic tensors.
    from keras.src.backend import compute_output_spec as compute_output_spec

    # A store of values for each thread. The only way to reset the counters of Keras's names.
    from keras.src.backend.common import global_state as global_state

    # The class of models that are made of inputs and outputs. Its name in `keras` is that of all models.
    from keras.src.models.functional import Functional as Functional

    # The base class of all optimizers, the same for every backend: see `stateless_optimizer`.
    from keras.src.optimizers.base_optimizer import BaseOptimizer as _BaseOptimizer

    # What `keras.Model.compile` makes of losses and metrics.
    from keras.src.trainers.compile_utils import CompileLoss as CompileLoss
    from keras.src.trainers.compile_utils import CompileMetrics as CompileMetrics
except ImportError as error:
    raise _unsupported("an import of a private module", error) from error


def seed_generators(model: Any) -> Iterator[Any]:
    """The seed generators of a model's layers, each once, in the order of the layers."""
    seen = set()
    for layer in model._flatten_layers():
        for generator in layer._seed_generators:
            if id(generator) not in seen:
                seen.add(id(generator))
                yield generator


# The methods of optimizers that Keras replaces for TensorFlow, for tf.distribute. The replacements need variables.
_REPLACED_METHODS = (
    "_apply_weight_decay",
    "_backend_increment_gradient_accumulators",
    "_backend_update_step",
    "_clip_by_norm",
    "_overwrite_model_variables_with_average_value",
    "_var_key",
    "add_variable_from_reference",
    "assign",
    "assign_add",
    "assign_sub",
    "stateless_apply",
)

_UNINITIALIZED = "uninitialized_variables"


@functools.cache
def _stateless_base() -> Any:
    """A class that comes, in the method resolution order, between an optimizer's class and TensorFlow's base class."""

    def add_variable(self: Any, *arguments: Any, **options: Any) -> Any:
        # The variables of an optimizer can take twice the memory of the weights.
        with unallocated():
            return _BaseOptimizer.add_variable(self, *arguments, **options)

    methods = {name: vars(_BaseOptimizer)[name] for name in _REPLACED_METHODS}
    return type("StatelessOptimizer", (keras.optimizers.Optimizer,), {**methods, "add_variable": add_variable})


def stateless_optimizer(optimizer_class: Any) -> Any:
    """A subclass of a class of Keras's optimizers whose `stateless_apply` works on TensorFlow.

    Keras refuses it there. Methods of the class itself stay, and those that they call by `super()` are those of the
    base class of all backends. Its variables take no memory: see `unallocated`.
    """
    return type(optimizer_class.__name__, (optimizer_class, _stateless_base()), {})


@contextlib.contextmanager
def unallocated(values: Sequence[tuple[Any, Any]] = ()) -> Iterator[Any]:
    """Variables that are made inside from an initializer get no memory, and no value later.

    values: pairs of a variable and its value inside. Yields Keras's scope, which knows what is assigned inside.
    """
    kept = global_state.get_global_attribute(_UNINITIALIZED)
    # Keras would give values to the variables in this list when the next scope of the thread ends.
    global_state.set_global_attribute(_UNINITIALIZED, [])
    try:
        with keras.StatelessScope(values, initialize_variables=False) as scope:
            yield scope
    finally:
        global_state.set_global_attribute(_UNINITIALIZED, kept)


@functools.cache
def check() -> None:
    """Tries the interfaces that are not imported. Raises UnsupportedLibrary where one fails.

    It makes Keras objects: see `keras_names`.
    """
    attempts: dict[str, Callable[[], None]] = {
        "the list of a model's seed generators": _try_seed_generators,
        "the mask of a tensor": _try_masks,
        "an optimizer step on tensors": _try_stateless_optimizer,
    }
    for use, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            raise _unsupported(use, error) from error


def _try_seed_generators() -> None:
    found = list(seed_generators(keras.Sequential([keras.Input((1,)), keras.layers.Dropout(0.5)])))
    if len(found) != 1:
        raise ValueError(f"expected one of a model with one Dropout layer, got {len(found)}")


def _try_masks() -> None:
    masked = keras.layers.Masking()(keras.ops.zeros((1, 2, 1)))
    if masks.of(masked) is None:
        raise ValueError(f"a Masking layer sets no attribute {masks.ATTRIBUTE}")


def _try_stateless_optimizer() -> None:
    with unallocated():
        weight = keras.Variable(shape=(2,), initializer="zeros")
    optimizer = stateless_optimizer(keras.optimizers.SGD)(learning_rate=0.5, momentum=0.5)
    optimizer.build([weight])
    state = [np.zeros(tuple(variable.shape), variable.dtype) for variable in optimizer.variables]
    state = [
        np.float32(0.5) if variable is optimizer.learning_rate else value
        for variable, value in zip(optimizer.variables, state, strict=True)
    ]
    trained = [np.array([1, 2], np.float32)]
    for _ in range(2):
        trained, state = optimizer.stateless_apply(state, [np.ones(2, np.float32)], trained)
    found = np.asarray(trained[0]).tolist()
    if found != [-0.25, 0.75]:
        raise ValueError(f"expected [-0.25, 0.75] after two steps, got {found}")
    if weight._value is not None:
        raise ValueError("a variable of an optimizer takes memory")
