"""The session store, as one contract: in memory, in a file, in Redis; and what each promises besides."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from forwardpass.wire import errors
from forwardpass_server.serving.errors import SessionStoreError
from forwardpass_server.serving.session_store import SessionKey, SessionLimits, StoredSession
from forwardpass_server.serving.session_stores.lifetimes import MAX_REMEMBERED
from forwardpass_server.serving.session_stores.memory import MemorySessionStore
from forwardpass_server.serving.session_stores.redis import RedisSessionStore
from forwardpass_server.serving.session_stores.sqlite import SqliteSessionStore
from support import filesystems, session_writer
from support.redis_servers import RedisProcess

LIMITS = SessionLimits(max_sessions=100, max_bytes=2**24, idle_expiry_s=60.0, remember_s=60.0)


def key(number: int, principal: str = "") -> SessionKey:
    return SessionKey(principal, number.to_bytes(16, "big"))


@dataclasses.dataclass
class Counts:
    expired: int = 0
    commits: int = 0

    def sessions_expired(self, count: int) -> None:
        self.expired += count

    def session_commit(self, seconds: float) -> None:
        assert seconds >= 0
        self.commits += 1


class Kit:
    """Opens stores of one kind; each after the first finds what the one before has left."""

    kind: str

    def __init__(self) -> None:
        self.counts = Counts()
        self.now = 1000.0

    @contextlib.asynccontextmanager
    async def open(self, **limits: float) -> AsyncIterator:
        store = self.make(dataclasses.replace(LIMITS, **limits))
        try:
            yield store
        finally:
            await store.close()

    def make(self, limits: SessionLimits):
        raise NotImplementedError

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


class MemoryKit(Kit):
    kind = "memory"

    def make(self, limits):
        return MemorySessionStore(limits, self.counts, lambda: self.now)


class SqliteKit(Kit):
    kind = "sqlite"

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.path = path

    def make(self, limits):
        return SqliteSessionStore(self.path, limits, self.counts, lambda: self.now)


class RedisKit(Kit):
    kind = "redis"

    def __init__(self, server: RedisProcess) -> None:
        super().__init__()
        self.server = server

    def make(self, limits):
        return RedisSessionStore(self.server.url, limits, self.counts, clock=lambda: self.now)

    def pass_time(self, seconds):
        """Nobody sets the clock of a Redis: every moment that is written down there comes so much sooner."""
        super().pass_time(seconds)
        ms = round(seconds * 1000)
        with self.server.client() as client:
            for name in client.scan_iter():
                if client.type(name) == b"zset":
                    for member in client.zrange(name, 0, -1):
                        client.zincrby(name, -ms, member)
                # One that is negative by now drops the key at once, as Redis would have done.
                client.pexpire(name, client.pttl(name) - ms)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A Redis for tests that let it live."""
    with RedisProcess(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "redis"])
def kit(request, tmp_path) -> Kit:
    if request.param == "memory":
        return MemoryKit()
    if request.param == "sqlite":
        return SqliteKit(tmp_path / "sessions.db")
    server = request.getfixturevalue("redis_server")
    with server.client() as client:
        client.flushall()
    return RedisKit(server)


@pytest.fixture
def file_kit(tmp_path) -> SqliteKit:
    return SqliteKit(tmp_path / "sessions.db")


async def error_of(call) -> errors.ForwardPassError | None:
    """The error that a call ends in."""
    try:
        await call
    except errors.ForwardPassError as error:
        return error
    return None


async def how(call) -> type[errors.ForwardPassError] | None:
    """The class of the error that a call ends in."""
    error = await error_of(call)
    return type(error) if error else None


async def each(store, one: SessionKey) -> list[type[errors.ForwardPassError] | None]:
    """How every call of a session that is not there ends."""
    calls = [store.load(one), store.replace(one, 1, b"new"), store.replace(one, 2, b"new")]
    return [await how(call) for call in calls]


# The contract.


def test_a_new_session_is_at_version_1_and_there_for_whoever_asks(kit):
    async def run():
        async with kit.open() as store:
            assert await store.create(key(1), b"record") == StoredSession(1, b"record")
            assert await store.load(key(1)) == StoredSession(1, b"record")
            assert store.count() == 1

    asyncio.run(run())


def test_a_session_that_is_made_again_stays_as_it_is(kit):
    async def run():
        async with kit.open() as store:
            await store.create(key(1), b"first")
            await store.replace(key(1), 1, b"second")
            assert await store.create(key(1), b"other") == StoredSession(2, b"second")
            assert await store.load(key(1)) == StoredSession(2, b"second")
            assert store.count() == 1

    asyncio.run(run())


def test_a_record_is_replaced_where_nobody_was_faster(kit):
    async def run():
        async with kit.open() as store:
            await store.create(key(1), b"1")
            assert await store.replace(key(1), 1, b"2") is True
            assert await store.replace(key(1), 1, b"two") is False
            assert await store.replace(key(1), 3, b"three") is False
            assert await store.load(key(1)) == StoredSession(2, b"2")
            assert await store.replace(key(1), 2, b"3") is True
            assert await store.load(key(1)) == StoredSession(3, b"3")

    asyncio.run(run())


def test_of_many_that_replace_one_version_one_wins(kit):
    async def run():
        won = []

        async def count_up(store):
            for _ in range(20):
                while True:
                    stored = await store.load(key(1))
                    if await store.replace(key(1), stored.version, b"%d" % (int(stored.record) + 1)):
                        won.append(stored.version)
                        break

        async with kit.open() as store, contextlib.AsyncExitStack() as stack:
            await store.create(key(1), b"0")
            # Where servers share a store, over two of them.
            other = await stack.enter_async_context(kit.open()) if store.is_shared else store
            await asyncio.gather(*[count_up(one) for one in (store, other) * 4])
            assert await store.load(key(1)) == StoredSession(161, b"160")
        assert sorted(won) == list(range(1, 161))

    asyncio.run(run())


def test_of_many_that_make_one_session_one_wins_and_all_are_told_which(kit):
    async def run():
        async with kit.open() as store:
            made = await asyncio.gather(*[store.create(key(1), b"%d" % number) for number in range(20)])
            assert len({stored.record for stored in made}) == 1
            assert await store.load(key(1)) == made[0] == StoredSession(1, made[0].record)
            assert kit.counts.commits == 1

    asyncio.run(run())


def test_a_session_that_never_was_is_not_found(kit):
    async def run():
        async with kit.open() as store:
            assert await each(store, key(1)) == [errors.SessionNotFound] * 3
            await store.delete(key(1))
            assert await store.create(key(1), b"record") == StoredSession(1, b"record")

    asyncio.run(run())


def test_a_deleted_session_is_not_found_and_not_made_again(kit):
    async def run():
        async with kit.open() as store:
            await store.create(key(1), b"record")
            await store.delete(key(1))
            await store.delete(key(1))
            assert await each(store, key(1)) == [errors.SessionNotFound] * 3
            assert await how(store.create(key(1), b"late")) is errors.SessionNotFound
            assert store.count() == 0
            assert kit.counts.expired == 0

    asyncio.run(run())


def test_an_idle_session_expires_and_is_not_made_again(kit):
    async def run():
        async with kit.open(idle_expiry_s=10.0) as store:
            await store.create(key(1), b"record")
            kit.pass_time(11.0)
            assert await each(store, key(1)) == [errors.SessionExpired] * 3
            assert await how(store.create(key(1), b"late")) is errors.SessionExpired
            await store.delete(key(1))
            assert await how(store.load(key(1))) is errors.SessionExpired
            assert kit.counts.expired == 1
            assert store.count() == 0

    asyncio.run(run())


def test_what_nobody_asks_for_expires_too(kit):
    async def run():
        async with kit.open(idle_expiry_s=10.0) as store:
            for number in range(5):
                await store.create(key(number), b"record")
                await store.create(key(number, "another"), b"record")
            kit.pass_time(11.0)
            await store.sweep()
            assert kit.counts.expired == 10
            assert store.count() == 0

    asyncio.run(run())


def test_a_session_that_is_used_stays(kit):
    async def run():
        async with kit.open(idle_expiry_s=10.0) as store:
            names = ["load", "replace", "create", "idle"]
            for number in range(4):
                await store.create(key(number), b"record")
            for version in range(1, 3):
                kit.pass_time(6.0)
                await store.load(key(names.index("load")))
                await store.replace(key(names.index("replace")), version, b"record")
                await store.create(key(names.index("create")), b"record")
            for number in range(3):
                await store.load(key(number))
            assert await how(store.load(key(names.index("idle")))) is errors.SessionExpired

    asyncio.run(run())


def test_a_touched_session_stays_where_the_store_is_not_shared(kit):
    async def run():
        async with kit.open(idle_expiry_s=10.0) as store:
            await store.create(key(1), b"record")
            if store.is_shared:
                store.touch(key(1))
                store.touch(key(2))
                return
            for _ in range(3):
                kit.pass_time(6.0)
                store.touch(key(1))
            kit.pass_time(11.0)
            with pytest.raises(errors.SessionExpired):
                store.touch(key(1))
            with pytest.raises(errors.SessionNotFound, match="there is no"):
                store.touch(key(2))

    asyncio.run(run())


def test_an_end_is_remembered_for_so_long(kit):
    async def run():
        async with kit.open(idle_expiry_s=10.0, remember_s=20.0) as store:
            await store.create(key(1), b"closed")
            await store.delete(key(1))
            await store.create(key(2), b"expires")
            kit.pass_time(11.0)
            await store.sweep()
            assert await how(store.load(key(2))) is errors.SessionExpired
            kit.pass_time(21.0)
            await store.sweep()
            for number in (1, 2):
                assert await how(store.load(key(number))) is errors.SessionNotFound
                assert await store.create(key(number), b"anew") == StoredSession(1, b"anew")

    asyncio.run(run())


def test_sessions_beyond_the_limit_are_refused_until_others_end(kit):
    async def run():
        async with kit.open(max_sessions=2, idle_expiry_s=10.0) as store:
            await store.create(key(1), b"")
            await store.create(key(2), b"")
            await store.create(key(2), b"")
            with pytest.raises(errors.SessionLimitExceeded, match="expected at most 2, got 3"):
                await store.create(key(3), b"")
            assert await how(store.load(key(3))) is errors.SessionNotFound
            # Of one principal's sessions another has room for none the less.
            await store.create(key(3, "another"), b"")
            await store.delete(key(1))
            await store.create(key(3), b"")
            assert await how(store.create(key(4), b"")) is errors.SessionLimitExceeded
            kit.pass_time(11.0)
            await store.create(key(5), b"")
            await store.create(key(6), b"")
            assert await how(store.create(key(7), b"")) is errors.SessionLimitExceeded

    asyncio.run(run())


def test_bytes_beyond_the_limit_are_refused_until_others_are_given_back(kit):
    async def run():
        async with kit.open(max_bytes=100) as store:
            await store.create(key(1), bytes(60))
            with pytest.raises(errors.SessionLimitExceeded, match="expected at most 100, got 101"):
                await store.create(key(2), bytes(41))
            await store.create(key(2), bytes(30))
            with pytest.raises(errors.SessionLimitExceeded, match="expected at most 100, got 101"):
                await store.replace(key(2), 1, bytes(41))
            assert await store.load(key(2)) == StoredSession(1, bytes(30))
            # That somebody was faster is said first: what is refused then would not count anyway.
            assert await store.replace(key(2), 7, bytes(41)) is False
            assert await store.replace(key(2), 1, bytes(40)) is True
            assert await store.replace(key(1), 1, bytes(10)) is True
            assert await store.replace(key(2), 2, bytes(90)) is True
            await store.delete(key(2))
            assert await store.replace(key(1), 2, bytes(100)) is True

    asyncio.run(run())


def test_whoever_is_above_a_limit_that_was_lowered_may_get_below_it(kit):
    async def run():
        async with contextlib.AsyncExitStack() as stack:
            store = await stack.enter_async_context(kit.open())
            for number in range(3):
                await store.create(key(number), bytes(60))
            if kit.kind == "memory":
                return
            await store.close()
            store = await stack.enter_async_context(kit.open(max_sessions=2, max_bytes=100))
            assert await store.replace(key(0), 1, bytes(60)) is True
            assert await store.replace(key(0), 2, bytes(50)) is True
            assert await how(store.replace(key(0), 3, bytes(51))) is errors.SessionLimitExceeded

    asyncio.run(run())


@pytest.mark.parametrize("size_bytes", [0, 1, 2**20])
def test_records_of_any_size_come_back_as_they_were(kit, size_bytes):
    async def run():
        data = random.Random(1).randbytes(size_bytes)
        async with kit.open() as store:
            await store.create(key(1), data)
            assert (await store.load(key(1))).record == data
            await store.replace(key(1), 1, data[::-1])
            assert (await store.load(key(1))).record == data[::-1]

    asyncio.run(run())


def test_a_session_of_one_principal_is_invisible_to_another(kit):
    async def run():
        principals = ["", "a", "{a}", "a:b", "a}", "spiffe://cluster/ns/é", "a\0b", "*"]
        async with kit.open() as store:
            for principal in principals:
                assert (await store.create(key(1, principal), principal.encode())).version == 1
            for principal in principals:
                assert (await store.load(key(1, principal))).record == principal.encode()
            await store.delete(key(1, "a"))
            assert await how(store.load(key(1, "a"))) is errors.SessionNotFound
            for principal in set(principals) - {"a"}:
                assert (await store.load(key(1, principal))).record == principal.encode()
            assert await how(store.load(key(1, "nobody"))) is errors.SessionNotFound

    asyncio.run(run())


def test_commits_are_counted_where_something_was_made_or_replaced(kit):
    async def run():
        async with kit.open(max_bytes=10) as store:
            await store.create(key(1), b"1")
            await store.create(key(1), b"1")
            await store.replace(key(1), 1, b"2")
            await store.replace(key(1), 1, b"2")
            await how(store.replace(key(1), 2, bytes(11)))
            await store.load(key(1))
            await store.delete(key(1))
            assert kit.counts.commits == 2

    asyncio.run(run())


def test_whoever_stops_waiting_leaves_the_store_in_order(kit):
    async def run():
        async with kit.open() as store:
            for number in range(50):
                await store.create(key(number), b"old")
            tasks = [asyncio.ensure_future(store.replace(key(number), 1, b"new")) for number in range(50)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert found[1::2] == [True] * 25
            for number in range(50):
                stored = await store.load(key(number))
                assert stored in (StoredSession(1, b"old"), StoredSession(2, b"new"))
                assert await store.replace(key(number), stored.version, b"%d" % number) is True
            records = await asyncio.gather(*[store.load(key(number)) for number in range(50)])
            assert [int(stored.record) for stored in records] == list(range(50))

    asyncio.run(run())


def test_what_a_principal_has_is_counted_right_whatever_happens(kit):
    """The same random steps on the store and on a dictionary."""

    async def run():
        rng = random.Random(7)
        known: dict[SessionKey, StoredSession] = {}
        gone: set[SessionKey] = set()
        async with kit.open(max_sessions=4, max_bytes=1000) as store:
            for _ in range(600):
                one = key(rng.randrange(40), rng.choice(["a", "b"]))
                mine = {other: stored for other, stored in known.items() if other.principal == one.principal}
                record = rng.randbytes(rng.randrange(400))
                used = sum(len(stored.record) for stored in mine.values())
                match rng.choice(["create", "replace", "replace", "delete"]):
                    case "create":
                        found = await how(store.create(one, record))
                        if one in gone:
                            assert found is errors.SessionNotFound
                        elif one not in known and (len(mine) == 4 or used + len(record) > 1000):
                            assert found is errors.SessionLimitExceeded
                        else:
                            assert found is None
                            known.setdefault(one, StoredSession(1, record))
                    case "replace" if one in known:
                        old = known[one]
                        grown = len(record) - len(old.record)
                        found = await how(store.replace(one, old.version, record))
                        if grown > 0 and used + grown > 1000:
                            assert found is errors.SessionLimitExceeded
                        else:
                            assert found is None
                            known[one] = StoredSession(old.version + 1, record)
                    case "delete":
                        await store.delete(one)
                        if known.pop(one, None):
                            gone.add(one)
            for one, stored in known.items():
                assert await store.load(one) == stored
            assert store.count() == len(known)

    asyncio.run(run())


def test_a_new_server_finds_everything_where_the_store_is_durable(kit):
    async def run():
        async with kit.open(max_sessions=3) as store:
            await store.create(key(1), b"first")
            await store.replace(key(1), 1, b"second")
            await store.create(key(2), b"closed")
            await store.delete(key(2))
            await store.create(key(4, "another"), b"other")
        async with kit.open(max_sessions=3) as store:
            if kit.kind == "memory":
                assert await each(store, key(1)) == [errors.SessionNotFound] * 3
                return
            assert await store.load(key(1)) == StoredSession(2, b"second")
            assert await store.load(key(4, "another")) == StoredSession(1, b"other")
            assert await how(store.create(key(2), b"late")) is errors.SessionNotFound
            await store.create(key(5), b"")
            await store.create(key(6), b"")
            assert await how(store.create(key(7), b"")) is errors.SessionLimitExceeded
            assert store.count() == 4

    asyncio.run(run())


def test_that_a_session_has_expired_is_known_to_a_new_server(kit):
    async def run():
        async with kit.open(idle_expiry_s=10.0) as store:
            await store.create(key(1), b"record")
            kit.pass_time(11.0)
            await store.sweep()
            assert await how(store.load(key(1))) is errors.SessionExpired
        async with kit.open(idle_expiry_s=10.0) as store:
            found = await how(store.create(key(1), b"late"))
            assert found is (None if kit.kind == "memory" else errors.SessionExpired)
            assert kit.counts.expired == 1

    asyncio.run(run())


def test_the_oldest_ends_of_a_principal_are_forgotten_beyond_a_number():
    async def run():
        kit = MemoryKit()
        async with kit.open() as store:
            await store.create(key(0, "another"), b"")
            await store.delete(key(0, "another"))
            for number in range(MAX_REMEMBERED + 1):
                await store.create(key(number), b"")
                await store.delete(key(number))
            assert await how(store.create(key(0), b"")) is None
            assert await how(store.create(key(1), b"")) is errors.SessionNotFound
            assert await how(store.create(key(0, "another"), b"")) is errors.SessionNotFound

    asyncio.run(run())


# SQLite: one file, one process, and what was acknowledged.


class Writer:
    """`support.session_writer` as a process. A context manager: leaving it kills the process."""

    def __init__(self, path: pathlib.Path, acknowledged: pathlib.Path, callers: int = 16) -> None:
        self._acknowledged = acknowledged
        command = [sys.executable, "-m", "support.session_writer", str(path), str(callers)]
        with acknowledged.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output)

    def wait_for(self, count: int) -> None:
        """Until so many updates were acknowledged."""
        deadline = time.monotonic() + 60
        while self._acknowledged.read_bytes().count(b"\n") < count:
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def acknowledged(self) -> dict[int, int]:
        """The last version of each caller's session that was acknowledged. To be asked when it writes no more."""
        lines = self._acknowledged.read_bytes().rpartition(b"\n")[0].splitlines()
        return {int(caller): int(version) for caller, version in (line.split() for line in lines)}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()


async def check_nothing_is_lost(path: pathlib.Path, acknowledged: dict[int, int]) -> None:
    store = SqliteSessionStore(path, session_writer.LIMITS, Counts())
    for caller, version in acknowledged.items():
        stored = await store.load(session_writer.key(caller))
        # The one that was under way when the process ended was stored, or was not.
        assert stored.version in (version, version + 1)
        assert stored.record == session_writer.record(caller, stored.version)
    assert store.count() >= len(acknowledged)
    await store.close()


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    for count in (1, 2000, 5000):
        path = tmp_path / f"{count}.db"
        with Writer(path, tmp_path / "acknowledged") as writer:
            writer.wait_for(count)
        acknowledged = writer.acknowledged()
        assert sum(acknowledged.values()) >= count
        asyncio.run(check_nothing_is_lost(path, acknowledged))


def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path):
    """What has not reached the disk of a filesystem is not in a copy of that disk."""
    image = tmp_path / "disk"
    filesystems.make_ext4(image, 32)
    cuts: list[tuple[pathlib.Path, dict[int, int]]] = []
    with filesystems.mounted(tmp_path / "before", "-o", "loop", str(image)) as folder:
        with Writer(folder / "sessions.db", tmp_path / "acknowledged") as writer:
            # Now and then everything is on the disk by chance; not five times.
            for cut in range(5):
                writer.wait_for(2500 * (cut + 1))
                writer.process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, writer.process.pid, os.WSTOPPED)
                cuts.append((tmp_path / f"disk {cut}", writer.acknowledged()))
                shutil.copyfile(image, cuts[-1][0])
                writer.process.send_signal(signal.SIGCONT)
    for after, acknowledged in cuts:
        with filesystems.mounted(tmp_path / f"after {after.name}", "-o", "loop", str(after)) as folder:
            asyncio.run(check_nothing_is_lost(folder / "sessions.db", acknowledged))
    assert sum(acknowledged.values()) >= 2500 * len(cuts)


def test_closing_commits_what_was_handed_over(file_kit):
    async def run():
        store = file_kit.make(LIMITS)
        await store.create(key(1), b"old")
        replacing = [asyncio.ensure_future(store.replace(key(1), version, b"%d" % version)) for version in range(1, 9)]
        await asyncio.sleep(0)
        await store.close()
        assert await asyncio.gather(*replacing) == [True] * 8
        await store.close()
        assert await how(store.load(key(1))) is errors.SessionStoreUnavailable
        async with file_kit.open() as store:
            assert await store.load(key(1)) == StoredSession(9, b"8")

    asyncio.run(run())


def test_sessions_that_are_found_at_start_count_as_used_then(file_kit):
    async def run():
        async with file_kit.open() as store:
            await store.create(key(1), b"record")
            await store.create(key(2), b"record")
            await store.delete(key(2))
        file_kit.pass_time(1000.0)
        async with file_kit.open(idle_expiry_s=10.0, remember_s=10.0) as store:
            file_kit.pass_time(9.0)
            await store.sweep()
            assert await store.load(key(1)) == StoredSession(1, b"record")
            assert await how(store.create(key(2), b"late")) is errors.SessionNotFound
            file_kit.pass_time(2.0)
            await store.sweep()
            assert await store.create(key(2), b"anew") == StoredSession(1, b"anew")

    asyncio.run(run())


def test_what_is_forgotten_leaves_the_file(file_kit):
    async def run():
        async with file_kit.open(remember_s=10.0) as store:
            for number in range(5):
                await store.create(key(number), b"record")
                await store.delete(key(number))
            file_kit.pass_time(11.0)
            await store.sweep()

    asyncio.run(run())
    with contextlib.closing(sqlite3.connect(file_kit.path)) as connection:
        for table in ("sessions", "ended", "usage"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_nobody_else_may_read_the_file(file_kit):
    async def run():
        async with file_kit.open() as store:
            await store.create(key(1), b"record")
            assert {path.stat().st_mode & 0o777 for path in file_kit.path.parent.glob("sessions.db*")} == {0o600}

    asyncio.run(run())


def test_a_second_process_on_the_same_file_is_refused(tmp_path):
    path = tmp_path / "sessions.db"
    with Writer(path, tmp_path / "acknowledged") as writer:
        writer.wait_for(1)
        with pytest.raises(SessionStoreError, match=r"sessions\.db: another process uses it"):
            SqliteSessionStore(path, LIMITS, Counts())
        writer.wait_for(1000)
    asyncio.run(check_nothing_is_lost(path, writer.acknowledged()))


def test_a_second_store_in_the_same_process_is_refused_and_the_first_keeps_its_lock(file_kit):
    async def run():
        async with file_kit.open() as store:
            with pytest.raises(SessionStoreError, match="another process uses it"):
                file_kit.make(LIMITS)
            await store.create(key(1), b"record")
            command = [sys.executable, "-m", "support.session_writer", str(file_kit.path), "1"]
            second = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
            assert "another process uses it" in second.stderr
            assert await store.load(key(1)) == StoredSession(1, b"record")

    asyncio.run(run())


def test_a_file_that_is_no_store_is_refused_and_stays_as_it_is(tmp_path):
    garbage, foreign, newer = (tmp_path / name for name in ("garbage.db", "foreign.db", "newer.db"))
    garbage.write_bytes(random.Random(1).randbytes(10_000))
    with contextlib.closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE somebodys (data)")
    asyncio.run(SqliteSessionStore(newer, LIMITS, Counts()).close())
    with contextlib.closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 2")
    for path, why in (
        (garbage, "file is not a database"),
        (foreign, "another program's database"),
        (newer, "its format is version 2, and this server knows 1 only"),
        (tmp_path, "unable to open database file"),
        (garbage / "sessions.db", "File exists"),
    ):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(SessionStoreError, match=why):
            SqliteSessionStore(path, LIMITS, Counts())
        assert before is None or path.read_bytes() == before


def test_a_damaged_file_is_refused(file_kit):
    async def run():
        async with file_kit.open() as store:
            for number in range(50):
                await store.create(key(number), bytes(2048))

    asyncio.run(run())
    with file_kit.path.open("r+b") as file:
        file.seek(4096 * 5)
        file.write(random.Random(1).randbytes(4096 * 10))
    with pytest.raises(SessionStoreError, match=r"sessions\.db: .*(damaged|malformed)"):
        file_kit.make(LIMITS)


class Disk:
    """A place for files that can be full. fill: leaves room for about so many bytes."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def fill(self, left_bytes: int) -> None:
        raise NotImplementedError

    def free(self) -> None:
        raise NotImplementedError


class LimitedDisk(Disk):
    """The kernel lets this process write no longer files."""

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, left_bytes):
        longest = max(path.stat().st_size for path in self.folder.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest + left_bytes, self.before[1]))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


class SmallDisk(Disk):
    """A filesystem of 8 MiB."""

    def fill(self, left_bytes):
        with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            file.write(bytes(shutil.disk_usage(self.folder).free - left_bytes))

    def free(self):
        (self.folder / "filler").unlink()


@pytest.fixture(params=["a limit of the process", "a small filesystem"])
def disk(request, tmp_path) -> Iterator[Disk]:
    if request.param == "a small filesystem":
        with filesystems.mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as folder:
            yield SmallDisk(folder)
    else:
        limited = LimitedDisk(tmp_path)
        yield limited
        limited.free()


def test_a_full_disk_refuses_what_it_has_no_room_for_and_nothing_else(disk, caplog):
    async def run():
        kit = SqliteKit(disk.folder / "sessions.db")
        async with kit.open() as store:
            for number in range(9):
                await store.create(key(number), bytes(100))
            disk.fill(400_000)
            calls = [store.replace(key(number), 1, bytes(2000)) for number in range(8)]
            *small, large = await asyncio.gather(*calls, how(store.replace(key(8), 1, bytes(2**20))))
            assert small == [True] * 8
            assert large is errors.SessionStoreUnavailable
            version = 2
            while (error := await error_of(store.replace(key(0), version, b"%d" % version * 50_000))) is None:
                version += 1
            assert isinstance(error, errors.SessionStoreUnavailable)
            assert re.match("the session store cannot do it: (disk|database)", str(error))
            assert str(disk.folder) not in str(error)
            assert error.retry_after_s > 0
            assert await store.load(key(0)) == StoredSession(version, b"%d" % (version - 1) * 50_000)
            disk.free()
            assert await store.replace(key(0), version, b"room") is True
            assert await store.replace(key(8), 1, bytes(2**20)) is True
            await store.close()
        async with kit.open() as store:
            assert await store.load(key(0)) == StoredSession(version + 1, b"room")
            assert await store.load(key(8)) == StoredSession(2, bytes(2**20))
            for number in range(1, 8):
                assert await store.load(key(number)) == StoredSession(2, bytes(2000))

    asyncio.run(run())
    # The log says it when it begins and when it is over, not with every call.
    messages = [record.getMessage() for record in caplog.records if "session" in record.name]
    assert sum("works again" in message for message in messages) == sum("fails" in message for message in messages) <= 2


def test_what_expires_while_the_disk_is_full_expires(disk):
    async def run():
        kit = SqliteKit(disk.folder / "sessions.db")
        async with kit.open(max_sessions=8, idle_expiry_s=10.0) as store:
            for number in range(8):
                await store.create(key(number), bytes(100_000))
            disk.fill(0)
            kit.pass_time(11.0)
            assert await how(store.sweep()) is errors.SessionStoreUnavailable
            assert await how(store.load(key(1))) is errors.SessionExpired
            assert await how(store.create(key(9), b"")) is errors.SessionStoreUnavailable
            disk.free()
            await store.create(key(9), b"")
            await store.close()
        async with kit.open() as store:
            assert store.count() == 1
            assert await how(store.load(key(1))) is errors.SessionExpired

    asyncio.run(run())


# Redis: shared, restarted, hung, guarded.


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


def test_calls_go_on_when_redis_was_killed_and_started_again(own_redis):
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


def test_a_wrong_password_is_refused_at_start_and_shown_nowhere(tmp_path, caplog):
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


def test_a_redis_that_may_lose_sessions_is_warned_of(tmp_path, caplog):
    async def run(server: RedisProcess):
        async with RedisKit(server).open() as store:
            await store.check()

    flags = ("--appendonly", "no", "--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru")
    with RedisProcess(tmp_path, *flags) as server:
        asyncio.run(run(server))
    assert "appendonly is off" in caplog.text
    assert "maxmemory-policy may drop open sessions" in caplog.text


def test_a_full_redis_refuses_new_records_and_goes_on_when_there_is_room(tmp_path):
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


def test_to_sweep_is_no_use_of_a_session_that_another_server_holds_open(redis_server):
    async def run():
        kit = RedisKit(redis_server)
        async with kit.open(idle_expiry_s=10.0) as first, kit.open(idle_expiry_s=10.0) as second:
            await first.create(key(1, "shared"), b"record")
            kit.pass_time(6.0)
            await second.load(key(1, "shared"))
            kit.pass_time(6.0)
            await first.sweep()
            assert (first.count(), second.count()) == (0, 1)
            assert await second.replace(key(1, "shared"), 1, b"new") is True
            kit.pass_time(6.0)
            await first.sweep()
            kit.pass_time(6.0)
            await first.sweep()
            assert await how(second.load(key(1, "shared"))) is errors.SessionExpired

    asyncio.run(run())


def test_a_record_that_redis_has_evicted_has_expired(redis_server):
    async def run():
        kit = RedisKit(redis_server)
        async with kit.open(max_sessions=1) as store:
            await store.create(key(1, "evicted"), b"record")
            with redis_server.client() as client:
                (name,) = client.keys(f"*:session:{key(1).session_id.hex()}")
                client.delete(name)
            assert await how(store.create(key(1, "evicted"), b"anew")) is errors.SessionExpired
            await store.create(key(2, "evicted"), b"record")
            assert kit.counts.expired == 1

    asyncio.run(run())


def test_what_redis_drops_by_itself_has_expired(redis_server):
    async def run():
        async with RedisKit(redis_server).open(max_sessions=1, idle_expiry_s=0.1) as store:
            await store.create(key(1, "expires"), b"record")
            await asyncio.to_thread(wait_until_gone, redis_server, f"*:session:{key(1).session_id.hex()}")
            await store.create(key(2, "expires"), b"record")
            assert await how(store.load(key(1, "expires"))) is errors.SessionExpired

    asyncio.run(run())


def test_redis_forgets_all_of_a_principal_in_the_end(redis_server):
    async def run():
        async with RedisKit(redis_server).open(idle_expiry_s=0.1, remember_s=0.1) as store:
            for number in range(3):
                await store.create(key(number), b"record")
            await store.delete(key(0))

    with redis_server.client() as client:
        client.flushall()
        asyncio.run(run())
        assert client.keys("*")
    wait_until_gone(redis_server, "*")


def wait_until_gone(server: RedisProcess, pattern: str) -> None:
    deadline = time.monotonic() + 30
    with server.client() as client:
        while client.keys(pattern):
            assert time.monotonic() < deadline
            time.sleep(0.01)
