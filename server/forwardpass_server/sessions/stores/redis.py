"""Sessions in Redis, which any number of servers share."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import importlib.resources
import logging
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from forwardpass.wire import errors
from forwardpass_server.errors import SessionStoreError
from forwardpass_server.sessions.store import SessionKey, SessionLimits, SessionObserver, StoredSession
from forwardpass_server.sessions.stores import refusals
from forwardpass_server.sessions.stores.lifetimes import MAX_REMEMBERED

_LOGGER = logging.getLogger(__name__)

_SCRIPT = importlib.resources.files(__package__).joinpath("redis_step.lua").read_text()

# Calls beyond so many wait here: Redis runs one step at a time, however many ask.
_MAX_CONNECTIONS = 32

_RETRY_AFTER_S = 1.0

# Of a check: Redis does one thing at a time, and one that lets a ping wait so long lets every call wait.
_CHECK_TIMEOUT_S = 2.0

# While Redis is away, from one call that tries it to the next. Each pause is twice the one before: all other calls fail
# at once, so that their callers learn the reason within their deadlines.
_FIRST_TRIAL_PAUSE_S = 0.1
_TRIAL_PAUSE_S = 2.0

# The key of a principal's models, after its prefix.
_MODELS = ":models"

# Keys that Redis looks at between other servers' steps, for some 100 us.
_SCANNED = 1000


class RedisSessionStore:
    """A SessionStore that is shared. What was acknowledged survives as Redis was set up to keep it.

    Sessions expire by Redis's clock. What was sent on a connection that breaks is sent once more: a replacement that
    was done the first time returns False then.
    url: redis:// or rediss://, as redis-py reads it, with the password where there is one; it is shown nowhere.
    While Redis does not answer, one call at a time tries it, and all others fail at once with the reason.
    timeout_s: of each call, with the waiting for a connection. clock: tells which sessions `count` counts.
    Raises SessionStoreError for another url. Connects with the first call.
    """

    is_shared = True

    def __init__(
        self,
        url: str,
        limits: SessionLimits,
        observer: SessionObserver,
        *,
        timeout_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            self.place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
            if parts.scheme not in ("redis", "rediss") or not parts.hostname:
                raise ValueError
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=None,
                # Connections from before a restart of Redis are noticed when they are used.
                retry=Retry(NoBackoff(), 1),
                socket_connect_timeout=timeout_s,
                socket_timeout=timeout_s,
            )
            # An option that there is none of shows when a connection is made of it.
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError):
            raise SessionStoreError(
                "session store: expected redis://[:password@]host:port/db, or rediss:// with TLS"
            ) from None
        self._client = redis.asyncio.Redis.from_pool(pool)
        self._script = self._client.register_script(_SCRIPT)
        self._limits = limits
        self._observer = observer
        self._timeout_s = timeout_s
        self._clock = clock
        self._calls: set[asyncio.Future[Any]] = set()
        self.problem = ""
        self._was_greeted = False
        # Redis does not answer: when the next call may try it, by time.monotonic, and the pause after that one.
        self._is_away = False
        self._next_trial = 0.0
        self._trial_pause_s = _FIRST_TRIAL_PAUSE_S
        # When this server has used each session; what it has not used for the longest time stands first.
        self._used: collections.OrderedDict[SessionKey, float] = collections.OrderedDict()

    async def check(self) -> None:
        """See SessionStore. The first time, logs which settings of Redis may lose what was acknowledged."""
        try:
            if not self._was_greeted:
                self._warn(await self._trial(self._client.info()))
                self._was_greeted = True
            elif self.problem:
                # Redis refuses a write when it is full, and a ping never.
                await self._trial(self._client.set("forwardpass:check", b"", px=1000), proves_writes=True)
            else:
                await self._trial(self._client.ping())
        except errors.SessionStoreUnavailable as error:
            if isinstance(error.__cause__, (redis.AuthenticationError, redis.ResponseError)):
                raise SessionStoreError(f"session store {self.place}: {error}") from error
            raise

    def _warn(self, info: Any) -> None:
        if not info.get("aof_enabled"):
            _LOGGER.warning("session store %s: appendonly is off; sessions end with Redis", self.place)
        if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
            _LOGGER.warning("session store %s: maxmemory-policy may drop open sessions", self.place)

    async def create(self, key: SessionKey, record: bytes, model: str = "") -> StoredSession:
        what, version, found = await self._step("create", key, 0, record, model)
        return StoredSession(1, record) if what == b"created" else StoredSession(int(version), found)

    async def load(self, key: SessionKey) -> StoredSession:
        _, version, record = await self._step("load", key)
        return StoredSession(int(version), record)

    async def replace(self, key: SessionKey, version: int, record: bytes) -> bool:
        what, _, _ = await self._step("replace", key, version, record)
        return what == b"replaced"

    def touch(self, key: SessionKey) -> None:
        """Nothing: the record is in Redis."""

    async def delete(self, key: SessionKey) -> None:
        self._used.pop(key, None)
        await self._call("delete", _prefix(key.principal), key.session_id)

    async def sweep(self) -> None:
        last = self._clock() - self._limits.idle_expiry_s
        idle = []
        while self._used and next(iter(self._used.values())) <= last:
            idle.append(self._used.popitem(last=False)[0])
        # Redis has dropped the records; a step of each principal makes it count them.
        for key in {key.principal: key for key in idle}.values():
            await self._call("sweep", _prefix(key.principal))

    async def count_of(self, model: str) -> int:
        """Looks through the names of all keys in Redis, some thousands at a time, for the principals that there are."""
        found: set[bytes] = set()
        cursor: int | None = None
        while cursor != 0:
            looked = self._client.scan(cursor or 0, match=f"forwardpass:{{*}}{_MODELS}", count=_SCANNED)
            cursor, names = await self._bounded(looked)
            found.update(names)
        steps = [await self._call("count", name.decode().removesuffix(_MODELS), model=model) for name in found]
        return sum(int(count) for _, count, _ in steps)

    def count(self) -> int:
        return len(self._used)

    async def close(self) -> None:
        if self._calls:
            await asyncio.wait(self._calls)
        await self._client.aclose()

    async def _step(
        self, action: str, key: SessionKey, version: int = 0, record: bytes = b"", model: str = ""
    ) -> tuple[bytes, Any, Any]:
        """What came of a step of an open session, or of one to be made; what is refused is raised."""
        started = time.perf_counter()
        what, first, second = await self._call(action, _prefix(key.principal), key.session_id, version, record, model)
        if what in (b"expired", b"closed", b"missing"):
            self._used.pop(key, None)
            raise refusals.not_found(key) if what == b"missing" else refusals.ended(key, what == b"expired")
        if what == b"full":
            refusals.check_room(self._limits, int(first), int(second))
        if what in (b"created", b"replaced"):
            self._observer.session_commit(time.perf_counter() - started)
        self._used[key] = self._clock()
        self._used.move_to_end(key)
        return what, first, second

    async def _call(
        self,
        action: str,
        prefix: str,
        session_id: bytes = b"",
        version: int = 0,
        record: bytes = b"",
        model: str = "",
    ) -> tuple[bytes, Any, Any]:
        limits = self._limits
        keys = [f"{prefix}:session:{session_id.hex()}"]
        keys += [prefix + name for name in (":open", ":sizes", _MODELS, ":closed", ":expired")]
        sizes = [limits.max_sessions, limits.max_bytes]
        spans_ms = [round(seconds * 1000) for seconds in (limits.idle_expiry_s, limits.remember_s)]
        arguments: list[bytes | str | int]
        arguments = [action, session_id, version, record, model, *sizes, *spans_ms, MAX_REMEMBERED]
        what, first, second, expiries = await self._bounded(self._script(keys=keys, args=arguments))
        if expiries:
            self._observer.sessions_expired(expiries)
        return what, first, second

    async def _bounded(self, calling: Any) -> Any:
        """What a call returns. Raises SessionStoreUnavailable, at once while Redis is known to be away."""
        if self._is_away and time.monotonic() < self._next_trial:
            calling.close()
            raise errors.SessionStoreUnavailable(self.problem, retry_after_s=_RETRY_AFTER_S)
        return await self._trial(calling, self._timeout_s)

    async def _trial(self, calling: Any, timeout_s: float = _CHECK_TIMEOUT_S, *, proves_writes: bool = False) -> Any:
        """`_bounded`, whether Redis is away or not. proves_writes: of a call that a full Redis would refuse."""
        timeout_s = min(timeout_s, self._timeout_s)
        if self._is_away:
            self._next_trial = time.monotonic() + timeout_s + self._trial_pause_s
        call = asyncio.ensure_future(calling)
        self._calls.add(call)
        call.add_done_callback(self._ended)
        try:
            await asyncio.wait([call], timeout=timeout_s)
            if call.cancelled():
                # Another call has found that Redis is away.
                raise errors.SessionStoreUnavailable(self.problem, retry_after_s=_RETRY_AFTER_S)
            if not call.done():
                raise asyncio.TimeoutError
            answer = call.result()
        except (redis.RedisError, OSError, asyncio.TimeoutError) as error:
            self._note_failure(error, timeout_s)
            raise errors.SessionStoreUnavailable(self.problem, retry_after_s=_RETRY_AFTER_S) from error
        finally:
            call.cancel()
        if self._is_away or (self.problem and proves_writes):
            _LOGGER.warning("session store %s works again", self.place)
            self.problem = ""
            self._is_away = False
            self._trial_pause_s = _FIRST_TRIAL_PAUSE_S
        return answer

    def _ended(self, call: asyncio.Future[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            # Of a call that nobody waits for any more, too: asyncio would log the error otherwise.
            call.exception()

    def _note_failure(self, error: Exception, timeout_s: float) -> None:
        problem = self._reason(error, timeout_s)
        if problem != self.problem:
            _LOGGER.error("session store %s fails: %s: %s", self.place, type(error).__name__, error)
            self.problem = problem
        # A command that Redis refuses is an answer.
        if isinstance(error, redis.ResponseError):
            return
        self._next_trial = time.monotonic() + self._trial_pause_s
        self._trial_pause_s = min(2 * self._trial_pause_s, _TRIAL_PAUSE_S)
        if not self._is_away:
            self._is_away = True
            # They would wait for as long as they may, longer than their callers.
            for call in self._calls:
                call.cancel()

    def _reason(self, error: Exception, timeout_s: float) -> str:
        if isinstance(error, redis.AuthenticationError):
            return "the session store refuses the server's password"
        if isinstance(error, redis.ResponseError):
            return f"the session store refuses: {error}"
        if isinstance(error, (redis.TimeoutError, asyncio.TimeoutError, TimeoutError)):
            return f"the session store did not answer within {timeout_s:g} s"
        return "the session store cannot be reached"


def _prefix(principal: str) -> str:
    """How the keys of a principal begin. Its name may hold anything, braces too, which mean something to a cluster."""
    return "forwardpass:{" + hashlib.sha256(principal.encode()).hexdigest()[:32] + "}"
