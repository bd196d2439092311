"""How much is taken at once, of whom."""

from __future__ import annotations

import gc
import weakref

import pytest

from forwardpass.wire import errors
from forwardpass_server.calls.admission import Admission, Limits

MANY = Limits(calls=100, size_bytes=1000)


@pytest.mark.parametrize(
    "in_all, each, message",
    [
        (Limits(calls=2, size_bytes=1000), MANY, "the server's calls: expected at most 2 at once, got more"),
        (MANY, Limits(calls=2, size_bytes=1000), "this principal's calls: expected at most 2 at once, got 3"),
        (Limits(calls=9, size_bytes=25), MANY, "the server's calls: expected at most 25 bytes at once, got more"),
        (MANY, Limits(calls=9, size_bytes=25), "this principal's calls: expected at most 25 bytes at once, got 30"),
    ],
)
def test_a_call_beyond_a_limit_is_refused_with_the_limits_name(in_all, each, message):
    admission = Admission(in_all, each)
    for _ in range(2):
        admission.enter("alice", 10)
    with pytest.raises(errors.ServerOverloaded, match=message) as caught:
        admission.enter("alice", 10)
    assert caught.value.retry_after_s > 0
    admission.leave("alice", 10)
    admission.enter("alice", 10)


def test_principals_have_separate_shares():
    admission = Admission(Limits(calls=3, size_bytes=1000), Limits(calls=2, size_bytes=1000))
    for principal in ("alice", "alice", "bob"):
        admission.enter(principal, 1)
    with pytest.raises(errors.ServerOverloaded, match="the server's"):
        admission.enter("bob", 1)
    admission.leave("bob", 1)
    with pytest.raises(errors.ServerOverloaded, match="this principal's"):
        admission.enter("alice", 1)
    admission.enter("bob", 1)


def test_a_single_call_of_any_size_is_admitted():
    admission = Admission(Limits(calls=9, size_bytes=10), Limits(calls=9, size_bytes=10))
    admission.enter("alice", 100)
    with pytest.raises(errors.ServerOverloaded):
        admission.enter("alice", 1)


def test_arriving_bytes_count_without_counting_as_calls():
    admission = Admission(Limits(calls=1, size_bytes=10), Limits(calls=1, size_bytes=10))
    for _ in range(2):
        admission.enter("alice", 5, calls=0)
    with pytest.raises(errors.ServerOverloaded, match="10 bytes at once, got more"):
        admission.enter("alice", 1, calls=0)
    admission.leave("alice", 10, calls=0)
    admission.enter("alice", 10)


def test_a_state_takes_no_call_and_leaves_room_for_one_request_of_any_size():
    admission = Admission(Limits(calls=1, size_bytes=10), Limits(calls=1, size_bytes=10))
    with admission.admitted_state("alice", 4), admission.admitted_state("alice", 4):
        assert not admission.is_full
        with admission.admitted("alice", 100):
            with pytest.raises(errors.ServerOverloaded, match="10 bytes at once"):
                admission.enter("alice", 1, calls=0)
        admission.enter("alice", 2, calls=0)
        with pytest.raises(errors.ServerOverloaded, match="10 bytes at once"), admission.admitted_state("alice", 4):
            pass
        admission.leave("alice", 2, calls=0)
    assert admission.size_bytes == 0
    with admission.admitted("alice", 10), pytest.raises(errors.ServerOverloaded), admission.admitted_state("alice", 4):
        pass


def test_names_of_principals_without_calls_are_dropped():
    class Name(str):
        """A name that can be referred to weakly."""

    admission = Admission(Limits(calls=1, size_bytes=10), MANY)
    kept: weakref.WeakSet[Name] = weakref.WeakSet()

    def call(principal: Name, refused: Name) -> None:
        kept.update((principal, refused))
        admission.enter(principal, 1)
        with pytest.raises(errors.ServerOverloaded):
            admission.enter(refused, 1)
        assert principal in kept
        admission.leave(principal, 1)

    for number in range(100):
        call(Name(f"{number}"), Name(f"other {number}"))
    gc.collect()
    assert len(kept) == 0


def test_held_bytes_are_never_refused_and_count_against_the_limit():
    admission = Admission(Limits(calls=10, size_bytes=100), Limits(calls=10, size_bytes=100))
    admission.enter("alice", 60)
    admission.hold("alice", 90)
    assert admission.size_bytes == 150
    admission.leave("alice", 60)
    with pytest.raises(errors.ServerOverloaded):
        admission.enter("bob", 20)
    admission.leave("alice", 90, calls=0)
    admission.enter("bob", 20)
    assert admission.size_bytes == 20


def test_changed_limits_do_not_affect_admitted_calls():
    admission = Admission(Limits(calls=10, size_bytes=100), Limits(calls=10, size_bytes=100))
    admission.enter("alice", 80)
    admission.limit(Limits(calls=10, size_bytes=50), Limits(calls=10, size_bytes=50))
    assert (admission.size_bytes, admission.limit_bytes) == (80, 50)
    with pytest.raises(errors.ServerOverloaded):
        admission.enter("alice", 1)
    admission.leave("alice", 80)
    admission.enter("alice", 50)
