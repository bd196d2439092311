"""The registry: versions, states and errors."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import pytest

from forwardpass.wire import errors
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog.registry import Registry, State
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models.loading import TensorFlowLoader, TensorFlowModel

SOURCES = [ModelSource("m", version, folder=pathlib.Path()) for version in (1, 2, 3)]


@pytest.fixture(scope="module", autouse=True)
def model(repository):
    """One real model that is used for every version."""
    Loader.model = TensorFlowLoader("cpu").load(ModelSource("m", 1, folder=repository / "no_metrics" / "1"))


class Loader:
    """Returns the model with the requested version; raises for the versions that are to fail."""

    model: TensorFlowModel

    def __init__(self, failing=()):
        self.failing = failing

    def load(self, source):
        if source.version in self.failing:
            raise ModelLoadError("no good")
        identity = dataclasses.replace(self.model.description.identity, version=source.version)
        return dataclasses.replace(
            self.model, description=dataclasses.replace(self.model.description, identity=identity)
        )


def loaded(*versions: int, failing=()) -> Registry:
    registry = Registry(SOURCES)
    for source in SOURCES:
        if source.version in (*versions, *failing):
            registry.load(source, Loader(failing))
    return registry


@pytest.mark.parametrize(
    "available, failing, version, found",
    [((1, 2, 3), (), 0, 3), ((1, 2, 3), (), 2, 2), ((1, 2), (3,), 0, 2), ((1,), (), 0, 1)],
)
def test_without_a_version_the_highest_available_one_is_used(available, failing, version, found):
    assert loaded(*available, failing=failing).get("m", version).identity.version == found


@pytest.mark.parametrize(
    "available, failing, version, error, message",
    [
        ((), (), 0, errors.ModelLoading, "model m/3 is still being loaded"),
        ((1,), (), 2, errors.ModelLoading, "model m/2 is still being loaded"),
        ((1,), (2,), 2, errors.ModelFailed, "model m/2 failed to load: no good"),
        ((), (1, 2, 3), 0, errors.ModelFailed, "model m/3 failed to load: no good"),
        ((1,), (), 7, errors.ModelVersionNotFound, "expected one of 1, 2, 3, got 7"),
    ],
)
def test_a_version_that_is_not_available_raises_the_reason(available, failing, version, error, message):
    with pytest.raises(error, match=message):
        loaded(*available, failing=failing).get("m", version)


def test_an_empty_server_says_that_it_has_no_model():
    with pytest.raises(errors.ModelNotFound, match="expected no model: the server has none, got 'm'"):
        Registry([]).get("m", 0)


def test_a_long_unknown_name_is_cut_in_the_error():
    with pytest.raises(errors.ModelNotFound) as caught:
        loaded(1).get("x" * 10_000, 0)
    assert len(str(caught.value)) < 300


def test_states_are_counted():
    registry = loaded(1, failing=[2])
    assert [registry.count(state) for state in (State.AVAILABLE, State.FAILED, State.LOADING)] == [1, 1, 1]
    assert registry.is_available("m")
    assert not registry.is_available("other")


def test_a_factory_that_raises_system_exit_fails_its_model_only():
    class Ending:
        def load(self, source):
            sys.exit(0)

    registry = Registry(SOURCES[:1])
    registry.load(SOURCES[0], Ending())
    assert registry.entry(SOURCES[0]).state is State.FAILED


def test_the_message_of_an_unexpected_error_is_only_logged():
    class Broken:
        def load(self, source):
            raise KeyError("x")

    registry = Registry(SOURCES[:1])
    registry.load(SOURCES[0], Broken())
    assert registry.entry(SOURCES[0]).error == "KeyError: the server's log has the traceback"


def test_a_failed_reload_keeps_the_loaded_version():
    registry = loaded(1)
    before = registry.get("m", 1)
    assert registry.load(SOURCES[0], Loader(failing=[1])).state is State.FAILED
    assert registry.get("m", 1) is before
    assert registry.load(SOURCES[0], Loader()).state is State.AVAILABLE
    assert registry.get("m", 1) is not before


def test_a_new_version_is_loaded_and_unloaded():
    registry = Registry([])
    registry.load(SOURCES[1], Loader())
    assert registry.get("m", 0).identity.version == 2
    assert registry.unload("m", 2)
    assert not registry.unload("m", 2)
    with pytest.raises(errors.ModelNotFound):
        registry.get("m", 0)


def test_unloading_a_version_does_not_affect_another_one():
    registry = loaded(1, 2)
    assert registry.unload("m", 2)
    assert registry.get("m", 0).identity.version == 1
    with pytest.raises(errors.ModelVersionNotFound):
        registry.get("m", 2)
