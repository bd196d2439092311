"""Opens the session store that the operator chose."""

from __future__ import annotations

import contextlib
import os
import pathlib

from forwardpass.wire import errors
from forwardpass_server.app.settings import Settings, SettingsError
from forwardpass_server.errors import SessionStoreError
from forwardpass_server.sessions.store import SessionLimits, SessionObserver, SessionStore
from forwardpass_server.sessions.stores.memory import MemorySessionStore
from forwardpass_server.sessions.stores.sqlite import SqliteSessionStore

# For a client that asks why its session is gone.
_REMEMBER_S = 24 * 3600.0

_SQLITE = "sqlite://"


async def open_store(settings: Settings, observer: SessionObserver) -> SessionStore:
    """Raises SettingsError where a package is missing, and SessionStoreError for a store that cannot be used.

    One that is only away for now is no reason not to start.
    """
    limits = SessionLimits(
        max_sessions=settings.max_sessions,
        max_bytes=settings.sessions_bytes,
        idle_expiry_s=settings.session_expiry_s,
        remember_s=_REMEMBER_S,
    )
    url = settings.session_store
    if url is None and settings.port:
        return _open_default(f"sessions-{settings.port}.sqlite3", limits, observer)
    url = url or "memory://"
    if url.startswith(_SQLITE):
        return SqliteSessionStore(pathlib.Path(url.removeprefix(_SQLITE)), limits, observer)
    if url == "memory://":
        return MemorySessionStore(limits, observer)
    try:
        from forwardpass_server.sessions.stores.redis import RedisSessionStore
    except ModuleNotFoundError:
        raise SettingsError("--session-store: Redis needs a package: pip install 'forwardpass[redis]'") from None
    store = RedisSessionStore(url, limits, observer)
    with contextlib.suppress(errors.SessionStoreUnavailable):
        await store.check()
    return store


def _open_default(file_name: str, limits: SessionLimits, observer: SessionObserver) -> SessionStore:
    """The store in the user's state folder. Raises SettingsError where there is none, as in many containers."""
    try:
        return SqliteSessionStore(_state_folder() / file_name, limits, observer)
    except SessionStoreError as error:
        raise SettingsError(
            f"--session-store: the default file cannot be used: {error}: give sqlite:///PATH in a folder that this "
            "user may write to, or memory:// for sessions that end with the server"
        ) from None


def _state_folder() -> pathlib.Path:
    """Raises SessionStoreError for a user without a home. Source: the XDG base directory specification."""
    state = pathlib.Path(os.environ.get("XDG_STATE_HOME", ""))
    # The specification has relative paths ignored.
    if not state.is_absolute():
        try:
            state = pathlib.Path.home() / ".local" / "state"
        except RuntimeError:
            raise SessionStoreError("the user has no home folder, and HOME is not set") from None
    return state / "forwardpass"
