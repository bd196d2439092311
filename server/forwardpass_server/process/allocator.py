"""Keeps freed memory in the process, where the next message needs it again, and gives back what a load has freed."""

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


def give_back() -> None:
    """Gives freed blocks back to the kernel. Does nothing where there is no glibc.

    A load frees several times the model's weights: zeros to try it on, and TensorFlow's copies of them. Calls do not
    need as much again. Takes 0.1 s for 1.2 GB; calls fault some pages in again afterwards.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
