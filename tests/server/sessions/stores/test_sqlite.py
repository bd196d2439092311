"""Sessions in a SQLite file: one process, full and broken disks, and what was acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
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
from collections.abc import Iterator

import pytest

from forwardpass.wire import errors
from forwardpass_server.errors import SessionStoreError
from forwardpass_server.sessions.store import StoredSession
from forwardpass_server.sessions.stores.sqlite import SqliteSessionStore
from forwardpass_server.sessions.stores.sqlite_file import Replacement, SqliteFile
from support import filesystems, session_writer
from support.session_stores import LIMITS, Counts, SqliteKit, error_of, how, key


@pytest.fixture
def file_kit(tmp_path) -> SqliteKit:
    return SqliteKit(tmp_path / "sessions.db")


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


def test_closing_commits_waiting_records(file_kit):
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


def test_sessions_found_at_the_start_count_as_just_used(file_kit):
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


def test_markers_of_ended_sessions_are_deleted_from_the_file(file_kit):
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


def test_only_the_owner_may_read_the_file(file_kit):
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


def test_a_file_of_the_first_format_is_converted(file_kit):
    async def run():
        async with file_kit.open() as store:
            await store.create(key(1), b"record", "model")
        with contextlib.closing(sqlite3.connect(file_kit.path)) as connection:
            connection.execute("ALTER TABLE sessions DROP COLUMN model")
            connection.execute("PRAGMA user_version = 1")
        for number in (2, 3):
            async with file_kit.open() as store:
                assert await store.load(key(1)) == StoredSession(1, b"record")
                await store.create(key(number), b"record", "model")
                assert await store.count_of("model") == number - 1

    asyncio.run(run())


def test_a_file_that_is_not_a_session_store_is_refused_and_not_changed(tmp_path):
    garbage, foreign, newer = (tmp_path / name for name in ("garbage.db", "foreign.db", "newer.db"))
    garbage.write_bytes(random.Random(1).randbytes(10_000))
    with contextlib.closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE somebodys (data)")
    asyncio.run(SqliteSessionStore(newer, LIMITS, Counts()).close())
    with contextlib.closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 3")
    for path, why in (
        (garbage, "file is not a database"),
        (foreign, "the database of another program"),
        (newer, "its format is version 3, and this server supports version 2 only"),
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


def test_a_full_disk_refuses_only_records_that_do_not_fit(disk, caplog):
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
            assert re.match("the session store failed: (disk|database)", str(error))
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


def test_sessions_expire_after_a_full_disk_has_space_again(disk):
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


def test_records_of_one_length_that_wait_together_are_replaced_in_one_statement(file_kit):
    keys = [key(index) for index in range(1, 6)]
    statements: list[str] = []

    async def run():
        async with file_kit.open() as store:
            store._file.connection.set_trace_callback(statements.append)
            for one in keys:
                await store.create(one, b"0" * 8)
                assert await store.replace(one, 1, b"1" * 8)
            statements.clear()
            # The first one is written at once, and the others wait for it.
            replacing = [asyncio.ensure_future(store.replace(one, 2, b"2" * 8)) for one in keys]
            assert await asyncio.gather(*replacing) == [True] * 5
            assert statements
            assert all(statement.startswith(("UPDATE", "WITH given")) for statement in statements)
            assert not await store.replace(keys[0], 2, b"9" * 8)
            assert await store.replace(keys[0], 3, b"longer than before")
        async with file_kit.open() as store:
            assert await store.load(keys[0]) == StoredSession(4, b"longer than before")
            for one in keys[1:]:
                assert await store.load(one) == StoredSession(3, b"2" * 8)

    asyncio.run(run())


def test_several_records_are_replaced_only_if_all_have_the_versions_that_are_expected(tmp_path):
    file = SqliteFile(tmp_path / "sessions.db", LIMITS)
    with contextlib.closing(file.connection):
        for number in (1, 2):
            file.create(key(number), b"0" * 8, "")
        new = [Replacement(key(number), 1, b"1" * 8) for number in (1, 2)]
        # Rows that were only created are not known yet.
        assert not file.replace_all(new)
        assert all(file.replace(*one) for one in new)
        newer = [Replacement(key(number), 2, b"%d" % number * 8) for number in (1, 2)]
        assert not file.replace_all([newer[0], new[1]])
        assert not file.replace_all([newer[0], newer[0]])
        assert not file.replace_all([newer[0], Replacement(key(2), 2, b"longer than before")])
        assert file.replace_all(newer)
        file.forget_rows()
        assert not file.replace_all([Replacement(key(1), 3, b"3" * 8)])
        assert [file.load(key(number)) for number in (1, 2)] == [StoredSession(3, b"1" * 8), StoredSession(3, b"2" * 8)]
