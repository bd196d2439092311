"""Which replica is asked for weights that all replicas share."""

from __future__ import annotations

import collections
import hashlib

import pytest

from forwardpass_client import errors, routes
from forwardpass_client.call import Call
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.routes import Route, Routes
from forwardpass_client.transfers import Pause, Resolve, Unary

ADDRESSES = [f"10.0.0.{index}:8500" for index in range(1, 5)]
IDS = [hashlib.sha256(bytes([index, index // 256])).digest() for index in range(256)]


def running(steps, *results):
    """The steps after these results, and their result once they have ended. An error is thrown."""
    taken, value = [], None
    results = iter([None, *results])
    try:
        while True:
            result = next(results, None)
            taken.append(steps.throw(result) if isinstance(result, Exception) else steps.send(result))
    except StopIteration as stop:
        value = stop.value
    return taken, value


def begun(addresses=ADDRESSES) -> Routes:
    found = Routes(addresses, None)
    running(found.begin())
    return found


def test_without_several_addresses_or_a_name_routing_stays_off():
    assert not begun([]).is_on
    assert begun([]).pick(IDS[0]) is None
    assert Routes(ADDRESSES, None).pick(IDS[0]) is None


def test_each_replica_is_first_for_its_share_of_the_weights():
    first = collections.Counter(begun().rank(one)[0] for one in IDS)
    # 256 / 4 = 64 each: a binomial distribution with a standard deviation of 7.
    assert set(first) == set(ADDRESSES)
    assert all(30 <= count <= 98 for count in first.values())


def test_all_clients_have_the_same_order_whatever_the_order_of_addresses():
    mine, other = begun(), begun(ADDRESSES[::-1])
    assert all(mine.rank(one) == other.rank(one) for one in IDS)


def test_a_removed_replica_changes_the_first_place_of_its_own_weights_only():
    before, after = begun(), begun(ADDRESSES[:3])
    for one in IDS:
        rank = before.rank(one)
        assert after.rank(one) == [address for address in rank if address != ADDRESSES[3]]


def test_a_replica_that_is_gone_gets_no_calls_until_it_is_healthy(monkeypatch):
    table = begun()
    first, second, *_ = table.rank(IDS[0])
    assert table.pick(IDS[0]) == first
    table.failed(first, errors.WeightsNotFound())
    assert table.pick(IDS[0]) == first
    table.failed(first, errors.ServerUnavailable())
    assert table.pick(IDS[0]) == second
    # Before it is time, nothing is asked.
    assert not table.must_maintain()
    monkeypatch.setattr(routes, "_PROBE_S", 0.0)
    table.failed(first, errors.ServerUnavailable())
    for answer, is_up in [(errors.DeadlineExceeded(), False), (b"\x08\x02", False), (b"\x08\x01", True)]:
        assert table.must_maintain()
        assert not table.must_maintain()
        (probe,), _ = running(table.maintain(), answer)
        assert (probe.path, probe.address) == ("/grpc.health.v1.Health/Check", first)
        assert probe.timeout_s == 2.0
        assert table.pick(IDS[0]) == (first if is_up else second)
    assert not table.must_maintain()


def test_where_all_replicas_are_gone_the_first_in_rank_is_asked():
    table = begun()
    for address in ADDRESSES:
        table.failed(address, errors.ServerUnavailable())
    assert table.pick(IDS[0]) == table.rank(IDS[0])[0]
    assert table.pick(IDS[0], ADDRESSES) is None


def test_a_name_is_looked_up_again_and_new_replicas_get_calls_once_they_are_healthy(monkeypatch):
    table = Routes([], ("replicas", 8500))
    (look_up,), _ = running(table.begin(), ADDRESSES[:2])
    assert look_up == Resolve("replicas", 8500)
    assert set(table.addresses) == set(ADDRESSES[:2])
    assert not table.must_maintain()
    monkeypatch.setattr(table, "_resolve_at", 0.0)
    assert table.must_maintain()
    taken, _ = running(table.maintain(), ADDRESSES[1:3], errors.ServerUnavailable())
    assert [type(step) for step in taken] == [Resolve, Unary]
    assert set(table.addresses) == set(ADDRESSES[1:3])
    assert {table.pick(one) for one in IDS} == {ADDRESSES[1]}
    monkeypatch.setattr(routes, "_PROBE_S", 0.0)
    table.failed(ADDRESSES[2], errors.ServerUnavailable())
    assert table.must_maintain()
    running(table.maintain(), b"\x08\x01")
    assert {table.pick(one) for one in IDS} == set(ADDRESSES[1:3])


def test_a_name_that_cannot_be_looked_up_leaves_what_is_known(monkeypatch):
    table = Routes([], ("replicas", 8500))
    running(table.begin(), errors.ServerUnavailable())
    assert not table.is_on
    running(table.begin(), ADDRESSES)
    for answer in (errors.ServerUnavailable(), []):
        monkeypatch.setattr(table, "_resolve_at", 0.0)
        running(table.maintain(), answer)
        assert set(table.addresses) == set(ADDRESSES)


CALL = Call("/service/Method", b"request", bytes.decode)


class Held(HeldWeights):
    """Weights whose put is one step."""

    def put(self, deadline, progress=None):
        if not self.has_arrays:
            raise errors.WeightsNotFound("no arrays")
        yield Unary("/put", b"")

    @property
    def has_arrays(self) -> bool:
        return self.weights_id != IDS[1]


def asked(table, *failures, weights_id=IDS[0], answer=b"answer"):
    """(path, replica) of each step after these failures, the first of which has happened; and the result."""
    first, *others = failures
    steps = routes.ask_others(CALL, Held(weights_id), table.rank(weights_id)[0], first, Deadline(None), table)
    taken, value = running(steps, *others, answer)
    return [(step.path, step.address) if isinstance(step, Unary) else step for step in taken], value


def test_the_next_in_rank_is_asked_at_once():
    table = begun()
    _, second, third, fourth = table.rank(IDS[0])
    unavailable = errors.ServerUnavailable()
    taken, value = asked(table, unavailable, errors.ModelNotFound(), errors.ModelLoading())
    assert taken == [(CALL.path, second), (CALL.path, third), (CALL.path, fourth)]
    assert value == "answer"
    # The one that lacks the version is there.
    assert table.pick(IDS[0]) == second


def test_after_all_replicas_have_failed_there_is_a_pause():
    table = begun(ADDRESSES[:2])
    first, second = table.rank(IDS[0])
    taken, value = asked(table, errors.ServerUnavailable(), errors.ServerUnavailable(), None)
    assert taken[0] == (CALL.path, second)
    assert isinstance(taken[1], Pause)
    assert taken[2] == (CALL.path, first)
    assert value == "answer"


def test_weights_are_put_again_only_after_several_replicas_lack_them():
    table = begun()
    first, second, third, _ = table.rank(IDS[0])
    lacking = errors.WeightsNotFound()
    taken, value = asked(table, lacking)
    assert (taken, value) == ([(CALL.path, second)], "answer")
    taken, value = asked(table, lacking, lacking, lacking, b"put")
    assert taken == [(CALL.path, second), (CALL.path, third), ("/put", first), (CALL.path, first)]
    assert value == "answer"
    with pytest.raises(errors.WeightsNotFound, match="no arrays"):
        asked(table, lacking, lacking, lacking, weights_id=IDS[1])


def test_weights_that_are_lost_after_each_put_are_an_error():
    table = begun()
    lacking = errors.WeightsNotFound()
    with pytest.raises(errors.WeightsNotFound):
        asked(table, lacking, lacking, lacking, b"put", lacking, lacking, lacking, lacking)


def test_an_overloaded_replica_is_replaced_by_one_other():
    table = begun()
    _, second, *_ = table.rank(IDS[0])
    taken, _ = asked(table, errors.ServerOverloaded())
    assert taken == [(CALL.path, second)]
    with pytest.raises(errors.ServerOverloaded):
        asked(table, errors.ServerOverloaded(), errors.ServerOverloaded())


def test_an_error_of_the_call_is_raised_at_once():
    with pytest.raises(errors.ModelRefusedInput):
        asked(begun(), errors.ModelRefusedInput())


def test_a_piece_of_work_stays_with_its_replica_until_it_is_gone():
    table = begun()
    first, second, *_ = table.rank(IDS[0])
    route = Route(table, IDS[0])

    def work():
        answers = [(yield Unary("/a", b""))]
        yield Pause(0.1)
        try:
            yield Unary("/b", b"")
        except errors.ServerUnavailable:
            answers.append((yield Unary("/b", b"")))
        return answers

    taken, value = running(route.along(work()), b"1", None, errors.ServerUnavailable(), b"2")
    assert [getattr(step, "address", None) for step in taken] == [first, None, first, second]
    assert value == [b"1", b"2"]
    assert route.address == second
    fixed = Route(table, None, ADDRESSES[0])
    fixed.failed(errors.ServerUnavailable())
    assert fixed.address == ADDRESSES[0]
    assert routes.STICKY.address is None
