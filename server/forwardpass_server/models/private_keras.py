"""The private interfaces of Keras that this server uses. No other module imports keras.src.

An upgrade of Keras may change them. Those that are imported are imported here, and the others are tried with a small
call when the server starts. Without one of them the server does not start: there are no public ones in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras

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


@functools.cache
def check() -> None:
    """Tries the interfaces that are not imported. Raises UnsupportedLibrary where one fails.

    It makes Keras objects: see `keras_names`.
    """
    attempts: dict[str, Callable[[], None]] = {
        "the list of a model's seed generators": _try_seed_generators,
        "the mask of a tensor": _try_masks,
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
