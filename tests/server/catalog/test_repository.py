"""The folder NAME/VERSION/."""

from __future__ import annotations

import logging

import pytest

from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog import repository


def test_versions_are_found_in_numeric_order(tmp_path):
    for path in ("b/10", "b/9", "a/1"):
        (tmp_path / path).mkdir(parents=True)
    assert [str(source) for source in repository.scan(tmp_path)] == ["a/1", "b/9", "b/10"]


@pytest.mark.parametrize(
    "path", ["a/0", "a/01", "a/-1", "a/v1", "a/1.5", "a/9223372036854775808", "a b/1", "ü/1", "_a/1", "n" * 129 + "/1"]
)
def test_entries_that_are_not_models_or_versions_are_skipped_and_logged(tmp_path, path, caplog):
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / "good" / "1").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert [str(source) for source in repository.scan(tmp_path)] == ["good/1"]
    assert path.split("/")[0] in caplog.text


def test_files_and_hidden_folders_are_ignored(tmp_path, caplog):
    (tmp_path / "a" / ".tmp-1").mkdir(parents=True)
    (tmp_path / ".git" / "1").mkdir(parents=True)
    (tmp_path / "README").write_text("")
    (tmp_path / "a" / "notes").write_text("")
    assert repository.scan(tmp_path) == []
    assert caplog.text == ""


def test_entries_that_are_not_folders_are_skipped_with_a_warning(tmp_path, caplog):
    (tmp_path / "good" / "1").mkdir(parents=True)
    (tmp_path / "good" / "2").write_text("")
    (tmp_path / "good" / "3").symlink_to(tmp_path / "gone")
    (tmp_path / "gone-model").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with caplog.at_level(logging.WARNING):
        assert [str(source) for source in repository.scan(tmp_path)] == ["good/1"]
    assert sorted(record.getMessage().split(" is skipped: ")[0].split()[-1] for record in caplog.records) == [
        "circle",
        "gone-model",
        "good/2",
        "good/3",
    ]


def test_a_missing_repository_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        repository.scan(tmp_path / "gone")


def config_map(folder, data, files):
    """The layout that a kubelet writes for a volume of a ConfigMap. data: the name of the hidden folder."""
    (folder / data).mkdir(parents=True)
    (folder / "..data").symlink_to(data)
    for name, text in files.items():
        (folder / data / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")


def test_files_are_those_whose_names_do_not_begin_with_a_dot(tmp_path):
    config_map(tmp_path, "..2026_11_27", {"model.keras": "m", "forwardpass.json": "{}"})
    for name in (".DS_Store", "._model.keras", ".nfs0001"):
        (tmp_path / name).write_text("")
    (tmp_path / "variables" / ".hidden").mkdir(parents=True)
    (tmp_path / "variables" / ".hidden" / "data").write_text("")
    (tmp_path / "variables" / "data").write_text("")
    found = [path.relative_to(tmp_path).as_posix() for path in repository.files_in(tmp_path)]
    assert found == ["forwardpass.json", "model.keras", "variables/data"]
    assert {path for path, *_ in repository.file_states(tmp_path)} == set(found)


def test_factories_are_version_1():
    assert repository.from_factories({"b": "m:f", "a": "n:g"}) == [
        ModelSource("a", 1, factory="n:g"),
        ModelSource("b", 1, factory="m:f"),
    ]
