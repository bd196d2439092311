"""The trainers that a loaded model keeps: prepared at its load, on demand, and dropped beyond a bound."""

from __future__ import annotations

import json
import pathlib
import threading
import weakref
from typing import Any

import keras
import numpy as np
import pytest

from forwardpass.wire import errors
from forwardpass.wire import optimizers as wire
from forwardpass_server.calls.model import ModelSource, TrainingOptions
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import trainers
from forwardpass_server.models.loading import TensorFlowLoader, TensorFlowModel


def options(optimizer: Any, **others: Any) -> TrainingOptions:
    return TrainingOptions(optimizer=wire.canonical(optimizer).text, **others)


def folder_of(path: pathlib.Path, **config: Any) -> pathlib.Path:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    path.mkdir(exist_ok=True)
    model.save(path / "model.keras")
    (path / "forwardpass.json").write_text(json.dumps(config))
    return path


TRACES: list[None] = []


@pytest.fixture(scope="module")
def loader() -> TensorFlowLoader:
    return TensorFlowLoader("cpu", lambda: TRACES.append(None))


def loaded(loader: TensorFlowLoader, path: pathlib.Path, **config: Any) -> TensorFlowModel:
    return loader.load(ModelSource("model", 1, folder_of(path / "1", **config)))


@pytest.fixture
def model(loader: TensorFlowLoader, tmp_path: pathlib.Path) -> TensorFlowModel:
    return loaded(loader, tmp_path, optimizers=["sgd"])


def test_a_load_prepares_the_default_optimizers(loader, tmp_path):
    model = loaded(loader, tmp_path)
    assert model.description.optimizers == (
        '{"class_name":"SGD","config":{}}',
        '{"class_name":"SGD","config":{"momentum":0.9}}',
        '{"class_name":"Adam","config":{}}',
    )
    before = len(TRACES)
    for optimizer in model.description.optimizers:
        trainer = model.trainer(TrainingOptions(optimizer=optimizer))
        state = trainer.begin(model.initial_weights)
        state = trainer.step(state, [np.ones((4, 2), np.float32), np.ones((4, 1), np.float32)], 0.1, 0.0, ())
        assert trainer.totals(state).num_examples == 4
    assert len(TRACES) == before


def test_a_load_prepares_the_optimizers_that_the_operator_names(loader, tmp_path):
    lion = {"class_name": "Lion", "config": {"learning_rate": 0.5, "beta_1": 0.8}}
    model = loaded(loader, tmp_path, optimizers=["adam", lion])
    assert model.description.optimizers == (
        '{"class_name":"Adam","config":{}}',
        '{"class_name":"Lion","config":{"beta_1":0.8}}',
    )
    assert model.trainer(options("sgd")) is None


@pytest.mark.parametrize("config", [{"optimizers": []}, {"gradients": False}])
def test_an_operator_can_name_no_optimizers(loader, tmp_path, config):
    assert loaded(loader, tmp_path, **config).description.optimizers == ()


def test_a_model_without_gradients_has_no_trainer(loader, tmp_path):
    model = loaded(loader, tmp_path, gradients=False)
    with pytest.raises(errors.FunctionNotAvailable, match=r"the model cannot be trained: the operator forbids it"):
        model.prepare_trainer(options("sgd"))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"optimizers": "sgd"}, "forwardpass.json: optimizers: expected an array, got str"),
        ({"optimizers": [1]}, r"forwardpass.json: optimizers\[0\]: expected a name or a Keras configuration, got int"),
        ({"optimizers": ["mine"]}, r"forwardpass.json: optimizers\[0\].class_name: expected one of Adadelta, "),
        ({"optimizers": ["sgd", "ScheduleFreeAdamW"]}, "ScheduleFreeAdamW is not supported: "),
        ({"optimizers": [{"class_name": "SGD", "config": {"typo": 1}}]}, "optimizer.config: expected keys among"),
        ({"optimizers": ["sgd"], "gradients": False}, "optimizers: the model has no gradients"),
    ],
)
def test_optimizers_that_cannot_be_prepared_fail_the_load(loader, tmp_path, config, message):
    with pytest.raises((ModelLoadError, errors.OptimizerNotSupported), match=message):
        loaded(loader, tmp_path, **config)


def test_a_trainer_is_prepared_once_for_all_spellings_of_its_options(model):
    adam = options("adam")
    assert model.trainer(adam) is None
    before = len(TRACES)
    trainer = model.prepare_trainer(adam)
    assert len(TRACES) > before
    after = len(TRACES)
    assert model.trainer(adam) is model.prepare_trainer(adam) is trainer
    explicit = options({"class_name": "Adam", "config": {"beta_1": 0.9}})
    assert model.prepare_trainer(explicit) is model.trainer(explicit) is trainer
    assert len(TRACES) == after


def test_a_prepared_optimizer_is_found_in_another_spelling_without_a_trace(model):
    kept, before = model.trainer(options("sgd")), len(TRACES)
    # A Keras optimizer writes all of its options.
    assert model.trainer(options(keras.optimizers.serialize(keras.optimizers.SGD(0.5)))) is kept
    partial = options({"class_name": "SGD", "config": {"momentum": 0.0}})
    assert model.trainer(partial) is None
    assert model.find_trainer(partial) is kept
    assert model.trainer(partial) is kept
    assert model.find_trainer(options({"class_name": "SGD", "config": {"momentum": 0.5}})) is None
    with pytest.raises(errors.OptimizerNotSupported, match="keys among"):
        model.find_trainer(options({"class_name": "SGD", "config": {"typo": 1}}))
    assert len(TRACES) == before


def test_threads_that_ask_for_one_trainer_get_the_same(model):
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(model.prepare_trainer(options("adam", proximal=True))))
        for _ in range(4)
    ]
    before = len(TRACES)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
    # The step, its first state, and the comparison with Keras: two graphs, unless another test has made it.
    assert len(TRACES) - before <= 4


def test_the_trainers_that_were_used_longest_ago_are_dropped(model, monkeypatch):
    monkeypatch.setattr(trainers, "_MAX_OTHERS", 2)
    masks = [(True, True), (True, False), (False, True)]
    wanted = [options("sgd", proximal=True, trainable=mask) for mask in masks]
    first = weakref.ref(model.prepare_trainer(wanted[0]))
    model.prepare_trainer(wanted[1])
    assert model.trainer(wanted[0]) is first()
    model.prepare_trainer(wanted[2])
    assert [model.trainer(one) is not None for one in wanted] == [True, False, True]
    assert model.trainer(options("sgd")) is not None
    model.prepare_trainer(wanted[1])
    model.prepare_trainer(wanted[2])
    assert model.trainer(wanted[0]) is None
    # Its graphs are gone without the garbage collector.
    assert first() is None
