"""Two servers are restarted one after the other, and one is killed, under callers with the default policy."""

from __future__ import annotations

from support.rolling_restart import Callers, Replicas

# Of all kinds together, between one event and the next: enough that each caller has made some.
_CALLS = 300


def test_callers_lose_no_call_and_count_no_update_twice_while_servers_are_restarted_and_killed(tmp_path):
    # Streams that are open for good must not hold up the end of a server.
    with Replicas(tmp_path, "--drain-delay", "0.6", "--drain-timeout", "60") as replicas:
        callers = Callers(replicas.addresses)
        callers.go_on(_CALLS)
        for index in range(2):
            assert replicas.stop(index) == 0
            callers.go_on(_CALLS)
            replicas.start(index)
            callers.go_on(_CALLS)
        replicas.kill(0)
        callers.go_on(_CALLS)
        replicas.start(0)
        callers.go_on(_CALLS)
        callers.end()
    assert callers.failed == []
    assert len(callers.updates) == 3
    for acknowledged, counted in callers.updates:
        assert counted == acknowledged > 0
