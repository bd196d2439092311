"""Load, reload and unload of versions while others are served."""

from __future__ import annotations

import asyncio

import pytest

from forwardpass.wire import errors
from forwardpass_server.catalog.registry import State
from support.repositories import Situation


@pytest.fixture
def situation(repository, tmp_path):
    return Situation(repository, tmp_path)


def test_a_new_version_is_loaded_once(situation):
    async def run():
        situation.write("m", 1)
        situation.write("m", 2)
        loaded = await situation.management.load("m", 0)
        assert loaded.source.version == 2
        await situation.management.load("m", 2)
        assert situation.loader.loads == situation.changes == ["m/2"]
        assert situation.registry.get("m", 0).identity.version == 2

    asyncio.run(run())


def test_a_failed_load_is_an_error_and_can_be_repeated(situation):
    async def run():
        folder = situation.write("m", 1)
        (folder / "model").unlink()
        with pytest.raises(
            errors.ModelFailed, match="model m/1 failed to load: KeyError: the server's log has the traceback"
        ):
            await situation.management.load("m", 1)
        assert situation.states() == {"m/1": State.FAILED}
        (folder / "model").touch()
        await situation.management.load("m", 1)
        assert situation.states() == {"m/1": State.AVAILABLE}

    asyncio.run(run())


def test_a_failed_reload_keeps_the_served_version(situation):
    async def run():
        folder = situation.write("m", 1)
        await situation.management.load("m", 1)
        served = situation.registry.get("m", 1)
        (folder / "model").unlink()
        with pytest.raises(errors.ModelFailed):
            await situation.management.reload("m", 1)
        assert situation.registry.get("m", 1) is served
        (folder / "model").touch()
        await situation.management.reload("m", 1)
        assert situation.registry.get("m", 1) is not served

    asyncio.run(run())


def test_unload_is_idempotent_and_can_be_undone(situation):
    async def run():
        situation.write("m", 1)
        await situation.management.load("m", 1)
        for _ in range(2):
            await situation.management.unload("m", 1)
        assert situation.states() == {}
        assert situation.changes == ["m/1", "m/1"]
        await situation.management.load("m", 1)
        assert situation.states() == {"m/1": State.AVAILABLE}

    asyncio.run(run())


def test_a_version_with_sessions_is_not_unloaded_under_refuse(situation):
    async def run():
        situation.write("m", 1)
        situation.wait_for_sessions()
        await situation.management.load("m", 1)
        served = situation.registry.get("m", 1)
        situation.sessions["m/1"] = 3
        with pytest.raises(errors.ModelInUse, match="model m/1: expected no open metric sessions, got 3"):
            await situation.management.unload("m", 1)
        situation.sessions["m/1"] = None
        with pytest.raises(errors.SessionStoreUnavailable):
            await situation.management.unload("m", 1)
        assert situation.registry.get("m", 1) is served
        situation.sessions["m/1"] = 0
        for _ in range(2):
            await situation.management.unload("m", 1)
        assert situation.states() == {}
        assert situation.changes == ["m/1", "m/1"]

    asyncio.run(run())


def test_an_unloaded_or_replaced_model_is_kept_for_its_sessions(situation):
    async def run():
        situation.write("m", 1)
        served = []
        await situation.management.load("m", 1)
        for change in (situation.management.reload, situation.management.unload):
            served.append(situation.registry.get("m", 1))
            await change("m", 1)
            assert situation.sessions.left == served
        await situation.management.unload("m", 1)
        assert situation.sessions.left == served

    asyncio.run(run())


def test_a_version_that_is_not_available_is_unloaded_despite_sessions(situation):
    async def run():
        (situation.write("m", 1) / "model").unlink()
        situation.wait_for_sessions()
        situation.sessions["m/1"] = 3
        with pytest.raises(errors.ModelFailed):
            await situation.management.load("m", 1)
        await situation.management.unload("m", 1)
        assert situation.states() == {}

    asyncio.run(run())


def test_load_reads_labels_from_the_file_and_unload_from_the_registry(situation):
    async def run():
        for version in (1, 2):
            situation.write("m", version)
        situation.rule("m", labels={"canary": 1})
        assert (await situation.management.load("m", 0, "canary")).labels == ["canary"]
        situation.rule("m", labels={"canary": 2})
        (situation.folder / "m" / "2" / "model").unlink()
        with pytest.raises(errors.ModelFailed, match="model m/2 failed to load"):
            await situation.management.load("m", 0, "canary")
        # The new version is not available, so the label has not moved: the version that it still stands for is
        # unloaded.
        assert situation.registry.labelled("m", "canary") == 1
        await situation.management.unload("m", 0, "canary")
        assert situation.states() == {"m/2": State.FAILED}
        with pytest.raises(errors.ModelVersionNotFound, match="label of model 'm': expected one of canary, got 'none'"):
            await situation.management.reload("m", 0, "none")

    asyncio.run(run())


def test_loads_run_one_after_another_and_survive_cancellation(situation):
    async def run():
        for version in (1, 2):
            situation.write("m", version)
        situation.loader.gate.clear()
        asked = [asyncio.ensure_future(situation.management.load("m", version)) for version in (1, 2)]
        await asyncio.to_thread(situation.loader.started.wait, 30)
        assert situation.states() == {"m/1": State.LOADING}
        assert situation.management.is_loading
        asked[0].cancel()
        situation.loader.gate.set()
        await asked[1]
        assert not situation.management.is_loading
        assert situation.states() == {"m/1": State.AVAILABLE, "m/2": State.AVAILABLE}

    asyncio.run(run())


@pytest.mark.parametrize("name", ["other", "../m", "m/1", ".", "a\0b", "/"])
def test_a_model_that_the_repository_lacks_is_not_found(situation, name):
    situation.write("m", 1)
    for method in (situation.management.load, situation.management.reload):
        with pytest.raises(errors.ModelNotFound, match="model: expected the name of a model in the repository, got "):
            asyncio.run(method(name, 1))
    with pytest.raises(errors.ModelVersionNotFound, match="version of model 'm': expected one of 1, got 7"):
        asyncio.run(situation.management.load("m", 7))
    assert situation.changes == []


def test_loaded_and_loadable_versions_are_described(situation):
    async def run():
        for version in (1, 2):
            situation.write("m", version)
        await situation.management.load("m", 2)
        (situation.folder / "m" / "2").rename(situation.folder / "gone")
        found = await situation.management.describe()
        assert [(one.source.version, one.entry is not None, one.is_loadable) for one in found] == [
            (1, False, True),
            (2, True, False),
        ]

    asyncio.run(run())
