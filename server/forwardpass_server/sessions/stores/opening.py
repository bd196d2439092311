"""Opens the session store that the operator chose."""

from __future__ import annotations

import contextlib
import os
import pathlib

from forwardpass.wire import errors
from forwardpass_server.errors import SessionStoreError, SettingsError
from forwardpass_server.sessions.store import SessionLimits, SessionObserver, SessionStore
from forwardpass_server.sessions.stores.memory import MemorySessionStore
from forwardpass_server.sessions.stores.sqlite import SqliteSessionStore

_SQLITE = "sqlite://"


async def open_store(
    url: str | None, default_file: str | None, limits: SessionLimits, observer: SessionObserver
) -> SessionStore:
    """The store of a URL.

    url: sqlite:///PATH, redis://..., rediss://... or memory://; None for the default file.
    default_file: its name in the user's state folder; None for a store in memory.
    Raises SettingsError where a package is missing, and SessionStoreError for a store that cannot be used. A Redis that
    does not answer is no error: the server starts, and reports that it is not ready.
    """
    if url is None and default_file is not None:
        return _open_default(default_file, limits, observer)
    url = url or "memory://"
    if url.startswith(_SQLITE):
        return SqliteSessionStore(pathlib.Path(url.removeprefix(_SQLITE)), limits, observer)
    if url == "memory://":
        return MemorySessionStore(limits, observer)
    try:
        from forwardpass_server.sessions.stores.redis import RedisSessionStore
    except ModuleNotFoundError:
        raise SettingsError(
            "--session-store: the Redis client is not installed: pip install 'forwardpass[redis]'"
        ) from None
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
    """Raises SessionStoreError for a user without a home folder. Source: the XDG base directory specification."""
    state = pathlib.Path(os.environ.get("XDG_STATE_HOME", ""))
    # The specification says that relative paths are to be ignored.
    if not state.is_absolute():
        try:
            state = pathlib.Path.home() / ".local" / "state"
        except RuntimeError:
            raise SessionStoreError("the user has no home folder, and HOME is not set") from None
    return state / "forwardpass"
