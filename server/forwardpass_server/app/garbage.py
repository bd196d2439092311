"""Keeps Python's garbage collector from what stays."""

from __future__ import annotations

import gc


def set_aside() -> None:
    """Collects what can be, and sets aside what there is from then on.

    TensorFlow and the models are hundreds of thousands of objects that stay: the collector would look at them again and
    again, while calls wait.
    """
    gc.collect()
    gc.freeze()


def look_again() -> None:
    """Collects what was set aside and is needed no more. Does nothing before anything was set aside."""
    if gc.get_freeze_count():
        gc.unfreeze()
        set_aside()
