"""How many bytes of requests and responses a memory holds."""

from __future__ import annotations

import numpy as np
import pytest

from forwardpass_server.calls import memory_budget
from forwardpass_server.calls.memory_budget import BASE_BYTES, COPIES, MODEL_BYTES, MemoryBudget

MIB = 2**20
GIB = 2**30


def test_messages_get_the_memory_that_weights_and_models_leave():
    budget = MemoryBudget(memory_bytes=4 * GIB, base_bytes=0, weights_bytes=GIB)
    messages_bytes = budget.messages_bytes(256 * MIB)
    # The figure of docs/reliability.md and deploy/README.md.
    assert messages_bytes // MIB == 441
    taken = BASE_BYTES + GIB + 256 * MIB + COPIES * messages_bytes
    assert 0.89 * 4 * GIB < taken <= 0.9 * 4 * GIB


@pytest.mark.parametrize(
    "more",
    [{"base_bytes": 2 * GIB}, {"weights_bytes": 2 * GIB}, {"memory_bytes": 3 * GIB}],
    ids=lambda more: next(iter(more)),
)
def test_less_memory_leaves_less_for_messages(more):
    usual = {"memory_bytes": 4 * GIB, "base_bytes": 0, "weights_bytes": 0}
    assert MemoryBudget(**{**usual, **more}).messages_bytes(0) < MemoryBudget(**usual).messages_bytes(0)


def test_short_requests_are_accepted_even_without_memory_for_messages():
    assert MemoryBudget(memory_bytes=GIB, base_bytes=0, weights_bytes=GIB).messages_bytes(0) == 16 * MIB


def test_a_model_takes_a_little_more_than_twice_its_weights():
    weights = [np.zeros(10 * MIB, np.float32), np.zeros((2, 5 * MIB), np.float32)]
    assert memory_budget.model_bytes(weights) == MODEL_BYTES + int(2.1 * 80 * MIB)
