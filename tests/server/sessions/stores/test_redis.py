"""Sessions in Redis: shared, killed, hung, full, guarded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from forwardpass.wire import errors
from forwardpass_server.errors import SessionStoreError
from forwardpass_server.sessions.store import StoredSession
from forwardpass_server.sessions.stores.redis import RedisSessionStore
from support.redis_servers import RedisProcess
from support.session_stores import LIMITS, Counts, RedisKit, error_of, how, key


@pytest.fixture
def own_redis(tmp_path) -> Iterator[RedisProcess]:
    """A Redis for a test that does it harm."""
    with RedisProcess(tmp_path) as server:
        yield server


async def available(call, *arguments):
    """What a call returns, once Redis is there."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return await call(*arguments)
        except errors.SessionStoreUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


def test_calls_work_again_after_redis_is_killed_and_restarted(own_redis):
    async def run():
        kit = RedisKit(own_redis)
        stopped = asyncio.Event()
        acknowledged = dict.fromkeys(range(8), 0)

        async def count_up(store, number: int) -> None:
            """Applies an update as whoever uses the store does: the record tells whether one with a lost answer was."""
            wanted = b"%d" % (acknowledged[number] + 1)
            stored = await store.load(key(number))
            if stored.record == wanted or await store.replace(key(number), stored.version, wanted):
                acknowledged[number] += 1

        async def count_on(store, number: int) -> None:
            await store.create(key(number), b"0")
            while not stopped.is_set():
                await available(count_up, store, number)

        async with kit.open() as store:
            counting = [asyncio.ensure_future(count_on(store, number)) for number in acknowledged]
            for total in (200, 400, 600):
                while sum(acknowledged.values()) < total:
                    done, _ = await asyncio.wait(counting, timeout=0.01)
                    assert not done
                await asyncio.to_thread(own_redis.kill)
                await asyncio.to_thread(own_redis.start)
            stopped.set()
            await asyncio.gather(*counting)
            for number, count in acknowledged.items():
                assert await store.load(key(number)) == StoredSession(count + 1, b"%d" % count)

    asyncio.run(run())


def test_a_redis_that_hangs_is_waited_for_so_long_and_no_longer(own_redis):
    async def run():
        store = RedisSessionStore(own_redis.url, LIMITS, Counts(), timeout_s=0.3)
        await store.create(key(1), b"record")
        own_redis.pause()
        calls = [store.load(key(1)) for _ in range(100)]
        found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
        assert {str(error) for error in found} == {"the session store did not answer within 0.3 s"}
        own_redis.resume()
        assert await available(store.load, key(1)) == StoredSession(1, b"record")
        await store.close()

    asyncio.run(run())


def test_a_redis_that_is_not_there_is_said_so(own_redis):
    async def run():
        async with RedisKit(own_redis).open() as store:
            await store.check()
            own_redis.kill()
            with pytest.raises(errors.SessionStoreUnavailable, match="cannot be reached"):
                await store.check()
            with pytest.raises(errors.SessionStoreUnavailable, match="cannot be reached") as raised:
                await store.create(key(1), b"record")
            assert raised.value.retry_after_s > 0

    asyncio.run(run())


def test_while_redis_is_unavailable_one_call_at_a_time_tries_it_and_others_fail_at_once(own_redis):
    async def run():
        # None is waited for: so long, no call of a test lasts.
        store = RedisSessionStore(own_redis.url, LIMITS, Counts(), timeout_s=1.0)
        await store.check()
        assert store.problem == ""
        own_redis.pause()
        assert await how(store.load(key(1))) is errors.SessionStoreUnavailable
        assert store.problem == "the session store did not answer within 1 s"
        trial = asyncio.ensure_future(store.check())
        await asyncio.sleep(0)
        # The trial has not ended: these have not waited for Redis.
        for _ in range(100):
            assert str(await error_of(store.load(key(1)))) == store.problem
        assert not trial.done()
        own_redis.resume()
        await asyncio.gather(trial, return_exceptions=True)
        await available(store.check)
        assert store.problem == ""
        assert await how(store.load(key(1))) is errors.SessionNotFound
        await store.close()

    asyncio.run(run())


def test_a_refused_write_is_a_problem_until_a_check_has_written(tmp_path):
    async def run(server: RedisProcess):
        async with RedisKit(server).open() as store:
            await store.check()
            made = 0
            while await error_of(store.create(key(made), bytes(200_000))) is None:
                made += 1
            assert "maxmemory" in store.problem
            # It answers reads, and this is no proof.
            await store.load(key(0))
            assert "maxmemory" in store.problem
            await store.delete(key(0))
            await store.delete(key(1))
            assert "maxmemory" in store.problem
            await store.check()
            assert store.problem == ""

    with RedisProcess(tmp_path, "--maxmemory", "5mb") as server:
        asyncio.run(run(server))


def test_a_wrong_password_is_refused_at_start_and_never_shown(tmp_path, caplog):
    async def run(server: RedisProcess):
        async with RedisKit(server).open() as store:
            await store.check()
            assert store.place == f"redis://127.0.0.1:{server.port}/0"
        for user in (":wr0ng@", ""):
            url = server.url.replace(":s3cret@", user)
            store = RedisSessionStore(url, LIMITS, Counts())
            with pytest.raises(SessionStoreError, match="refuses") as raised:
                await store.check()
            with pytest.raises(errors.SessionStoreUnavailable, match="refuses") as unavailable:
                await store.load(key(1))
            await store.close()
            assert "wr0ng" not in f"{raised.value} {unavailable.value} {store.place} {caplog.text}"

    with RedisProcess(tmp_path, password="s3cret") as server:
        asyncio.run(run(server))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "http://:s3cret@host",
        "redis://:s3cret@",
        "redis://:s3cret@h:port/0",
        "redis://h/0?passwrd=s3cret",
    ],
)
def test_another_url_is_refused_and_not_shown(url):
    with pytest.raises(SessionStoreError, match=r"expected redis://") as raised:
        RedisSessionStore(url, LIMITS, Counts())
    assert "s3cret" not in str(raised.value)


def test_a_redis_that_may_lose_sessions_causes_a_warning(tmp_path, caplog):
    async def run(server: RedisProcess):
        async with RedisKit(server).open() as store:
            await store.check()

    flags = ("--appendonly", "no", "--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru")
    with RedisProcess(tmp_path, *flags) as server:
        asyncio.run(run(server))
    assert "appendonly is off" in caplog.text
    assert "maxmemory-policy may drop open sessions" in caplog.text


def test_a_full_redis_refuses_new_records_until_it_has_memory(tmp_path):
    async def run(server: RedisProcess):
        async with RedisKit(server).open() as store:
            made = 0
            while (error := await error_of(store.create(key(made), bytes(200_000)))) is None:
                made += 1
            assert isinstance(error, errors.SessionStoreUnavailable)
            assert "maxmemory" in str(error)
            assert await how(store.replace(key(0), 1, bytes(200_000))) is errors.SessionStoreUnavailable
            assert await store.load(key(0)) == StoredSession(1, bytes(200_000))
            assert await how(store.load(key(made))) is errors.SessionNotFound
            await store.delete(key(0))
            await store.delete(key(1))
            assert await store.create(key(made), b"room") == StoredSession(1, b"room")

    with RedisProcess(tmp_path, "--maxmemory", "5mb") as server:
        asyncio.run(run(server))


def test_a_sweep_does_not_count_as_use_of_a_session(redis_kit):
    async def run():
        async with redis_kit.open(idle_expiry_s=10.0) as first, redis_kit.open(idle_expiry_s=10.0) as second:
            await first.create(key(1), b"record")
            redis_kit.pass_time(6.0)
            await second.load(key(1))
            redis_kit.pass_time(6.0)
            await first.sweep()
            assert (first.count(), second.count()) == (0, 1)
            assert await second.replace(key(1), 1, b"new") is True
            redis_kit.pass_time(6.0)
            await first.sweep()
            redis_kit.pass_time(6.0)
            await first.sweep()
            assert await how(second.load(key(1))) is errors.SessionExpired

    asyncio.run(run())


def test_a_record_that_redis_has_evicted_has_expired(redis_kit):
    async def run():
        async with redis_kit.open(max_sessions=1) as store:
            await store.create(key(1), b"record")
            with redis_kit.server.client() as client:
                (name,) = client.keys("*:session:*")
                client.delete(name)
            assert await how(store.create(key(1), b"anew")) is errors.SessionExpired
            await store.create(key(2), b"record")
            assert redis_kit.counts.expired == 1

    asyncio.run(run())


def test_sessions_that_redis_itself_expired_raise_session_expired(redis_kit):
    async def run():
        async with redis_kit.open(max_sessions=1, idle_expiry_s=0.1) as store:
            await store.create(key(1), b"record")
            await asyncio.to_thread(wait_until_gone, redis_kit.server, "*:session:*")
            await store.create(key(2), b"record")
            assert await how(store.load(key(1))) is errors.SessionExpired

    asyncio.run(run())


def test_redis_keeps_no_key_of_a_principal_without_sessions(redis_kit):
    async def run():
        async with redis_kit.open(idle_expiry_s=0.1, remember_s=0.1) as store:
            for number in range(3):
                await store.create(key(number), b"record")
            await store.delete(key(0))

    asyncio.run(run())
    wait_until_gone(redis_kit.server, "*")


def wait_until_gone(server: RedisProcess, pattern: str) -> None:
    deadline = time.monotonic() + 30
    with server.client() as client:
        while client.keys(pattern):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_sessions_are_counted_among_many_foreign_keys(redis_kit):
    async def run():
        with redis_kit.server.client() as client:
            client.mset({f"forwardpass:{{{number}}}:other": "" for number in range(5000)})
            client.set("forwardpass:models", "")
        async with redis_kit.open() as store:
            for number in range(30):
                await store.create(key(number, f"principal {number % 10}"), b"record", "a model with a long name")
            assert await store.count_of("a model with a long name") == 30

    asyncio.run(run())
