"""Decides whether a model is batch-separable: it computes each row of a batch from that row only.

Three checks must pass. Each operation of the graph keeps rows apart by its rule (`row_rules`), for all inputs. No index
is computed from numbers that rounding may change (`rounding`). And a probe runs the model: random rows must have the
same predictions in small batches, in one large batch, and in another order. The probe is no proof; it guards against an
error in the rules.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from forwardpass.wire.description import ModelSpec
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass_server.models import private_tensorflow, probing, row_analysis
from forwardpass_server.models.examples import Examples, Runs, Shape
from forwardpass_server.models.row_kinds import Inseparable

_LOGGER = logging.getLogger(__name__)


def reason_against(
    execution: Runs, concrete: Any, spec: ModelSpec, weights: Sequence[Array], found: Examples | None = None
) -> str:
    """Why concurrent calls of predict_on_batch cannot share a batch; "" if they can.

    concrete: predict_on_batch for inference. weights: for the probe. found: examples for the probe; None for random
    ones.
    """
    for leaf, path in zip(spec.x.leaves, spec.x.tree.paths("x"), strict=True):
        if not leaf.shape or leaf.shape[0] is not None:
            return f"{path} has no batch dimension of free size: {leaf}"
    for part, place in ((spec.predictions, "predictions"), (spec.prediction_mask, "prediction_mask")):
        for leaf, path in zip(part.leaves, part.tree.paths(place), strict=True):
            if not leaf.shape or leaf.shape[0] is not None:
                return f"{path} has no batch dimension of free size: {leaf}"
    if not spec.x.leaves or not spec.predictions.leaves:
        return "x or the predictions hold no array"
    try:
        _check_graph(concrete, len(weights), len(spec.x.leaves))
    except Inseparable as error:
        return str(error)
    except Exception as error:
        # The inliner itself works: `private_tensorflow.check` has tried it. It fails for this graph.
        _LOGGER.warning("the graph of predict_on_batch cannot be analysed", exc_info=True)
        return f"the graph cannot be analysed: {type(error).__name__}"
    try:
        return _probe_sizes(execution, found or Examples(spec=spec), weights)
    except Exception as error:  # The model's own code. A probe that fails must not fail the load.
        return f"the probe failed: {type(error).__name__}"


def _check_graph(concrete: Any, weights: int, inputs: int) -> None:
    """Raises Inseparable unless each row of each result follows from one row of the inputs, for all inputs."""
    leaves = concrete.inputs[weights : weights + inputs]
    graph = private_tensorflow.inlined_graph(concrete)
    kinds = row_analysis.outputs(graph, {leaf.name: row_analysis.input_rows(leaf) for leaf in leaves}, concrete.outputs)
    if reason := row_analysis.reason_against(kinds):
        raise Inseparable(reason)


_REFUSED = "the model refused the inputs of the probe"

# The sizes of free dimensions other than the batch. Powers of two, for models that halve an image.
_FREE_SIZES = (8, 16)

# A batch of the same size as another dimension reveals a graph that confuses the two.
_ROWS = (1, 2, 3)
_MOST_ROWS = 16
_MOST_BATCHES = 6


def _probe_sizes(execution: Runs, found: Examples, weights: Sequence[Array]) -> str:
    """Probes a model with several sizes of its free dimensions."""
    spec = found.spec
    rng = np.random.default_rng(0)
    varied = [_varied(leaf, rng) for leaf in weights]
    has_free_size = any(None in leaf.shape[1:] for leaf in spec.x.leaves if leaf.shape)
    reasons = [
        _probe(execution, spec, varied, _examples(found, size, rng))
        for size in ((*_FREE_SIZES, *_larger(found)) if has_free_size else _FREE_SIZES[:1])
    ]
    # A model may refuse one size and accept another. At least one must have been probed.
    judged = [reason for reason in reasons if not reason.startswith(_REFUSED)]
    return next(filter(None, judged), "") if judged else reasons[0]


def _larger(found: Examples) -> list[int]:
    """The larger sizes, for a model that refuses small ones."""
    return [shape.other for shape in found.shapes if shape.other > max(_FREE_SIZES)]


def _examples(found: Examples, size: int, rng: np.random.Generator) -> list[list[Array]]:
    """Batches of x of several lengths, with free dimensions of this size; random unless the operator gave examples."""
    spec = found.spec
    sizes = {dim for leaf in (*spec.x.leaves, *spec.predictions.leaves) for dim in (leaf.shape or ())[1:]}
    sizes = {size if dim is None else dim for dim in sizes}
    rows = sorted({*_ROWS, *(dim for dim in sizes if dim and dim <= _MOST_ROWS)})[:_MOST_BATCHES]
    return [found.x(rng, Shape(count, size)) for count in rows]


def _varied(weights: Array, rng: np.random.Generator) -> Array:
    """Random weights instead of equal ones: a layer whose weights are all zeros would hide its inputs."""
    if weights.dtype.kind not in "fV" or not weights.size or (weights != weights.flat[0]).any():
        return weights
    # Adds positive numbers only: the variance of a batch normalisation must stay positive.
    return np.asarray(weights + rng.random(weights.shape, np.float32).astype(weights.dtype))


def _probe(execution: Runs, spec: ModelSpec, weights: Sequence[Array], examples: Sequence[Sequence[Array]]) -> str:
    """Runs rows in small batches, in one large batch, and in another order; "" if their predictions are the same.

    examples: the leaves of x of each small batch.
    """

    def predict(x: Sequence[Array]) -> list[Array]:
        return execution.run(Function.PREDICT_ON_BATCH, False, [*weights, *x])

    joined = [np.concatenate(leaves) for leaves in zip(*examples, strict=True)]
    ends = np.cumsum([len(x[0]) for x in examples]).tolist()
    order = np.random.default_rng(0).permutation(ends[-1])
    try:
        alone = [predict(x) for x in examples]
        together = predict(joined)
        shuffled = predict([leaf[order] for leaf in joined])
    except Exception as error:  # The model may refuse random inputs.
        return f"{_REFUSED}: {type(error).__name__}"
    for index, leaf in enumerate((*spec.predictions.leaves, *spec.prediction_mask.leaves)):
        apart = [results[index] for results in alone]
        joint = together[index]
        if joint.shape[:1] != (ends[-1],) or not (
            all(map(probing.agree, apart, np.split(joint, ends[:-1]), itertools.repeat(leaf)))
            and probing.agree(joint[order], shuffled[index], leaf)
        ):
            return "predictions of a row differ between a batch and a single call"
    return ""
