"""Keeps Python's garbage collector from what stays."""

from __future__ import annotations

import gc

from forwardpass_server.calls.model import LoadedModel, ModelLoader, ModelSource
from forwardpass_server.process import allocator

# As many passes over middle-aged objects before one over all: more than any load brings about.
_NEVER = 2**30


class SparingLoader:
    """A loader that the collector leaves alone but for young objects: see ModelLoader.

    A load makes objects by ten thousands, for which the collector would look at all others of the load again. That
    takes long, and is for nothing: what a load leaves is garbage when it has ended.
    """

    def __init__(self, loader: ModelLoader) -> None:
        self._loader = loader

    def load(self, source: ModelSource) -> LoadedModel:
        young, middle, full = gc.get_threshold()
        gc.set_threshold(young, middle, _NEVER)
        try:
            return self._loader.load(source)
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
