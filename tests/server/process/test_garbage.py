"""The tuning of the garbage collector."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import textwrap

import pytest

from forwardpass_server.process import garbage

SCRIPT = """
    import gc, json, weakref
    import tensorflow as tf
    from forwardpass_server import functional_model_from_keras
    from forwardpass_server.process import garbage
    from forwardpass_server.app import parts
    from forwardpass_server.models.loading import TensorFlowLoader
    from forwardpass_server.calls.model import ModelSource
    from support import zoo

    made = []

    def factory():
        model = zoo.keras_cnn(seed=1)
        made.append(weakref.ref(model))
        spec = tf.TensorSpec([None, 6, 6, 1]), tf.TensorSpec([None, 5])
        return functional_model_from_keras(model, "mse", spec)

    def load():
        return loader.load(ModelSource("m", 1, factory="__main__:factory"))

    loader = TensorFlowLoader("cpu")
    imported = len(gc.get_objects())
    garbage.set_aside()
    first = load()
    execution = weakref.ref(first.execution)
    garbage.set_aside()
    del first
    kept = [load() for _ in range(3)]
    garbage.collect()
    print(json.dumps({
        "imported": imported,
        "looked at": len(gc.get_objects()),
        "what loads left": sum(model() is not None for model in made),
        "is unloaded": execution() is None,
    }))
"""


@garbage.young_only()
def litter() -> None:
    """Creates many objects, and fails."""
    _objects = [[[]] for _ in range(300_000)]
    raise KeyError("nothing in it")


def test_full_collections_are_disabled_inside_the_block_and_restored_after_an_error():
    passes = []

    def note(phase: str, about: dict[str, int]) -> None:
        if phase == "start":
            passes.append(about["generation"])

    before = gc.get_threshold()
    # Independent of the time since the last full collection.
    gc.collect()
    gc.callbacks.append(note)
    try:
        with pytest.raises(KeyError, match="nothing in it"):
            litter()
    finally:
        gc.callbacks.remove(note)
    assert set(passes) == {0, 1}
    assert gc.get_threshold() == before


def test_imports_are_not_scanned_again_and_garbage_of_loads_and_unloaded_models_is_freed():
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    found = json.loads(subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL))
    assert found["imported"] > 100_000
    assert found["looked at"] < 10_000
    assert found["what loads left"] == 0
    assert found["is unloaded"]
