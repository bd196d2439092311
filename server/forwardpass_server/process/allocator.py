"""Tunes glibc's malloc: keeps freed memory for the next message, and returns memory to the kernel after a load."""

from __future__ import annotations

import ctypes
import logging

_LOGGER = logging.getLogger(__name__)

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

# By default glibc returns a large block to the kernel when it is freed. The next call of the same size then faults in
# each page again: for a message of 16 MB that takes longer than copying it (measured). Blocks up to this size are kept.
_KEPT_BLOCK_BYTES = 2**28
_KEPT_TOTAL_BYTES = 2**29


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep up to 512 MiB of freed blocks for reuse. Does nothing with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES):
        _LOGGER.debug("the C library has no mallopt: freed memory is not kept")
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT_TOTAL_BYTES)
    # One arena: otherwise each thread keeps freed blocks of its own.
    mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Returns freed blocks to the kernel. Does nothing with another C library than glibc.

    The load of a model frees several times the size of its weights (zeros for trial calls, and TensorFlow's copies),
    more than calls need later. Takes 0.1 s for 1.2 GB; the next calls fault in some pages again.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
