"""What a server remembers of sessions that have ended."""

from __future__ import annotations

import asyncio

from forwardpass.wire import errors
from forwardpass_server.sessions.stores.lifetimes import MAX_REMEMBERED
from support.session_stores import MemoryKit, how, key


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
