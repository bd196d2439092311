"""When a call ends, and how long it pauses between attempts."""

from __future__ import annotations

import threading

import pytest

import forwardpass_client
from forwardpass_client import errors
from forwardpass_client.backoff import Backoff
from forwardpass_client.deadlines import Deadline, locked


def test_the_error_of_a_passed_deadline_says_why_the_last_attempt_failed():
    deadline = Deadline(0)
    with pytest.raises(errors.DeadlineExceeded) as plain:
        deadline.remaining_s()
    assert str(plain.value) == errors.DeadlineExceeded.sentence
    deadline.last_error = errors.ModelLoading("not yet")
    with pytest.raises(errors.DeadlineExceeded, match=r"The last attempt failed with ModelLoading: not yet$") as caught:
        deadline.remaining_s()
    assert caught.value.__cause__ is deadline.last_error


def test_no_limit_is_no_deadline():
    deadline = Deadline(None)
    assert deadline.remaining_s() is None
    assert deadline.wait_s() is None
    assert not deadline.is_before(1e9)


def test_progress_moves_only_a_renewable_deadline():
    own, clients = Deadline(5), Deadline(5, is_renewable=True)
    before = own.at, clients.at
    own.renew(100)
    clients.renew(100)
    assert own.at == before[0]
    assert clients.at >= before[1] + 100
    fixed = clients.fixed()
    clients.renew(200)
    assert before[1] + 100 <= fixed.at < clients.at


def test_a_lock_is_waited_for_until_the_deadline():
    lock = threading.Lock()
    with locked(lock, Deadline(None)), pytest.raises(errors.DeadlineExceeded):
        with locked(lock, Deadline(0.01)):
            pass
    with locked(lock, Deadline(0)):
        assert lock.locked()


def test_pauses_double_up_to_two_seconds_and_begin_anew_after_progress():
    backoff = Backoff(Deadline(None))
    expected = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    for _ in range(2):
        for seconds in expected:
            assert seconds / 2 <= backoff.pause_s(errors.ServerUnavailable()) <= seconds * 1.5
        backoff.reset()


def test_pauses_differ_between_clients_that_failed_together():
    assert len({Backoff(Deadline(None)).pause_s(errors.ServerUnavailable()) for _ in range(20)}) > 1


def test_a_pause_that_would_pass_the_deadline_raises_the_error_of_the_unavailable_server():
    with pytest.raises(errors.ServerUnavailable, match="gone"):
        Backoff(Deadline(0.01)).pause_s(errors.ServerUnavailable("gone"))
    with pytest.raises(errors.DeadlineExceeded, match="UploadOutOfStep: lost"):
        Backoff(Deadline(0.01)).pause_s(errors.UploadOutOfStep("lost"))


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), 1e300])
def test_an_invalid_timeout_is_refused(wrong):
    with pytest.raises(ValueError, match="timeout_s: expected seconds >= 0"):
        forwardpass_client.connect("localhost:1", timeout_s=wrong)
    with forwardpass_client.connect("localhost:1") as client:
        with pytest.raises(ValueError, match="timeout_s: expected seconds >= 0"):
            client.models(timeout_s=wrong)


@pytest.mark.parametrize("wrong", ["1", b"1", True, [1]])
def test_a_timeout_that_is_not_a_number_is_refused(wrong):
    with pytest.raises(TypeError, match="timeout_s: expected seconds as a number, or None"):
        forwardpass_client.connect_async("localhost:1", timeout_s=wrong)
    with forwardpass_client.connect("localhost:1") as client, pytest.raises(TypeError, match="timeout_s: expected"):
        client.model("m", timeout_s=wrong)
