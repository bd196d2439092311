"""The session store in Redis, which any number of servers share."""

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

# Further calls wait in this process: Redis runs one step at a time anyway.
_MAX_CONNECTIONS = 32

_RETRY_AFTER_S = 1.0

# The timeout of a check. If Redis delays a ping for so long, it delays every call.
_CHECK_TIMEOUT_S = 2.0

# The backoff while Redis does not answer: one call tries it after each pause, and all other calls fail at once, so that
# their clients get the reason within their deadlines. Each pause is twice the one before.
_FIRST_TRIAL_PAUSE_S = 0.1
_TRIAL_PAUSE_S = 2.0

# The end of the key that holds the counts of a principal's sessions by model.
_MODELS = ":models"

# Keys that Redis scans in one step, in some 100 us.
_SCANNED = 1000


class RedisSessionStore:
    """A shared SessionStore. Whether acknowledged updates survive depends on the configuration of Redis.

    Sessions expire by the clock of Redis. A request on a connection that breaks is sent once more: a replacement that
    was made the first time then returns False.
    url: redis:// or rediss://, as redis-py reads it, maybe with a password, which no message shows.
    While Redis does not answer, one call at a time tries it, and all others fail at once with the reason.
    timeout_s: of each call, including the wait for a connection. clock: for `count`, which counts recent uses.
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
                # After a restart of Redis, a pooled connection fails at its first use.
                retry=Retry(NoBackoff(), 1),
                socket_connect_timeout=timeout_s,
                socket_timeout=timeout_s,
            )
            # Raises TypeError for an unknown option in the url.
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
        self._settings_checked = False
        # While Redis does not answer: when the next call may try it, by time.monotonic, and the pause after that.
        self._is_away = False
        self._next_trial = 0.0
        self._trial_pause_s = _FIRST_TRIAL_PAUSE_S
        # When this server last used each session, in the order of use.
        self._used: collections.OrderedDict[SessionKey, float] = collections.OrderedDict()

    async def check(self) -> None:
        """See SessionStore. The first check logs a warning for settings of Redis that may lose acknowledged updates."""
        try:
            if not self._settings_checked:
                self._warn_of_settings(await self._trial(self._client.info()))
                self._settings_checked = True
            elif self.problem:
                # A full Redis refuses writes, but no ping.
                await self._trial(self._client.set("forwardpass:check", b"", px=1000), proves_writes=True)
            else:
                await self._trial(self._client.ping())
        except errors.SessionStoreUnavailable as error:
            if isinstance(error.__cause__, (redis.AuthenticationError, redis.ResponseError)):
                raise SessionStoreError(f"session store {self.place}: {error}") from error
            raise

    def _warn_of_settings(self, info: Any) -> None:
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
        """Does nothing: only steps in Redis mark a record as used."""

    async def delete(self, key: SessionKey) -> None:
        self._used.pop(key, None)
        await self._call("delete", _prefix(key.principal), key.session_id)

    async def sweep(self) -> None:
        last = self._clock() - self._limits.idle_expiry_s
        idle = []
        while self._used and next(iter(self._used.values())) <= last:
            idle.append(self._used.popitem(last=False)[0])
        # Redis has deleted the records by itself. One step for each principal updates the counts.
        for key in {key.principal: key for key in idle}.values():
            await self._call("sweep", _prefix(key.principal))

    async def count_of(self, model: str) -> int:
        """See SessionStore. Scans the names of all keys in Redis to find all principals."""
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
        """Runs a step on one session. Raises the error of a refused step."""
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
        """The result of a call. Raises SessionStoreUnavailable; at once while Redis is known not to answer."""
        if self._is_away and time.monotonic() < self._next_trial:
            calling.close()
            raise errors.SessionStoreUnavailable(self.problem, retry_after_s=_RETRY_AFTER_S)
        return await self._trial(calling, self._timeout_s)

    async def _trial(self, calling: Any, timeout_s: float = _CHECK_TIMEOUT_S, *, proves_writes: bool = False) -> Any:
        """`_bounded`, but never fails at once. proves_writes: whether a full Redis would refuse this call."""
        timeout_s = min(timeout_s, self._timeout_s)
        if self._is_away:
            self._next_trial = time.monotonic() + timeout_s + self._trial_pause_s
        call = asyncio.ensure_future(calling)
        self._calls.add(call)
        call.add_done_callback(self._call_ended)
        try:
            await asyncio.wait([call], timeout=timeout_s)
            if call.cancelled():
                # Another call has timed out and cancelled this one.
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

    def _call_ended(self, call: asyncio.Future[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            # Read the exception: asyncio would log it as unread if nobody waits for the call any more.
            call.exception()

    def _note_failure(self, error: Exception, timeout_s: float) -> None:
        problem = self._reason(error, timeout_s)
        if problem != self.problem:
            _LOGGER.error("session store %s fails: %s: %s", self.place, type(error).__name__, error)
            self.problem = problem
        # Redis did answer: it refused the command.
        if isinstance(error, redis.ResponseError):
            return
        self._next_trial = time.monotonic() + self._trial_pause_s
        self._trial_pause_s = min(2 * self._trial_pause_s, _TRIAL_PAUSE_S)
        if not self._is_away:
            self._is_away = True
            # Fail the other calls now: they would wait until their own timeouts, beyond their clients' deadlines.
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
    """The beginning of a principal's keys. The name is hashed: braces in it would change the hash slot of a cluster."""
    return "forwardpass:{" + hashlib.sha256(principal.encode()).hexdigest()[:32] + "}"
