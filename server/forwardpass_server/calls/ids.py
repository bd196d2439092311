"""Ids that clients choose: of sessions, writers, updates and batches."""

from __future__ import annotations

from forwardpass.wire import errors

ID_BYTES = 16


def check(value: bytes, place: str) -> None:
    """Raises InvalidRequest for an id of another length. place: the field that holds it."""
    if len(value) != ID_BYTES:
        raise errors.InvalidRequest(place=place, expected=f"{ID_BYTES} bytes", found=f"{len(value)}")
