"""A model's first calls, on made-up batches: warms it, and finds which inputs share the batch dimension."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping

from forwardpass.wire import errors, specs
from forwardpass.wire.description import Function, ModelSpec
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import TensorSpec
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.tracing import Key

_LOGGER = logging.getLogger(__name__)

_BATCH_SIZE = 3

# Each subset of the leaves may cost two calls; a model of more inputs than this is not asked.
_MAX_PROBED_LEAVES = 8


def warm(execution: Execution, functions: Iterable[Key], spec: ModelSpec, name: str) -> None:
    """Runs every function once. Raises what a function raises, other than that it refuses zeros."""
    for function, training in functions:
        try:
            arguments = spec.arguments[function].values()
            execution.run(function, training, [_zeros(leaf) for part in arguments for leaf in part.leaves])
        except errors.ModelRefusedInput as error:
            # Such a model may be sound: it may want sequences of a certain length.
            _LOGGER.warning("model %s: %s was not warmed, it refuses a batch of zeros: %s", name, function.title, error)


def with_batched_leaves(execution: Execution, spec: ModelSpec) -> ModelSpec:
    """The spec with `batched` set on each leaf of x and y whose first dimension must equal the others'.

    Nothing in TFF's files tells a batch dimension from another unknown one, so the model is asked: a leaf is batched
    if a forward pass refuses it with 2 and with 1 examples where the rest have 3. (Broadcasting takes 1 silently.)
    Where some of those leaves may change their size together while the others keep theirs, as the nodes and edges of
    a graph do, there is no one batch dimension, and none is marked.
    """
    leaves = (*spec.x.leaves, *spec.y.leaves)
    candidates = [index for index, leaf in enumerate(leaves) if leaf.shape and leaf.shape[0] is None]
    if not 2 <= len(candidates) <= _MAX_PROBED_LEAVES or not _accepts(execution, spec, {}):
        return spec
    batched = {index for index in candidates if not _may_differ(execution, spec, [index])}
    # Of two halves one is at most half as large, and the one may differ from the other if the other may from it.
    subsets = (
        subset for count in range(2, len(batched) // 2 + 1) for subset in itertools.combinations(sorted(batched), count)
    )
    if any(_may_differ(execution, spec, subset) for subset in subsets):
        return spec
    return spec.with_input_leaves(
        [dataclasses.replace(leaf, batched=index in batched) for index, leaf in enumerate(leaves)]
    )


def _may_differ(execution: Execution, spec: ModelSpec, leaves: Iterable[int]) -> bool:
    """Whether these leaves of x and y may have another number of examples than the rest."""
    return any(_accepts(execution, spec, dict.fromkeys(leaves, size)) for size in (_BATCH_SIZE - 1, 1))


def _accepts(execution: Execution, spec: ModelSpec, sizes: Mapping[int, int]) -> bool:
    """Whether a forward pass takes zeros of `_BATCH_SIZE` examples, some leaves of x and y having other sizes."""
    inputs = (*spec.x.leaves, *spec.y.leaves)
    try:
        execution.run(
            Function.FORWARD_PASS,
            False,
            [_zeros(leaf) for leaf in spec.weights.leaves]
            + [_zeros(leaf, sizes.get(index, _BATCH_SIZE)) for index, leaf in enumerate(inputs)],
        )
    except Exception:  # TensorFlow has many words for no.
        return False
    return True


def _zeros(spec: TensorSpec, batch: int = _BATCH_SIZE) -> Array:
    return specs.zeros(spec, batch, _BATCH_SIZE)
