"""Uploads of versions, and the object that says that one is complete."""

from __future__ import annotations

import json

import pytest

from forwardpass_server.catalog import upload
from forwardpass_server.catalog.upload import COMPLETE
from forwardpass_server.errors import ModelLoadError


@pytest.fixture
def version(tmp_path):
    folder = tmp_path / "version"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "variables" / "data").write_bytes(b"numbers")
    (folder / ".DS_Store").write_bytes(b"hidden")
    return folder


def test_files_are_written_first_and_the_list_of_them_last(places, version):
    store = places.make().store()
    assert upload.upload(version, store) == ["saved_model.pb", "variables/data"]
    assert {one.name for one in store.list()} == {COMPLETE, "saved_model.pb", "variables/data"}
    listed = upload.parse(store.read(COMPLETE))
    assert {name: one.size_bytes for name, one in listed.items()} == {"saved_model.pb": 5, "variables/data": 7}


def test_a_failed_upload_is_not_complete(places, version):
    store = places.make().store()
    upload.upload(version, store)

    class Full:
        def __getattr__(self, name):
            return getattr(store, name)

        def write(self, name, data):
            if name == "variables/data":
                raise OSError(28, "no space left")
            store.write(name, data)

    with pytest.raises(OSError, match="no space left"):
        upload.upload(version, Full())
    assert store.state(COMPLETE) is None


def test_a_folder_without_files_is_refused(places, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match="expected the folder of a version, found no files"):
        upload.upload(tmp_path / "empty", places.make().store())


def test_an_empty_object_lists_nothing():
    assert upload.parse(b"") is None
    assert upload.parse(b"\n") is None


@pytest.mark.parametrize(
    "name", ["../outside", "/absolute", "a/../b", "a//b", "", ".hidden", "a/.hidden", "a\\b", "a/"]
)
def test_a_listed_name_stays_inside_the_folder(name):
    files = {name: {"size_bytes": 1, "sha256": "00"}}
    with pytest.raises(ModelLoadError, match=f"^{COMPLETE}: expected it to be empty or to list files"):
        upload.parse(json.dumps({"files": files}).encode())


@pytest.mark.parametrize("text", [b"x", b"[]", b"{}", b'{"files": []}', b'{"files": {"a": {"sha256": "0"}}}'])
def test_another_content_is_refused(text):
    with pytest.raises(ModelLoadError, match="to list files"):
        upload.parse(text)
