"""Servers killed while eight clients count: what was acknowledged has counted, to the last example.

For longer: benchmarks/session_faults.py.
"""

from __future__ import annotations

from support import session_faults
from support.redis_servers import RedisProcess

# A server takes some seconds to be back; what counts is how often a fault meets work, not for how long.
KILLS = 3


def test_one_server_over_a_file(tmp_path):
    check(session_faults.run([f"sqlite://{tmp_path}/sessions.sqlite3"], KILLS, 0))


def test_two_servers_over_one_redis(tmp_path):
    with RedisProcess(tmp_path) as process:
        check(session_faults.run([process.url] * 2, KILLS, 0))


def check(report: session_faults.Report) -> None:
    print(report)
    assert report.kills == KILLS
    assert report.doubts > 0
    assert report.applied == report.acknowledged
