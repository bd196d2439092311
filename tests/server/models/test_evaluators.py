"""Evaluators: several batches, or sets of weights, in one graph call, with the bits of the functions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from forwardpass.wire import errors
from forwardpass.wire.description import Function
from forwardpass_server.calls.model import CannotVectorize, ModelSource
from forwardpass_server.models.loading import TensorFlowLoader, TensorFlowModel
from forwardpass_server.models.placement import TensorFlowDevice
from support import zoo
from support.arrays import same_bits

SIZES = (5, 1, 33, 3, 2, 8, 4, 7, 6)


@functools.cache
def loaded(name: str) -> TensorFlowModel:
    return TensorFlowLoader("cpu").load(ModelSource(name, 1, factory=f"support.zoo:{name}"))


def batches_of(name: str, weighted: bool) -> list[list[Any]]:
    """Batches of different sizes, with sample weights or without."""
    batches = []
    for number, size in enumerate(SIZES):
        if name == "curves":
            x, y, weights = zoo.curves_batch(size, number)
        else:
            x, y = zoo.counting_batch(number, size)
            weights = np.linspace(0, 1, size, dtype=np.float32)
        batches.append([x, y, weights] if weighted else [x, y])
    return batches


def stepped(model: TensorFlowModel, weights: Sequence[Any], state: Sequence[Any], batch: Sequence[Any]) -> list[Any]:
    """The state after a batch, by the functions of the model."""
    results = model.run(Function.FORWARD_PASS, False, [*weights, *batch[:2]])
    update = Function.UPDATE_METRICS_STATE if len(batch) == 2 else Function.WEIGHTED_UPDATE_METRICS_STATE
    return model.run(update, False, [*state, batch[1], *results, *batch[2:]])


def initial(model: TensorFlowModel) -> list[Any]:
    return model.run(Function.INITIALIZE_METRICS_STATE, False, [])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["counting", "curves"])
def test_steps_have_the_bits_of_the_functions(name, weighted):
    model, batches = loaded(name), batches_of(name, weighted)
    evaluator = model.evaluator(weighted)
    assert evaluator is not None
    assert evaluator.joined > 1
    expected = initial(model)
    for batch in batches:
        expected = stepped(model, model.initial_weights, expected, batch)
    state = evaluator.step(model.initial_weights, initial(model), batches)
    found = evaluator.arrays(evaluator.step(model.initial_weights, state, []))
    assert all(map(same_bits, found, expected))


def test_a_batch_that_the_model_refuses_fails_the_step():
    model, batches = loaded("counting"), batches_of("counting", False)
    evaluator = model.evaluator(False)
    assert evaluator is not None
    with pytest.raises(errors.ModelRefusedInput, match="assertion failed"):
        evaluator.step(model.initial_weights, initial(model), [*batches[:3], [batches[3][0], -batches[3][1]]])


def test_a_batch_that_only_the_forward_pass_refuses_fails_the_step_too():
    # The metrics of `counting` do not read the predictions.
    model, batches = loaded("counting"), batches_of("counting", False)
    evaluator = model.evaluator(False)
    assert evaluator is not None
    for position in range(6):
        order = batches[:6]
        order[position] = [np.full(3, 77, np.int32), np.ones(3, np.int64)]
        with pytest.raises(errors.ModelRefusedInput):
            evaluator.step(model.initial_weights, initial(model), order)


@pytest.mark.parametrize("name", ["rowwise", "words", "plain_sum"])
def test_a_model_without_metrics_or_with_a_state_that_depends_on_rows_has_no_evaluator(name):
    assert loaded(name).evaluator(False) is None


def sets_of(model: TensorFlowModel, count: int, differing: Sequence[bool]) -> list[list[Any]]:
    rng, device = np.random.default_rng(0), TensorFlowDevice("/device:CPU:0")
    shared = [device.place(weight) for weight in model.initial_weights]
    return [
        [
            device.place(np.asarray(weight + rng.random(weight.shape, np.float32))) if differs else placed
            for weight, placed, differs in zip(model.initial_weights, shared, differing, strict=True)
        ]
        for _ in range(count)
    ]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("differing", [(True, True, True, True), (False, False, True, True)])
def test_several_sets_have_the_states_of_single_ones(count, differing, weighted):
    model, batches = loaded("curves"), batches_of("curves", weighted)[:4]
    single, stacked = model.evaluator(weighted), model.evaluator_of_stacks(weighted, differing)
    assert single is not None
    sets = sets_of(model, count, differing)
    states = stacked.step(stacked.stack(sets), stacked.join([initial(model)] * count), batches)
    for weights, found in zip(sets, stacked.split(states), strict=True):
        expected = single.arrays(single.step(weights, initial(model), batches))
        # The metrics count in float32. Rounding of a prediction may move an example over a threshold of a curve.
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1)


def test_nothing_is_stacked_where_the_sets_share_all_leaves():
    with pytest.raises(CannotVectorize, match="there is nothing to stack"):
        loaded("curves").evaluator_of_stacks(False, [False] * 4)
