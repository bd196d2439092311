"""The flat arguments of a call, from the structures of its request."""

from __future__ import annotations

import numpy as np
import pytest

from forwardpass.wire import errors, specs
from forwardpass.wire.description import Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.calls.plans import Servable
from forwardpass_server.models.loading import TensorFlowLoader
from support import masked_models


@pytest.fixture(scope="module")
def two_outputs() -> Servable:
    return Servable(TensorFlowLoader("cpu").load(ModelSource("m", 1, factory="support.masked_models:two_outputs")))


def predictions(examples: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "topic": rng.random((examples, 3)).astype(np.float32),
        "tags": rng.random((examples, 6, 5)).astype(np.float32),
    }


def labels(examples: int) -> Structure:
    _, y = masked_models.two_outputs_batch(examples, 0)
    return Structure.of(y)


def test_a_request_without_a_mask_counts_every_position(two_outputs):
    parts = {"output": Structure.of(predictions(2)), "label": labels(2)}
    flat = two_outputs.plan(Function.LOSS).flatten(parts)
    assert flat[-1].dtype == bool
    assert flat[-1].shape == (2, 6)
    assert flat[-1].all()


def test_a_metrics_request_without_a_mask_counts_every_position(two_outputs):
    state = two_outputs.spec.metrics_state
    parts = {
        "state": Structure(state.tree, [specs.zeros(leaf) for leaf in state.leaves]),
        "labels": labels(2),
        "batch_output.predictions": Structure.of(predictions(2)),
    }
    flat = two_outputs.plan(Function.UPDATE_METRICS_STATE).flatten(parts)
    assert flat[-1].shape == (2, 6)
    assert flat[-1].all()


def test_a_mask_of_a_request_is_passed_to_the_function(two_outputs):
    mask = np.zeros((2, 6), bool)
    given = Structure.of({"topic": None, "tags": mask})
    parts = {"output": Structure.of(predictions(2)), "label": labels(2), "output_mask": given}
    assert two_outputs.plan(Function.LOSS).flatten(parts)[-1] is given.leaves[0]


@pytest.mark.parametrize("mask", [np.zeros((2, 6), bool), {"topic": np.zeros(2, bool), "tags": np.zeros((2, 6), bool)}])
def test_a_mask_in_other_containers_is_refused(two_outputs, mask):
    parts = {"output": Structure.of(predictions(2)), "label": labels(2), "output_mask": Structure.of(mask)}
    with pytest.raises(errors.StructureMismatch, match="output_mask"):
        two_outputs.plan(Function.LOSS).flatten(parts)
