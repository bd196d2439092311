"""Keeps freed memory in the process, where the next message needs it again."""

from __future__ import annotations

import ctypes
import logging

_LOGGER = logging.getLogger(__name__)

# Numbers of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

# Measured: glibc gives large blocks back to the kernel when they are freed. The next call of the same size faults each
# page in again, which for a message of 16 MB takes longer than moving it. Blocks above this size are left to it.
_KEPT_BLOCK_BYTES = 2**28
_KEPT_TOTAL_BYTES = 2**29


def keep_freed_memory() -> None:
    """Tells glibc's malloc to reuse freed blocks, and to hold up to 512 MiB of them. Does nothing elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES):
        _LOGGER.debug("this C library has no mallopt")
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT_TOTAL_BYTES)
    # Otherwise every thread that takes part keeps blocks of its own.
    mallopt(_M_ARENA_MAX, 1)
