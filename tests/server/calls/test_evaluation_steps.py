"""How many batches of an evaluation run in one computation, and whether sets of weights run together."""

from __future__ import annotations

from forwardpass_server.calls.evaluation_steps import MAX_BATCHES, Choice, StepPlan
from forwardpass_server.calls.plans import Servable
from support.metric_sessions import registry_of


def plan() -> StepPlan:
    """A plan of `counting`, whose evaluator joins four batches."""
    servable = Servable(registry_of("counting").get("counting", 1).model)
    evaluator = servable.model.evaluator(False)
    assert evaluator is not None
    assert evaluator.joined == 4
    return StepPlan(servable, evaluator, False)


def test_a_batch_of_unknown_cost_runs_by_itself():
    found = plan()
    assert found.count([100] * 9) == 1
    found.add(100, 1, 1e-5)
    assert found.count([100, 100, 10**6, 100]) == 2


def test_several_batches_fit_into_the_time_that_may_block_the_event_loop():
    for seconds, count in ((1e-5, MAX_BATCHES), (4e-5, 4), (7e-5, 4), (1e-4, 2), (2e-4, 8), (1e-3, 4), (1e-2, 1)):
        found = plan()
        found.add(100, 1, seconds)
        assert found.count([100] * 9) == count, seconds


def test_batches_of_other_sizes_count_with_their_own_cost():
    found = plan()
    found.add(100, 1, 1e-5)
    found.add(10**6, 1, 4e-3)
    assert found.count([100, 10**6, 10**6, 100]) == 2


def test_sets_run_together_if_this_was_measured_to_be_faster():
    choice = Choice()
    assert not choice.is_stacked
    choice.add(1.0, stacked=False)
    for seconds in (9.0, 0.5, 0.5):
        assert choice.is_stacked
        choice.add(seconds, stacked=True)
    assert choice.is_stacked


def test_sets_run_by_themselves_if_one_computation_is_not_faster():
    choice = Choice()
    choice.add(1.0, stacked=False)
    for _ in range(3):
        assert choice.is_stacked
        choice.add(0.95, stacked=True)
    assert not choice.is_stacked
