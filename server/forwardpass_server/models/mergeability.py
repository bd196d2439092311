"""Decides whether metrics states of a model are sums over batches, so that they can be added to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from forwardpass.wire.description import ModelSpec
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass_server.models import probing
from forwardpass_server.models.examples import Examples, Runs

_ROUNDS = 3
_ROWS = 4


def reason_against(execution: Runs, spec: ModelSpec, found: Examples | None = None) -> str:
    """Why metrics states cannot be added to each other; "" if they can.

    found: examples of the model's batches; None for random ones.

    They can if the state after two batches is the sum of the states after each of them. This is tried on random
    batches, with sample weights and without.
    """
    if Function.INITIALIZE_METRICS_STATE in spec.unavailable:
        return "the model has no metrics"
    for leaf, path in zip(spec.metrics_state.leaves, spec.metrics_state.tree.paths("state"), strict=True):
        if leaf.dtype.kind in "bO":
            return f"{path} holds no numbers: {leaf}"
    rng = np.random.default_rng(0)
    functions = [function for function in Function.UPDATE_METRICS_STATE.variants if function not in spec.unavailable]
    try:
        return next(
            (
                reason
                for function in functions
                for _ in range(_ROUNDS)
                if (reason := _difference(execution, spec, function, found or Examples(spec=spec), rng))
            ),
            "",
        )
    except Exception as error:  # The model may refuse random batches.
        return f"the model refused the batches of the probe: {type(error).__name__}"


def _difference(execution: Runs, spec: ModelSpec, function: Function, found: Examples, rng: np.random.Generator) -> str:
    """How the state after two batches differs from the sum of the states after each; "" if it does not."""
    arguments = {place: part for place, part in spec.arguments[function].items() if place != "state"}

    def batch() -> list[Array]:
        # Labels of the operator have the shapes of the predictions. Other values are between 0 and 1: a metric may
        # need probabilities.
        return [
            leaf
            for place, part in arguments.items()
            for leaf in (
                found.y(rng, shape)
                if place == "labels" and found.has_labels
                else [probing.random(one, _ROWS, rng, rng.random, shape.other) for one in part.leaves]
            )
        ]

    shape = dataclasses.replace(found.shape, rows=_ROWS)
    first, second = batch(), batch()

    def update(state: Sequence[Array], batch: Sequence[Array]) -> list[Array]:
        return execution.run(function, False, [*state, *batch])

    initial = execution.run(Function.INITIALIZE_METRICS_STATE, False, [])
    alone = update(initial, first), update(initial, second)
    both = update(alone[0], second)
    for leaf, path, one, other, sum_ in zip(
        spec.metrics_state.leaves, spec.metrics_state.tree.paths("state"), *alone, both, strict=True
    ):
        if one.shape != other.shape or not probing.agree(sum_, one + other, leaf):
            return f"{path} is not a sum over batches"
    return ""
