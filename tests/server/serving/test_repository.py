"""The folder NAME/VERSION/."""

from __future__ import annotations

import logging

import pytest

from forwardpass_server.serving import repository
from forwardpass_server.serving.models import ModelSource


def test_versions_are_found_in_the_order_of_numbers(tmp_path):
    for path in ("b/10", "b/9", "a/1"):
        (tmp_path / path).mkdir(parents=True)
    assert [str(source) for source in repository.scan(tmp_path)] == ["a/1", "b/9", "b/10"]


@pytest.mark.parametrize(
    "path", ["a/0", "a/01", "a/-1", "a/v1", "a/1.5", "a/9223372036854775808", "a b/1", "ü/1", "_a/1", "n" * 129 + "/1"]
)
def test_what_is_no_model_or_version_is_left_out_and_logged(tmp_path, path, caplog):
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / "good" / "1").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert [str(source) for source in repository.scan(tmp_path)] == ["good/1"]
    assert path.split("/")[0] in caplog.text


def test_files_and_hidden_folders_are_passed_over(tmp_path, caplog):
    (tmp_path / "a" / ".tmp-1").mkdir(parents=True)
    (tmp_path / ".git" / "1").mkdir(parents=True)
    (tmp_path / "README").write_text("")
    (tmp_path / "a" / "notes").write_text("")
    assert repository.scan(tmp_path) == []
    assert caplog.text == ""


def test_factories_are_version_1():
    assert repository.from_factories({"b": "m:f", "a": "n:g"}) == [
        ModelSource("a", 1, factory="n:g"),
        ModelSource("b", 1, factory="m:f"),
    ]
