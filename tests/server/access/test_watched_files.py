"""Files that are reloaded when they change."""

from __future__ import annotations

import pytest

from forwardpass_server.access.watched_files import WatchedFiles


def number(contents) -> int:
    return int(b"".join(contents))


@pytest.fixture
def paths(tmp_path):
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.write_text("1")
    return paths


def test_files_are_parsed_again_only_after_a_change(paths):
    read = []
    files = WatchedFiles(paths, lambda contents: read.append(contents) or number(contents))
    assert files.value == 11
    files.refresh()
    assert len(read) == 1
    paths[1].write_text("2")
    files.refresh()
    assert files.value == 12


@pytest.mark.parametrize("break_it", [lambda path: path.write_text("x"), lambda path: path.unlink()])
def test_a_failed_reload_keeps_the_last_value_and_is_logged_once(paths, break_it, caplog):
    files = WatchedFiles(paths, number)
    break_it(paths[0])
    for _ in range(3):
        files.refresh()
    assert files.value == 11
    assert not files.are_good
    assert len([record for record in caplog.records if "reload failed" in record.getMessage()]) == 1
    paths[0].write_text("3")
    files.refresh()
    assert files.value == 31
    assert files.are_good


def test_a_file_that_is_restored_is_valid_again(paths):
    files = WatchedFiles(paths, number)
    paths[0].write_text("x")
    files.refresh()
    paths[0].write_text("1")
    files.refresh()
    assert files.value == 11


def test_a_file_that_was_missing_for_a_while_is_valid_again(paths):
    files = WatchedFiles(paths, number)
    away = paths[0].rename(paths[0].with_name("away"))
    files.refresh()
    assert not files.are_good
    away.rename(paths[0])
    files.refresh()
    assert files.are_good


def test_files_that_change_during_a_reload_are_read_by_the_next_one(paths):
    def read(contents) -> int:
        if contents[0] == b"5":
            paths[0].write_text("7")
        return number(contents)

    files = WatchedFiles(paths, read)
    paths[0].write_text("5")
    files.refresh()
    assert files.value == 11
    files.refresh()
    assert files.value == 71


def test_unreadable_files_at_the_start_are_an_error(paths):
    paths[0].write_text("x")
    with pytest.raises(ValueError, match="invalid literal"):
        WatchedFiles(paths, number)
    paths[0].unlink()
    with pytest.raises(FileNotFoundError):
        WatchedFiles(paths, number)
