"""The local copy of a model repository with a URL."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from forwardpass_server.catalog import mirror as repository_mirror
from forwardpass_server.catalog import repository, upload, version_policy
from forwardpass_server.catalog.mirror import RepositoryMirror
from forwardpass_server.catalog.upload import COMPLETE


@pytest.fixture
def store(places):
    return places.make().store()


@pytest.fixture
def mirror(store, tmp_path):
    made = RepositoryMirror(store, tmp_path / "cache")
    yield made
    made.close()


def write(store, version: str, **files: str) -> None:
    """Uploads a version as `forwardpass-server upload` does."""
    contents = {}
    for name, text in files.items():
        store.write(f"{version}/{name}", text.encode())
        digest = repository_mirror.hashlib.sha256(text.encode()).hexdigest()
        contents[name] = {"size_bytes": len(text.encode()), "sha256": digest}
    store.write(f"{version}/{COMPLETE}", json.dumps({"files": contents}).encode())


def copied(mirror: RepositoryMirror) -> dict[str, dict[str, str]]:
    """The files of each copied version."""
    return {
        str(source): {
            path.relative_to(source.folder).as_posix(): path.read_text() for path in repository.files_in(source.folder)
        }
        for source in repository.scan(mirror.folder)
    }


def test_versions_are_copied_with_their_files(store, mirror):
    write(store, "digits/1", graph="one")
    write(store, "digits/2", graph="two", weights="2" * 100)
    write(store, "words/7", graph="")
    mirror.refresh()
    assert copied(mirror) == {
        "digits/1": {"graph": "one"},
        "digits/2": {"graph": "two", "weights": "2" * 100},
        "words/7": {"graph": ""},
    }


def test_an_uploaded_folder_is_copied(places, tmp_path):
    place = places.make()
    folder = tmp_path / "version"
    (folder / "variables").mkdir(parents=True)
    # Longer than one part.
    (folder / "variables" / "data").write_bytes(os.urandom(20 * 2**20))
    target = type(place)(f"{place.url}/digits/3", place.environment, place.s3).store()
    upload.upload(folder, target)
    made = RepositoryMirror(place.store(), tmp_path / "cache")
    made.refresh()
    copy = made.folder / "digits" / "3" / "variables" / "data"
    assert copy.read_bytes() == (folder / "variables" / "data").read_bytes()
    made.close()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_version_without_its_mark_is_not_copied(store, mirror, caplog):
    write(store, "digits/1", graph="one")
    store.write("digits/2/graph", b"two")
    for _ in range(2):
        mirror.refresh()
    assert list(copied(mirror)) == ["digits/1"]
    # Told once, not at each refresh.
    assert (
        caplog.messages.count(
            f"model repository: digits/2 is skipped: it has no {COMPLETE}, so its upload has not ended"
        )
        == 1
    )
    store.write(f"digits/2/{COMPLETE}", b"")
    mirror.refresh()
    assert copied(mirror)["digits/2"] == {"graph": "two"}


@pytest.mark.parametrize("how", ["missing", "shorter", "other bytes"])
def test_files_that_are_not_as_listed_are_not_served(store, mirror, caplog, how):
    write(store, "digits/1", graph="one")
    mirror.refresh()
    write(store, "digits/1", graph="another")
    match how:
        case "missing":
            store.remove("digits/1/graph")
        case "shorter":
            store.write("digits/1/graph", b"anothe")
        case "other bytes":
            store.write("digits/1/graph", b"Another")
    mirror.refresh()
    # The former copy stays.
    assert copied(mirror) == {"digits/1": {"graph": "one"}}
    assert any(
        "digits/1 cannot be copied, and is tried again: digits/1/graph" in message for message in caplog.messages
    )
    store.write("digits/1/graph", b"another")
    mirror.refresh()
    assert copied(mirror) == {"digits/1": {"graph": "another"}}


def test_a_changed_version_is_replaced_when_its_mark_changes(store, mirror):
    write(store, "digits/1", graph="one")
    mirror.refresh()
    before = repository.file_states(mirror.folder / "digits" / "1")
    # In the middle of the upload of its replacement.
    store.remove(f"digits/1/{COMPLETE}")
    store.write("digits/1/graph", b"two")
    mirror.refresh()
    assert copied(mirror) == {"digits/1": {"graph": "one"}}
    assert repository.file_states(mirror.folder / "digits" / "1") == before
    write(store, "digits/1", graph="two")
    mirror.refresh()
    assert copied(mirror) == {"digits/1": {"graph": "two"}}
    assert repository.file_states(mirror.folder / "digits" / "1") != before
    # The former copy is deleted by the next refresh.
    mirror.refresh()
    assert len([path for path in (mirror.folder / ".versions").iterdir() if path.is_dir()]) == 1


def test_a_version_that_changes_during_the_copy_is_copied_later(store, mirror, caplog):
    write(store, "digits/1", graph="one", weights="1")

    class Changing:
        def __getattr__(self, name):
            return getattr(store, name)

        def read_into(self, name, start, buffer):
            if name.endswith("graph"):
                store.write("digits/1/weights", b"2")
            return store.read_into(name, start, buffer)

    mirror._store = Changing()
    mirror.refresh()
    assert copied(mirror) == {}
    assert list((mirror.folder / ".versions").iterdir()) == []
    mirror._store = store
    write(store, "digits/1", graph="one", weights="2")
    mirror.refresh()
    assert copied(mirror) == {"digits/1": {"graph": "one", "weights": "2"}}


def test_removed_versions_and_models_are_removed(store, mirror):
    for version in ("digits/1", "digits/2", "words/1"):
        write(store, version, graph=version)
    mirror.refresh()
    for name in ("digits/1", "words/1"):
        store.remove(f"{name}/graph")
        store.remove(f"{name}/{COMPLETE}")
    mirror.refresh()
    assert list(copied(mirror)) == ["digits/2"]
    # Without any version it is probably the wrong place.
    store.remove("digits/2/graph")
    store.remove(f"digits/2/{COMPLETE}")
    with pytest.raises(OSError, match="is empty"):
        mirror.refresh()
    assert list(copied(mirror)) == ["digits/2"]


def test_only_versions_that_are_served_take_space(store, mirror):
    for version in range(1, 6):
        write(store, f"digits/{version}", graph=str(version))
    store.write(f"digits/{version_policy.FILE}", b'{"serve": {"latest": 2}, "labels": {"stable": 1}}')
    mirror.refresh()
    assert list(copied(mirror)) == ["digits/1", "digits/4", "digits/5"]
    # An operator asks for another one, and loads it.
    mirror.refresh(asked=("digits", 2))
    mirror.refresh()
    mirror.refresh(loaded=[("digits", 2)])
    assert list(copied(mirror)) == ["digits/1", "digits/2", "digits/4", "digits/5"]
    # It is unloaded.
    mirror.refresh()
    assert list(copied(mirror)) == ["digits/1", "digits/4", "digits/5"]
    # A version that the policy drops stays as long as it is loaded.
    store.write(f"digits/{version_policy.FILE}", b'{"serve": [1]}')
    mirror.refresh(loaded=[("digits", 4)])
    assert list(copied(mirror)) == ["digits/1", "digits/4"]
    mirror.refresh(asked=("digits", 0))
    assert list(copied(mirror)) == ["digits/1", "digits/5"]


def test_a_policy_that_cannot_be_read_changes_nothing(store, mirror):
    write(store, "digits/1", graph="1")
    mirror.refresh()
    write(store, "digits/2", graph="2")
    store.write(f"digits/{version_policy.FILE}", b"{")
    mirror.refresh()
    assert list(copied(mirror)) == ["digits/1"]
    # The reader of the policies reports it.
    assert (mirror.folder / "digits" / version_policy.FILE).read_bytes() == b"{"
    store.remove(f"digits/{version_policy.FILE}")
    mirror.refresh()
    assert list(copied(mirror)) == ["digits/1", "digits/2"]


def test_names_that_are_no_versions_are_ignored(store, mirror):
    write(store, "digits/1", graph="1")
    for name in ("README", "digits/notes", "digits/01/graph", "digits/x/graph", "-/1/graph", "digits/1/.hidden"):
        store.write(name, b"x")
    mirror.refresh()
    assert copied(mirror) == {"digits/1": {"graph": "1"}}


def test_the_copies_of_a_killed_server_are_removed(store, tmp_path, monkeypatch):
    program = """
import pathlib, sys, time
from forwardpass_server.catalog.mirror import RepositoryMirror
made = RepositoryMirror(None, pathlib.Path(sys.argv[1]))
print(made.folder, flush=True)
time.sleep(60)
"""
    monkeypatch.setattr(repository_mirror, "_STALE_S", -1.0)
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        folder = pathlib.Path(process.stdout.readline().strip())
        # It lives: others leave its copies alone.
        RepositoryMirror(store, tmp_path).close()
        assert folder.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    RepositoryMirror(store, tmp_path).close()
    assert not folder.exists()


def test_a_copy_is_logged(store, mirror, caplog):
    caplog.set_level(logging.INFO)
    write(store, "digits/1", graph="one")
    mirror.refresh()
    assert any("digits/1 copied: 3 bytes in" in message for message in caplog.messages)
