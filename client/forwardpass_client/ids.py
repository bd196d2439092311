"""Ids of weights and sessions as text."""

from __future__ import annotations


def parse(text: str, size_bytes: int, place: str) -> bytes:
    """The bytes of an id. Raises TypeError or ValueError, naming `place`, for what is none."""
    if not isinstance(text, str):
        raise TypeError(f"{place}: expected a str of {2 * size_bytes} hexadecimal digits, got {type(text).__name__}")
    try:
        parsed = bytes.fromhex(text)
    except ValueError:
        parsed = b""
    if len(parsed) != size_bytes:
        raise ValueError(f"{place}: expected {2 * size_bytes} hexadecimal digits, got {text[:80]!r}")
    return parsed
