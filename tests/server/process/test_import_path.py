"""The working directory at the end of Python's import path."""

from __future__ import annotations

import sys

import pytest

from forwardpass_server.process import import_path


def test_the_working_directory_comes_last_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/installed"])
    import_path.append_working_directory()
    import_path.append_working_directory()
    assert sys.path == ["/installed", str(tmp_path)]


@pytest.mark.parametrize("first", ["", None])
def test_a_path_that_contains_the_working_directory_is_not_changed(tmp_path, monkeypatch, first):
    monkeypatch.chdir(tmp_path)
    path = [str(tmp_path) if first is None else first, "/installed"]
    monkeypatch.setattr(sys, "path", list(path))
    import_path.append_working_directory()
    assert sys.path == path


def test_a_working_directory_that_was_deleted_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setattr(sys, "path", ["/installed"])
    (tmp_path / "gone").rmdir()
    import_path.append_working_directory()
    assert sys.path == ["/installed"]
