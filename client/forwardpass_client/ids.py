"""Ids as people pass them on: hexadecimal digits."""

from __future__ import annotations


def parse(text: str, size_bytes: int, place: str) -> bytes:
    """The bytes of an id. Raises ValueError, naming `place`, for what is none."""
    try:
        parsed = bytes.fromhex(text)
    except ValueError:
        parsed = b""
    if len(parsed) != size_bytes:
        raise ValueError(f"{place}: expected {2 * size_bytes} hexadecimal digits, got {text[:80]!r}")
    return parsed
