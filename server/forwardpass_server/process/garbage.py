"""Tunes Python's garbage collector: short pauses during calls and loads."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from forwardpass_server.process import allocator

# Passes over the middle generation before a full pass: more than any load causes.
_NEVER = 2**30


@contextlib.contextmanager
def young_only() -> Iterator[None]:
    """Disables full collections; the young and the middle generation are still collected.

    For code that creates tens of thousands of objects, such as the load of a model: a full collection would scan all of
    them, take long, and free little before that code has ended.
    """
    young, middle, full = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, full)


def set_aside() -> None:
    """Collects garbage, then excludes all present objects from later collections (gc.freeze).

    TensorFlow, Keras and the other imports are some 340,000 permanent objects: scanning them delays every call by 0.2
    s. A model that is unloaded later is still freed: its memory does not depend on the collector
    (`models.runtime_functions`).
    """
    gc.collect()
    gc.freeze()


def collect() -> None:
    """Collects the garbage of a model's load, and returns its memory to the kernel.

    Fast, because it scans only objects that `set_aside` has not excluded.
    """
    gc.collect()
    allocator.trim()
