"""The contract of the object stores, once for a folder and once for S3."""

from __future__ import annotations

import os
import pathlib
import subprocess
import time

import pytest

from forwardpass_server.storage import objects
from forwardpass_server.storage.folder import FolderObjects
from forwardpass_server.storage.objects import StoreUnreachable
from support import filesystems
from support.s3_servers import S3Process


@pytest.fixture
def place(places):
    return places.make()


def test_an_object_is_read_as_it_was_written(place):
    store = place.store()
    for size in (0, 1, 100_000):
        data = os.urandom(size)
        store.write(f"folder/{size}", memoryview(data))
        assert store.read(f"folder/{size}") == data
        buffer = bytearray(size)
        assert store.read_into(f"folder/{size}", 0, memoryview(buffer)) == size
        assert bytes(buffer) == data


def test_a_part_is_read_into_a_buffer(place):
    store = place.store()
    store.write("one", bytes(range(100)))
    buffer = bytearray(b"x" * 20)
    assert store.read_into("one", 10, memoryview(buffer)) == 20
    assert bytes(buffer) == bytes(range(10, 30))
    assert store.read_into("one", 100, memoryview(bytearray(5))) == 0
    # At the end there are fewer.
    assert store.read_into("one", 90, memoryview(buffer)) == 10
    assert bytes(buffer) == bytes(range(90, 100)) + bytes(range(20, 30))


def test_a_missing_object_has_no_state_and_cannot_be_read(place):
    store = place.store()
    assert store.state("none") is None
    with pytest.raises(FileNotFoundError):
        store.read("none")
    for size in (0, 5):
        with pytest.raises(FileNotFoundError):
            store.read_into("none", 0, memoryview(bytearray(size)))
    store.remove("none")
    assert list(store.list("folder/")) == []


def test_a_listing_gives_names_sizes_and_times(place):
    store = place.store()
    before = time.time()
    store.write("a/one", b"1")
    store.write("a/b/two", b"22")
    store.write("ab/three", b"333")
    found = {one.name: one for one in store.list()}
    assert {name: one.size_bytes for name, one in found.items()} == {"a/one": 1, "a/b/two": 2, "ab/three": 3}
    # S3 counts whole seconds.
    assert all(before - 2 <= one.modified <= time.time() + 2 for one in found.values())
    assert {one.name for one in store.list("a/")} == {"a/one", "a/b/two"}
    assert store.state("a/one").size_bytes == 1


def test_a_replaced_object_has_another_tag(place):
    store = place.store()
    store.write("one", b"1")
    (before,) = store.list()
    store.write("one", b"2")
    (after,) = store.list()
    assert before.tag
    assert before.tag != after.tag
    store.remove("one")
    assert list(store.list()) == []


def test_nothing_unfinished_is_left_by_writes(place):
    store = place.store()
    store.write("one", b"1")
    assert list(store.unfinished()) == []


def test_files_of_a_folder_have_the_rights_of_the_umask(tmp_path):
    """Servers that share a volume can run as different users, and so can the program that uploads models."""
    store = FolderObjects(tmp_path, is_written=True)
    store.open()
    before = os.umask(0o022)
    try:
        store.write("folder/one", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "folder" / "one").stat().st_mode & 0o777 == 0o644


def test_a_folder_lists_what_an_interrupted_write_has_left(tmp_path):
    store = FolderObjects(tmp_path, is_written=True)
    store.open()
    (tmp_path / ".new" / "half").write_bytes(b"1")
    assert list(store.list()) == []
    (left,) = store.unfinished()
    store.remove(left.name)
    assert list(store.unfinished()) == []


def test_a_folder_without_its_volume_does_not_answer(tmp_path):
    """An empty mount point must not look like a store without objects."""
    store = FolderObjects(tmp_path / "mounted", is_written=True)
    store.open()
    (tmp_path / "mounted" / ".new").rmdir()
    for call in (
        lambda: store.read("one"),
        lambda: store.state("one"),
        lambda: store.list(),
        lambda: store.write("one", b"1"),
    ):
        with pytest.raises(StoreUnreachable, match="is the volume mounted"):
            call()


def test_failures_of_a_folder_have_reasons(tmp_path):
    def failure(store: FolderObjects, size: int) -> str:
        with pytest.raises(OSError, match=r"Errno") as caught:
            store.write("one", bytes(size))
        return objects.reason(caught.value)

    with filesystems.mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=64k", "tmpfs") as folder:
        store = FolderObjects(pathlib.Path(folder), is_written=True)
        store.open()
        assert failure(store, 2**20) == "full"
        assert list(store.unfinished()) == []
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert failure(store, 1) == "denied"


def test_an_s3_that_is_gone_does_not_answer(monkeypatch):
    with S3Process() as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        from forwardpass_server.storage import urls

        store = urls.open_store("s3://shared/prefix", "URL", is_written=True)
        store.open()
        missing = urls.open_store("s3://other", "URL", is_written=True)
        with pytest.raises(FileNotFoundError):
            missing.open()
    for call in (
        lambda: store.read("one"),
        lambda: store.state("one"),
        lambda: store.list(),
        lambda: store.write("one", b"1"),
        lambda: store.remove("one"),
    ):
        with pytest.raises(StoreUnreachable) as caught:
            list(call() or ())
        assert objects.reason(caught.value) == "unreachable"
