"""URLs of stores."""

from __future__ import annotations

import sys

import pytest

from forwardpass_server.errors import SettingsError
from forwardpass_server.storage import urls


@pytest.mark.parametrize("url", ["file:///a/folder", "s3://bucket", "s3://bucket/pre/fix", "gs://bucket/prefix"])
def test_these_are_stores(url):
    urls.check(url, "--flag")


@pytest.mark.parametrize(
    "url", ["http://host/path", "file://relative/path", "file://", "s3://", "s3:///prefix", "s3://b?x=1", "memory://a"]
)
def test_these_are_none(url):
    with pytest.raises(SettingsError, match=r"^--flag: expected a folder, or a URL file:///FOLDER, .* got '"):
        urls.check(url, "--flag")


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(SettingsError, match="without credentials") as caught:
        urls.check("s3://key:secret@bucket/prefix?x", "--flag")
    assert "secret" not in str(caught.value)


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "a folder %41"
    store = urls.open_store(folder.as_uri(), "--flag", is_written=True)
    store.open()
    store.write("one", b"1")
    assert (folder / "one").read_bytes() == b"1"
    assert store.url == folder.as_uri()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SettingsError, match=r"^--flag: gcsfs is not installed: pip install 'forwardpass\[gcs\]'$"):
        urls.open_store("gs://bucket", "--flag", is_written=True)
