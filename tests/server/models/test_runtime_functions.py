"""Loaded models: what stays of them, and what of it goes with them."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from forwardpass.wire.description import Function
from forwardpass_server import FunctionalModel
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.models import runtime_functions
from forwardpass_server.models.loading import TensorFlowLoader

SPEC = tf.TensorSpec([None], tf.float32)


@pytest.fixture(scope="module")
def loader():
    return TensorFlowLoader("cpu")


def branching() -> FunctionalModel:
    """Calls functions of its own: branches, a loop, and one by name."""

    @tf.function
    def halved_until_small(x):
        return tf.while_loop(lambda x: tf.reduce_max(x) > 1, lambda x: (x / 2,), (x,))[0]

    @tf.function
    def predict_on_batch(model_weights, x, training):
        return tf.cond(tf.reduce_max(x) < 0, lambda: x * model_weights[0][0], lambda: halved_until_small(x))

    return FunctionalModel(
        initial_weights=((np.float32(10),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output - label),
        input_spec=(SPEC, SPEC),
    )


called = []


def calling_python() -> FunctionalModel:
    def add_one(value):
        return value + 1

    @tf.function
    def predict_on_batch(model_weights, x, training):
        return tf.ensure_shape(tf.numpy_function(add_one, [x], tf.float32), [None])

    called.append(weakref.ref(add_one))

    return FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output - label),
        input_spec=(SPEC, SPEC),
    )


def count_graphs() -> int:
    gc.collect()
    return sum(isinstance(one, tf.Graph) for one in gc.get_objects())


def predictions(model, *leaves) -> list[float]:
    return model.run(Function.PREDICT_ON_BATCH, False, [np.float32(leaf) for leaf in leaves])[0].tolist()


def test_the_graphs_of_a_model_are_dropped_and_its_called_functions_are_kept(loader):
    source = ModelSource("branching", 1, factory=f"{__name__}:branching")
    # What all models share is traced with the first.
    loader.load(source)
    before = count_graphs()
    model = loader.load(source)
    assert count_graphs() == before
    assert predictions(model, 10, [-1, -2]) == [-10, -20]
    assert predictions(model, 10, [8, 4]) == [1, 0.5]


def test_an_unused_model_is_freed_without_the_garbage_collector(loader):
    # TensorFlow keeps a function for each kind of eager operation. The first load makes them.
    loader.load(ModelSource("branching", 1, factory=f"{__name__}:branching"))
    gc.collect()
    before = set(context.context().list_function_names())
    model = loader.load(ModelSource("branching", 1, factory=f"{__name__}:branching"))
    gc.collect()
    assert set(context.context().list_function_names()) > before
    execution, weights = weakref.ref(model.execution), weakref.ref(model.initial_weights[0])
    gc.disable()
    try:
        del model
        assert (execution(), weights()) == (None, None)
        assert set(context.context().list_function_names()) == before
    finally:
        gc.enable()


class _Allocated(ctypes.Structure):
    """What mallinfo2(3) returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", *(f"unused_{index}" for index in range(6)), "uordblks", "fordblks", "keepcost")
    ]


def native_bytes() -> int:
    """What malloc has given out and not got back: TensorFlow's objects, not Python's small ones."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Allocated
    found = mallinfo2()
    return found.uordblks + found.unused_3


def test_a_reload_does_not_leak_native_memory(loader, monkeypatch):
    monkeypatch.setattr(runtime_functions, "_MAX_STALE_KERNELS", 1)
    source = ModelSource("branching", 1, factory=f"{__name__}:branching")
    registry = Registry([source])

    def reload(times: int) -> int:
        for _ in range(times):
            registry.load(source, loader)
        assert predictions(registry.get("branching", 1).model, 10, [8, 4]) == [1, 0.5]
        gc.collect()
        return native_bytes()

    before = reload(20)
    # 500 KiB for each load where kernels stay in TensorFlow's cache; 5 KiB of TensorFlow's names and statistics else.
    assert (reload(20) - before) / 20 < 100 * 1024


def test_python_functions_of_a_model_live_as_long_as_the_model_and_not_as_its_load_thread(loader):
    loaded = []
    source = ModelSource("calling", 1, factory=f"{__name__}:calling_python")
    thread = threading.Thread(target=lambda: loaded.append(loader.load(source)))
    thread.start()
    thread.join()
    gc.collect()
    assert predictions(loaded[0], [1, 2]) == [2, 3]
    loaded.clear()
    gc.collect()
    assert [function() for function in called] == [None]
