"""The admission limits follow the options, and the memory that models leave."""

from __future__ import annotations

import logging

import pytest

from forwardpass.wire import errors
from forwardpass_server.calls import memory_budget
from forwardpass_server.calls.capacity import Capacity, CapacityOptions
from forwardpass_server.calls.memory_budget import MemoryBudget

MIB = 2**20
BUDGET = MemoryBudget(memory_bytes=4096 * MIB, base_bytes=0, weights_bytes=256 * MIB)


def capacity(models_bytes: list[int], **changes) -> Capacity:
    options = {
        "max_message_bytes": 64 * MIB,
        "max_calls": 10,
        "max_bytes": None,
        "principal_calls": lambda in_all: in_all // 2,
        "principal_bytes": lambda in_all: in_all // 2,
    }
    return Capacity(CapacityOptions(**{**options, **changes}), BUDGET, lambda: sum(models_bytes))


def test_limits_follow_the_memory_that_models_take():
    models: list[int] = []
    found = capacity(models)
    before = found.admission.limit_bytes
    assert before == found.messages_bytes == BUDGET.messages_bytes(0)
    models.append(400 * MIB)
    assert found.admission.limit_bytes == before
    found.refresh()
    assert before - found.admission.limit_bytes == 400 * MIB // memory_budget.COPIES


def test_a_limit_that_the_operator_gave_stays_whatever_models_take():
    models: list[int] = []
    found = capacity(models, max_bytes=123 * MIB)
    models.append(1000 * MIB)
    found.refresh()
    assert found.admission.limit_bytes == found.messages_bytes == 123 * MIB


def test_a_principal_has_its_share_of_calls_and_bytes():
    found = capacity([], max_bytes=100 * MIB)
    for _ in range(5):
        found.admission.enter("ann", 1)
    with pytest.raises(errors.ServerOverloaded, match="this principal's calls: expected at most 5 at once"):
        found.admission.enter("ann", 1)
    found.admission.enter("bob", 1)
    with pytest.raises(errors.ServerOverloaded, match=f"this principal's calls: expected at most {50 * MIB} bytes"):
        found.admission.enter("bob", 50 * MIB)


def test_memory_that_holds_no_longest_message_is_warned_of_once(caplog):
    models = [3000 * MIB]
    with caplog.at_level(logging.WARNING):
        found = capacity(models)
        found.refresh()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("memory of 4096 MiB holds 16 MiB of requests and responses at once")
    assert "lower --max-message-mib or --weights-mib, or give the process more memory" in line
