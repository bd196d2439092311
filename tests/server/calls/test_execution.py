"""Calls of real models: nothing is traced for any of them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from tensorflow.python.framework import func_graph

from forwardpass.wire import errors
from forwardpass.wire.description import Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.admission import Admission, Limits
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.calls.batching import Batcher
from forwardpass_server.calls.execution import Executor, Invocation
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.calls.scheduling import Scheduler
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.models.placement import TensorFlowDevice
from forwardpass_server.weights.store import StoreOptions, WeightStore
from support import zoo
from support.metric_sessions import given


class Batches:
    def __init__(self):
        self.seen = []

    def batch(self, model, function, examples):
        self.seen.append((model, function, examples))

    def call_ran(self, model, function, arrived, began, ended):
        assert arrived <= began <= ended


@pytest.fixture(scope="module")
def registry(repository):
    source = ModelSource("keras_cnn", 1, folder=repository / "keras_cnn" / "1")
    registry = Registry([source])
    registry.load(source, TensorFlowLoader("cpu"))
    return registry


def parts_for(registry, x, y):
    model = registry.get("keras_cnn", 1).model
    spec = model.description.spec
    parts = spec.weights_parts(Structure(spec.weights.tree, model.initial_weights))
    return {**parts, "batch_input.x": Structure.of(x), "batch_input.y": Structure.of(y)}


def test_no_call_builds_a_graph(registry, monkeypatch):
    # Counted where TensorFlow makes every graph of a function, apart from our own counter.
    built = []
    original = func_graph.FuncGraph.__init__

    def counted(self, *args, **kwargs):
        built.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(func_graph.FuncGraph, "__init__", counted)
    observer = Batches()

    async def run() -> None:
        scheduler = Scheduler(2)
        store = WeightStore(StoreOptions(budget_bytes=0), TensorFlowDevice("/device:CPU:0"), None)
        limits = Limits(calls=10, size_bytes=1000)
        admission = Admission(limits, limits)
        executor = Executor(store, scheduler, Batcher(scheduler, Arrivals(), observer, 10), observer, admission)
        servable = registry.get("keras_cnn", 1)
        for size in range(200):
            parts = parts_for(registry, *zoo.keras_batch(size))
            for training in (True, False):
                invocation = Invocation(Function.FORWARD_PASS, parts, 100, training)
                found = await executor.admit_and_run(servable, "", 100, given(invocation))
                assert found["batch_output.predictions"].leaves[0].shape == (size, 5)
        await scheduler.close(10)

    asyncio.run(run())
    assert built == []
    assert observer.seen == [("keras_cnn", Function.FORWARD_PASS, size) for size in range(200) for _ in range(2)]


def test_arguments_are_flat_and_in_the_models_order(registry):
    servable = registry.get("keras_cnn", 1)
    spec = servable.model.description.spec
    x, y = zoo.keras_batch(3)
    leaves = servable.plan(Function.FORWARD_PASS, True).flatten(parts_for(registry, x, y))
    assert len(leaves) == len(spec.weights.leaves) + 2
    assert leaves[-2].shape == x.shape
    assert leaves[-1].shape == y.shape


@pytest.mark.parametrize("value", [None, "absent"])
def test_a_field_that_no_metric_reads_can_be_none_or_absent(registry, value):
    servable = registry.get("keras_cnn", 1)
    spec = servable.model.description.spec
    state = [np.zeros((), np.float32)] * len(spec.metrics_state.leaves)
    parts = {
        "state": Structure(spec.metrics_state.tree, state),
        "labels": Structure.of(np.int64([1])),
        "batch_output.predictions": Structure.of(np.zeros((1, 5), np.float32)),
    }
    if value is None:
        parts["batch_output.loss"] = parts["batch_output.num_examples"] = Structure.of(None)
    leaves = servable.plan(Function.UPDATE_METRICS_STATE).flatten(parts)
    assert len(leaves) == len(state) + 4


def test_an_argument_that_the_function_reads_cannot_be_none(registry):
    plan = registry.get("keras_cnn", 1).plan(Function.LOSS)
    with pytest.raises(errors.StructureMismatch, match=r"output: expected float32\[None,5\], got None"):
        plan.flatten({"output": Structure.of(None), "label": Structure.of(np.int64([1]))})
