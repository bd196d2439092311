"""Which server is asked next when one cannot answer a call."""

from __future__ import annotations

import pytest

from forwardpass_client import errors, replicas, targets
from forwardpass_client.call import Call
from forwardpass_client.deadlines import Deadline
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
    steps = replicas.ask_others(CALL, errors.ServerUnavailable(), Deadline(None))
    *taken, pause = fail(steps, errors.ServerUnavailable(), errors.ModelLoading())
    sticky, next_in_turn = (Unary(CALL.path, CALL.request, is_sticky) for is_sticky in (True, False))
    assert taken == [sticky, next_in_turn]
    assert isinstance(pause, Pause)
    assert 0.05 <= pause.seconds <= 0.15
    assert steps.send(None) == sticky
    with pytest.raises(StopIteration) as ended:
        steps.send(b"answer")
    assert ended.value.value == "answer"


def test_a_call_answered_with_other_content_is_sent_to_another_server():
    def read(answer: bytes) -> str:
        if answer == b"other":
            raise errors.ModelChanged
        return answer.decode()

    steps = replicas.ask_others(Call(CALL.path, CALL.request, read), errors.ModelChanged(), Deadline(None))
    next(steps)
    assert steps.send(b"other") == Unary(CALL.path, CALL.request, False)
    with pytest.raises(StopIteration) as ended:
        steps.send(b"right")
    assert ended.value.value == "right"


@pytest.mark.parametrize("kind", [errors.ModelNotFound, errors.ModelVersionNotFound, errors.ModelFailed])
def test_a_version_that_no_server_has_is_reported_after_few_retries(kind):
    steps = replicas.ask_others(CALL, kind(), Deadline(None))
    taken = fail(steps, *[kind()] * 9)
    pauses = [step.seconds for step in taken if isinstance(step, Pause)]
    assert len(pauses) == 4
    # 1.5 s, with a jitter of 50 %.
    assert 0.75 <= sum(pauses) <= 2.25
    with pytest.raises(kind, match="the last"):
        steps.throw(kind("the last"))


def test_another_error_is_raised_at_once():
    steps = replicas.ask_others(CALL, errors.ServerUnavailable(), Deadline(None))
    next(steps)
    with pytest.raises(errors.ShapeMismatch):
        steps.throw(errors.ShapeMismatch())


def test_the_error_of_a_passed_deadline_names_the_last_reason():
    deadline = Deadline(60)
    fail(replicas.ask_others(CALL, errors.ServerUnavailable("the device hangs"), deadline))
    with pytest.raises(
        errors.DeadlineExceeded, match="The last attempt failed with ServerUnavailable: the device hangs"
    ):
        raise deadline.explained(errors.DeadlineExceeded())


def test_a_retry_that_would_pass_the_deadline_is_not_waited_for():
    steps = replicas.ask_others(CALL, errors.ServerUnavailable(), Deadline(0.01))
    with pytest.raises(errors.ModelLoading):
        fail(steps, errors.ServerUnavailable(), errors.ModelLoading())


def test_one_server_of_several_that_serves_suffices():
    health = Call("/grpc.health.v1.Health/Check", b"", lambda answer: answer == b"serving")
    steps = replicas.is_any_serving(health, 8, Deadline(None))
    fail(steps, errors.ServerUnavailable())
    steps.send(b"not serving")
    with pytest.raises(StopIteration) as ended:
        steps.send(b"serving")
    assert ended.value.value is True


@pytest.mark.parametrize("answers", [False, True])
def test_a_missing_health_answer_is_an_error_and_a_negative_answer_is_not(answers):
    health = Call("/grpc.health.v1.Health/Check", b"", lambda answer: answer == b"serving")
    steps = replicas.is_any_serving(health, 2, Deadline(None))
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


class Preferring:
    """A transport to several servers, which prefers one."""

    has_several_servers = True
    is_closed = False

    def __init__(self, first: str | None) -> None:
        self.first = first


def test_a_look_up_asks_each_address_of_a_list_and_as_many_servers_of_a_name_as_turns():
    addresses = [f"10.0.0.{number}:8500" for number in range(1, 21)]
    listed = replicas.Transports(Preferring, addresses)
    first, *others = listed.candidates()
    assert first is listed.own
    assert sorted(one.first for one in others) == sorted(addresses)
    assert listed.servers == len(addresses)

    named = replicas.Transports(Preferring, [])
    assert [one.first for one in named.candidates()] == [None] * replicas.TURNS


@pytest.mark.parametrize(
    "scheme, addresses", [("ipv4", ["10.0.0.1:1", "10.0.0.2:1"]), ("ipv6", ["[::1]:1", "[::2]:1"])]
)
def test_a_target_begins_with_the_address_that_is_preferred(scheme, addresses):
    target = targets.joined(addresses)
    assert targets.listed(target) == addresses
    assert targets.beginning_with(target, addresses[1]) == f"{scheme}:{addresses[1]},{addresses[0]}"
    assert targets.listed("dns:///servers:8500") == targets.listed(addresses[0]) == []
