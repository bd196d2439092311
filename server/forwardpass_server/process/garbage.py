"""Keeps Python's garbage collector from what stays."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from forwardpass_server.process import allocator

# As many passes over middle-aged objects before one over all: more than any load brings about.
_NEVER = 2**30


@contextlib.contextmanager
def young_only() -> Iterator[None]:
    """Makes the collector look at young and middle-aged objects only.

    For code that makes objects by ten thousands, such as the load of a model: a full pass would look at all of them,
    takes long, and finds little before that code has ended.
    """
    young, middle, full = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, full)


def set_aside() -> None:
    """Collects what can be, and sets aside for good what there is.

    TensorFlow, Keras and all that was imported are some 340,000 objects that stay: looked at once more they hold up
    every call for a fifth of a second. A model that is set aside goes as any other does, without the collector's help
    (`models.runtime_functions`).
    """
    gc.collect()
    gc.freeze()


def collect() -> None:
    """Collects what the load of a model left behind, and gives its memory back to the kernel.

    Looks at everything that is not set aside, so at little.
    """
    gc.collect()
    allocator.give_back()
