"""Files that change: what is read of them, and what is not."""

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


def test_a_change_of_any_file_is_read_and_nothing_else(paths):
    read = []
    files = WatchedFiles(paths, lambda contents: read.append(contents) or number(contents))
    assert files.value == 11
    files.refresh()
    assert len(read) == 1
    paths[1].write_text("2")
    files.refresh()
    assert files.value == 12


@pytest.mark.parametrize("break_it", [lambda path: path.write_text("x"), lambda path: path.unlink()])
def test_what_cannot_be_read_leaves_the_last_good_value_and_is_said_once(paths, break_it, caplog):
    files = WatchedFiles(paths, number)
    break_it(paths[0])
    for _ in range(3):
        files.refresh()
    assert files.value == 11
    assert not files.are_good
    assert len([record for record in caplog.records if "kept as it was" in record.getMessage()]) == 1
    paths[0].write_text("3")
    files.refresh()
    assert files.value == 31
    assert files.are_good


def test_a_file_that_comes_back_as_it_was_is_good_again(paths):
    files = WatchedFiles(paths, number)
    paths[0].write_text("x")
    files.refresh()
    paths[0].write_text("1")
    files.refresh()
    assert files.value == 11


def test_a_file_that_was_away_for_a_while_is_good_again(paths):
    files = WatchedFiles(paths, number)
    away = paths[0].rename(paths[0].with_name("away"))
    files.refresh()
    assert not files.are_good
    away.rename(paths[0])
    files.refresh()
    assert files.are_good


def test_files_that_change_while_they_are_read_are_read_next_time(paths):
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


def test_files_that_cannot_be_read_at_first_are_an_error(paths):
    paths[0].write_text("x")
    with pytest.raises(ValueError, match="invalid literal"):
        WatchedFiles(paths, number)
    paths[0].unlink()
    with pytest.raises(FileNotFoundError):
        WatchedFiles(paths, number)
