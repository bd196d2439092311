"""Added, changed and removed versions of a repository while its models are served."""

from __future__ import annotations

import asyncio
import logging
import shutil

import pytest

from forwardpass_server.catalog import repository
from forwardpass_server.catalog.registry import State
from forwardpass_server.catalog.watch import RepositoryWatch
from support.repositories import Situation


@pytest.fixture
def situation(repository, tmp_path):
    situation = Situation(repository, tmp_path)
    situation.write("m", 1)
    return situation


async def watching(situation: Situation) -> RepositoryWatch:
    """A watch of a repository whose versions are all loaded."""
    situation.policies.refresh()
    known = situation.policies.served(repository.scan(situation.folder))
    for source in known:
        await situation.management.load(source.name, source.version)
    return RepositoryWatch(situation.management, situation.folder, situation.policies, known)


async def look(watch: RepositoryWatch, times: int = 2) -> None:
    for _ in range(times):
        await watch.look()


def test_an_unchanged_version_is_not_loaded_again(situation):
    async def run():
        watch = await watching(situation)
        await look(watch, 4)
        assert situation.loader.loads == ["m/1"]

    asyncio.run(run())


def test_a_new_version_is_loaded_when_its_files_are_stable_and_the_old_one_is_still_served(situation):
    async def run():
        watch = await watching(situation)
        folder = situation.write("m", 2)
        await watch.look()
        (folder / "more").touch()
        await watch.look()
        assert situation.loader.loads == ["m/1"]
        await watch.look()
        assert situation.states() == {"m/1": State.AVAILABLE, "m/2": State.AVAILABLE}
        assert situation.registry.get("m", 0).identity.version == 2

    asyncio.run(run())


def test_a_changed_version_is_reloaded_while_the_old_one_serves(situation):
    async def run():
        watch = await watching(situation)
        served = situation.registry.get("m", 1)
        situation.overwrite("m", 1)
        situation.loader.gate.clear()
        situation.loader.started.clear()
        looking = asyncio.ensure_future(look(watch))
        await asyncio.to_thread(situation.loader.started.wait, 30)
        assert situation.registry.get("m", 1) is served
        situation.loader.gate.set()
        await looking
        assert situation.registry.get("m", 1) is not served
        await look(watch)
        assert situation.loader.loads == ["m/1", "m/1"]

    asyncio.run(run())


def test_a_broken_change_keeps_the_served_version_is_reported_and_is_loaded_after_the_next_change(situation):
    async def run():
        watch = await watching(situation)
        served = situation.registry.get("m", 1)
        (situation.folder / "m" / "1" / "model").unlink()
        await look(watch, 4)
        (entry,) = situation.registry.entries()
        assert (entry.state, entry.servable) == (State.AVAILABLE, served)
        assert "KeyError" in entry.error
        assert len(situation.loader.loads) == 2
        situation.overwrite("m", 1)
        await look(watch)
        (entry,) = situation.registry.entries()
        assert entry.servable is not served
        assert entry.error == ""

    asyncio.run(run())


def test_a_removed_version_is_unloaded_and_loaded_again_when_its_files_return(situation):
    async def run():
        situation.write("m", 2)
        watch = await watching(situation)
        (situation.folder / "m" / "2").rename(situation.folder / "aside")
        await watch.look()
        assert len(situation.states()) == 2
        await watch.look()
        assert situation.states() == {"m/1": State.AVAILABLE}
        (situation.folder / "aside").rename(situation.folder / "m" / "2")
        await look(watch)
        assert len(situation.states()) == 2

    asyncio.run(run())


def test_a_version_that_an_operator_unloaded_stays_unloaded_until_its_files_change(situation):
    async def run():
        situation.write("m", 2)
        watch = await watching(situation)
        await situation.management.unload("m", 2)
        await look(watch, 3)
        assert situation.states() == {"m/1": State.AVAILABLE}
        situation.overwrite("m", 2)
        await look(watch)
        assert len(situation.states()) == 2

    asyncio.run(run())


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "empty"])
def test_a_missing_or_empty_repository_unloads_no_model(situation, caplog, is_gone):
    async def run():
        watch = await watching(situation)
        shutil.rmtree(situation.folder if is_gone else situation.folder / "m")
        await look(watch, 3)
        assert situation.states() == {"m/1": State.AVAILABLE}
        assert sum("stay in service" in record.message for record in caplog.records) == 1
        assert not watch.is_good

    asyncio.run(run())


def test_the_latest_versions_replace_former_ones_when_they_are_available(situation):
    async def run():
        situation.write("m", 2)
        situation.rule("m", serve={"latest": 1})
        watch = await watching(situation)
        assert situation.states() == {"m/2": State.AVAILABLE}
        (situation.write("m", 3) / "model").unlink()
        await look(watch, 4)
        assert situation.states() == {"m/2": State.AVAILABLE, "m/3": State.FAILED}
        situation.overwrite("m", 3)
        await look(watch)
        assert situation.states() == {"m/3": State.AVAILABLE}

    asyncio.run(run())


def test_labels_move_when_their_new_version_is_available(situation):
    async def run():
        situation.rule("m", serve=[1], labels={"stable": 1})
        watch = await watching(situation)
        await watch.look()
        assert situation.registry.labelled("m", "stable") == 1
        situation.rule("m", serve=[2], labels={"stable": 2})
        (situation.write("m", 2) / "model").unlink()
        await look(watch, 3)
        assert situation.registry.labelled("m", "stable") == 1
        assert situation.states()["m/1"] is State.AVAILABLE
        situation.overwrite("m", 2)
        await look(watch)
        assert situation.registry.labelled("m", "stable") == 2
        assert situation.states() == {"m/2": State.AVAILABLE}

    asyncio.run(run())


def test_an_unreadable_policy_changes_nothing_and_is_logged_once(situation, caplog):
    async def run():
        situation.write("m", 2)
        situation.rule("m", serve=[1], labels={"stable": 1})
        watch = await watching(situation)
        situation.rule("m", serve=[], labels={"stable": 2})
        await look(watch, 3)
        assert situation.states() == {"m/1": State.AVAILABLE}
        assert situation.registry.labelled("m", "stable") == 1
        assert sum("stay in use" in record.message for record in caplog.records) == 1

    asyncio.run(run())


def waiting(situation) -> dict[str, str]:
    """Why versions that are to be unloaded are still served."""
    return {str(entry.source): entry.waiting for entry in situation.registry.entries()}


@pytest.mark.parametrize("is_gone", [True, False], ids=["files gone", "against the policy"])
def test_a_version_with_sessions_is_unloaded_when_they_have_ended(situation, caplog, is_gone):
    async def run():
        situation.write("m", 2)
        situation.wait_for_sessions()
        watch = await watching(situation)
        situation.sessions["m/1"] = 2
        if is_gone:
            shutil.rmtree(situation.folder / "m" / "1")
        else:
            situation.rule("m", serve=[2])
        await look(watch, 3)
        situation.sessions["m/1"] = None
        await look(watch)
        assert "cannot reach" in waiting(situation)["m/1"]
        situation.sessions["m/1"] = 1
        await look(watch)
        assert situation.states() == {"m/1": State.AVAILABLE, "m/2": State.AVAILABLE}
        assert waiting(situation) == {
            "m/1": "to be unloaded; waits for its sessions: model m/1: expected no open metric sessions, got 1",
            "m/2": "",
        }
        situation.sessions["m/1"] = 0
        await watch.look()
        assert situation.states() == {"m/2": State.AVAILABLE}
        await look(watch)

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert sum("waits for its sessions" in record.message for record in caplog.records) == 1


def test_a_version_that_is_kept_for_its_sessions_is_served_again_if_the_policy_includes_it(situation):
    async def run():
        situation.write("m", 2)
        situation.wait_for_sessions()
        watch = await watching(situation)
        situation.sessions["m/1"] = 1
        situation.rule("m", serve=[2])
        await look(watch)
        assert waiting(situation)["m/1"]
        situation.rule("m", serve=[1, 2])
        await look(watch)
        assert waiting(situation) == {"m/1": "", "m/2": ""}
        assert situation.loader.loads == ["m/1", "m/2"]
        # An operator may unload it in the meantime.
        situation.rule("m", serve=[2])
        await look(watch)
        situation.sessions["m/1"] = 0
        await situation.management.unload("m", 1)
        situation.rule("m", serve=[1, 2])
        await look(watch)
        assert situation.states() == {"m/2": State.AVAILABLE}

    asyncio.run(run())


def test_a_version_that_an_operator_loads_against_the_policy_is_kept(situation):
    async def run():
        situation.write("m", 2)
        situation.rule("m", serve=[2])
        watch = await watching(situation)
        await situation.management.load("m", 1)
        await look(watch, 3)
        assert len(situation.states()) == 2

    asyncio.run(run())


def test_a_new_entry_that_is_skipped_is_logged_once(situation, caplog):
    (situation.folder / "before").symlink_to("gone")

    async def run():
        watch = await watching(situation)
        caplog.clear()
        (situation.folder / "after").symlink_to("gone")
        situation.write("other", 1)
        await look(watch, 4)
        assert situation.states() == {"m/1": State.AVAILABLE, "other/1": State.AVAILABLE}
        assert watch.is_good

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()] == [
        "model repository: after is skipped: it is a broken link"
    ]


def test_a_model_with_a_temporarily_unreadable_folder_is_still_served(situation):
    situation.write("other", 1)

    async def run():
        watch = await watching(situation)
        (situation.folder / "m").rename(situation.folder / ".m")
        # A folder that no user can read, not even root.
        (situation.folder / "m").symlink_to("m")
        await look(watch, 4)
        assert situation.states() == {"m/1": State.AVAILABLE, "other/1": State.AVAILABLE}
        (situation.folder / "m").unlink()
        await look(watch, 2)
        assert situation.states() == {"other/1": State.AVAILABLE}

    asyncio.run(run())
