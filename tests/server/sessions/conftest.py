"""One real Redis for the tests that let it live."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.redis_servers import RedisProcess
from support.session_stores import RedisKit


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_kit(redis_server: RedisProcess) -> RedisKit:
    """Stores over a Redis that is empty."""
    with redis_server.client() as client:
        client.flushall()
    return RedisKit(redis_server)
