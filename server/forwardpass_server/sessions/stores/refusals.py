"""The errors that all session stores raise."""

from __future__ import annotations

from forwardpass.wire import errors
from forwardpass_server.sessions.store import SessionKey, SessionLimits


def not_found(key: SessionKey) -> errors.SessionNotFound:
    """The error for a session that the store does not know, not even as one that has ended."""
    return errors.SessionNotFound(
        f"there is no metrics session {key.session_id.hex()}: it was never opened, was closed, or expired long ago"
    )


def ended(key: SessionKey, is_expired: bool) -> errors.SessionNotFound:
    """The error for a session that is known to have ended."""
    if is_expired:
        return errors.SessionExpired(
            f"metrics session {key.session_id.hex()} was idle for too long and was deleted: open a new one"
        )
    return errors.SessionNotFound(f"metrics session {key.session_id.hex()} was closed")


def check_room(limits: SessionLimits, sessions: int, size_bytes: int) -> None:
    """Raises SessionLimitExceeded if the sessions of a principal, or their bytes, exceed its limits."""
    if sessions > limits.max_sessions:
        raise errors.SessionLimitExceeded(
            place="open metrics sessions", expected=f"at most {limits.max_sessions}", found=f"{sessions}"
        )
    if size_bytes > limits.max_bytes:
        raise errors.SessionLimitExceeded(
            place="bytes of metrics sessions", expected=f"at most {limits.max_bytes}", found=f"{size_bytes}"
        )
