"""Which server is asked next when one cannot answer a call."""

from __future__ import annotations

import time

import pytest

from forwardpass_client import errors, replicas
from forwardpass_client.calls import Call
from forwardpass_client.transfers import Pause, Unary

CALL = Call("/service/Method", b"request", bytes.decode)


def fail(steps, *failures: errors.ForwardPassError):
    """Fails one unary step after another: the steps that were asked for, the next one included."""
    taken = [next(steps)]
    for failure in failures:
        while isinstance(taken[-1], Pause):
            taken.append(steps.send(None))
        taken.append(steps.throw(failure))
    return taken


def test_the_sticky_server_is_asked_at_once_and_then_the_next_in_turn():
    steps = replicas.ask_others(CALL, errors.ServerUnavailable(), None)
    taken = fail(steps, errors.ServerUnavailable(), errors.ModelLoading())
    sticky, next_in_turn = (Unary(CALL.path, CALL.request, None, stays) for stays in (True, False))
    assert taken == [sticky, next_in_turn, Pause(0.1)]
    assert steps.send(None) == sticky
    with pytest.raises(StopIteration) as ended:
        steps.send(b"answer")
    assert ended.value.value == "answer"


def test_an_answer_of_other_content_is_asked_for_elsewhere():
    def read(answer: bytes) -> str:
        if answer == b"other":
            raise errors.ModelChanged
        return answer.decode()

    steps = replicas.ask_others(Call(CALL.path, CALL.request, read), errors.ModelChanged(), None)
    next(steps)
    assert steps.send(b"other") == Unary(CALL.path, CALL.request, None, False)
    with pytest.raises(StopIteration) as ended:
        steps.send(b"right")
    assert ended.value.value == "right"


@pytest.mark.parametrize("kind", [errors.ModelNotFound, errors.ModelVersionNotFound, errors.ModelFailed])
def test_a_version_that_is_gone_everywhere_is_reported_after_few_rounds(kind):
    steps = replicas.ask_others(CALL, kind(), None)
    taken = fail(steps, *[kind()] * 9)
    assert sum(step.seconds for step in taken if isinstance(step, Pause)) == pytest.approx(1.5)
    with pytest.raises(kind, match="the last"):
        steps.throw(kind("the last"))


def test_another_error_is_raised_at_once():
    steps = replicas.ask_others(CALL, errors.ServerUnavailable(), None)
    next(steps)
    with pytest.raises(errors.ShapeMismatch):
        steps.throw(errors.ShapeMismatch())


@pytest.mark.parametrize("when", ["before a try", "during a try"])
def test_a_deadline_that_passes_names_the_last_reason(when):
    reason = errors.ServerUnavailable("the device hangs")
    until = time.monotonic() + (-1 if when == "before a try" else 60)
    steps = replicas.ask_others(CALL, reason, until)
    with pytest.raises(errors.DeadlineExceeded, match="Its last try failed with ServerUnavailable: the device hangs"):
        fail(steps, errors.DeadlineExceeded())


def test_one_server_of_several_that_serves_suffices():
    health = Call("/grpc.health.v1.Health/Check", b"", lambda answer: answer == b"serving")
    steps = replicas.is_any_serving(health, 8, None)
    fail(steps, errors.ServerUnavailable())
    steps.send(b"not serving")
    with pytest.raises(StopIteration) as ended:
        steps.send(b"serving")
    assert ended.value.value is True


@pytest.mark.parametrize("answers", [False, True])
def test_no_answer_about_health_is_an_error_and_a_negative_answer_is_none(answers):
    health = Call("/grpc.health.v1.Health/Check", b"", lambda answer: answer == b"serving")
    steps = replicas.is_any_serving(health, 2, None)
    next(steps)
    if answers:
        steps.send(b"not serving")
        with pytest.raises(StopIteration) as ended:
            steps.throw(errors.ServerUnavailable())
        assert ended.value.value is False
    else:
        steps.throw(errors.ServerUnavailable())
        with pytest.raises(errors.ServerUnavailable):
            steps.throw(errors.ServerUnavailable())
