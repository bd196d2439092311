"""The session store, as one contract: in memory, in a file, in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from forwardpass.wire import errors
from forwardpass_server.sessions.store import SessionKey, StoredSession
from support.session_stores import Kit, MemoryKit, SqliteKit, how, key

MODELS = ("a model with a long name", "another of that kind")


@pytest.fixture(params=["memory", "sqlite", "redis"])
def kit(request, tmp_path) -> Kit:
    if request.param == "memory":
        return MemoryKit()
    if request.param == "sqlite":
        return SqliteKit(tmp_path / "sessions.db")
    return request.getfixturevalue("redis_kit")


async def each(store, one: SessionKey) -> list[type[errors.ForwardPassError] | None]:
    """How every call of a session that is not there ends."""
    calls = [store.load(one), store.replace(one, 1, b"new"), store.replace(one, 2, b"new")]
    return [await how(call) for call in calls]


def test_a_new_session_has_version_1_and_can_be_loaded(kit):
    async def run():
        async with kit.open() as store:
            assert await store.create(key(1), b"record") == StoredSession(1, b"record")
            assert await store.load(key(1)) == StoredSession(1, b"record")
            assert store.count() == 1

    asyncio.run(run())


def test_creating_an_existing_session_does_not_change_it(kit):
    async def run():
        async with kit.open() as store:
            await store.create(key(1), b"first")
            await store.replace(key(1), 1, b"second")
            assert await store.create(key(1), b"other") == StoredSession(2, b"second")
            assert await store.load(key(1)) == StoredSession(2, b"second")
            assert store.count() == 1

    asyncio.run(run())


def test_a_record_is_replaced_only_at_its_current_version(kit):
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


def test_one_of_several_concurrent_replacements_of_a_version_succeeds(kit):
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


def test_concurrent_creations_of_one_session_return_the_same_record(kit):
    async def run():
        async with kit.open() as store:
            made = await asyncio.gather(*[store.create(key(1), b"%d" % number) for number in range(20)])
            assert len({stored.record for stored in made}) == 1
            assert await store.load(key(1)) == made[0] == StoredSession(1, made[0].record)
            assert kit.counts.commits == 1

    asyncio.run(run())


def test_an_unknown_session_is_not_found(kit):
    async def run():
        async with kit.open() as store:
            assert await each(store, key(1)) == [errors.SessionNotFound] * 3
            await store.delete(key(1))
            assert await store.create(key(1), b"record") == StoredSession(1, b"record")

    asyncio.run(run())


def test_a_deleted_session_is_not_found_and_cannot_be_created_again(kit):
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


def test_an_expired_session_cannot_be_created_again(kit):
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


def test_sessions_that_are_never_loaded_expire(kit):
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


def test_a_used_session_does_not_expire(kit):
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


def test_a_touched_session_does_not_expire_in_a_store_that_is_not_shared(kit):
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


def test_ended_sessions_are_remembered_for_the_set_time(kit):
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


def test_bytes_beyond_the_limit_are_refused_until_others_are_released(kit):
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


def test_a_principal_above_a_lowered_limit_can_delete_its_sessions(kit):
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
def test_records_of_any_size_are_loaded_unchanged(kit, size_bytes):
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


def test_created_and_replaced_records_count_as_commits(kit):
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


def test_cancelled_calls_leave_the_store_consistent(kit):
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


def test_the_counts_of_a_principal_are_correct_after_random_steps(kit):
    """The same random steps on the store and on a dictionary."""

    async def run():
        rng = random.Random(7)
        known: dict[SessionKey, StoredSession] = {}
        gone: set[SessionKey] = set()
        models: dict[SessionKey, str] = {}
        async with kit.open(max_sessions=4, max_bytes=1000) as store:
            for _ in range(600):
                one = key(rng.randrange(40), rng.choice(["a", "b"]))
                mine = {other: stored for other, stored in known.items() if other.principal == one.principal}
                record = rng.randbytes(rng.randrange(400))
                used = sum(len(stored.record) for stored in mine.values())
                match rng.choice(["create", "replace", "replace", "delete"]):
                    case "create":
                        model = rng.choice(MODELS)
                        found = await how(store.create(one, record, model))
                        if one in gone:
                            assert found is errors.SessionNotFound
                        elif one not in known and (len(mine) == 4 or used + len(record) > 1000):
                            assert found is errors.SessionLimitExceeded
                        else:
                            assert found is None
                            known.setdefault(one, StoredSession(1, record))
                            models.setdefault(one, model)
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
            for model in MODELS:
                assert await store.count_of(model) == sum(models[one] == model for one in known)

    asyncio.run(run())


def test_the_sessions_of_a_model_are_counted_until_they_end(kit):
    async def run():
        async with kit.open(idle_expiry_s=10.0) as store:
            for number, principal in ((1, ""), (2, ""), (3, "another"), (4, "braces {*}")):
                await store.create(key(number, principal), b"record", MODELS[0])
            # It is there, and of the first.
            await store.create(key(1), b"record", MODELS[1])
            await store.create(key(5), b"of no model")
            await store.replace(key(1), 1, b"changed")
            assert [await store.count_of(model) for model in MODELS] == [4, 0]
            await store.delete(key(2))
            await store.delete(key(2))
            assert await store.count_of(MODELS[0]) == 3
            kit.pass_time(6.0)
            await store.load(key(3, "another"))
            kit.pass_time(6.0)
            assert await store.count_of(MODELS[0]) == 1
            kit.pass_time(11.0)
            assert await store.count_of(MODELS[0]) == 0

    asyncio.run(run())


def test_a_new_server_counts_sessions_that_the_previous_server_left(kit):
    async def run():
        async with kit.open() as store:
            await store.create(key(1), b"record", MODELS[0])
            await store.create(key(2, "another"), b"record", MODELS[0])
            await store.create(key(3), b"record", MODELS[1])
            await store.delete(key(3))
        async with kit.open() as store:
            assert await store.count_of(MODELS[0]) == (0 if kit.kind == "memory" else 2)
            assert await store.count_of(MODELS[1]) == 0

    asyncio.run(run())


def test_a_new_server_finds_all_records_of_a_durable_store(kit):
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


def test_a_new_server_knows_that_a_session_has_expired(kit):
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
