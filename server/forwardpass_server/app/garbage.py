"""Keeps Python's garbage collector from what stays."""

from __future__ import annotations

import gc


def set_aside() -> None:
    """Collects what can be, and sets aside for good what there is.

    TensorFlow, Keras and all that was imported are some 340,000 objects that stay: looked at once more they hold up
    every call for a fifth of a second. A model that is set aside goes as any other does, without the collector's help
    (`models.runtime_functions`).
    """
    gc.collect()
    gc.freeze()


def collect() -> None:
    """Collects what the load of a model left behind. Looks at everything that is not set aside, so at little."""
    gc.collect()
