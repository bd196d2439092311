"""Content hashes of version folders."""

from __future__ import annotations

import pathlib

from forwardpass_server.models import hashing


def config_map(folder: pathlib.Path, time: str) -> pathlib.Path:
    """A volume as a kubelet lays it out: files are links into a hidden folder, whose name is a time."""
    (folder / f"..{time}").mkdir(parents=True)
    (folder / "..data").symlink_to(f"..{time}")
    for name in ("model.keras", "forwardpass.json"):
        (folder / "..data" / name).write_text(name)
        (folder / name).symlink_to(f"..data/{name}")
    return folder


def plain(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    for name in ("model.keras", "forwardpass.json"):
        (folder / name).write_text(name)
    return folder


def test_the_same_files_have_the_same_hash_with_and_without_links(tmp_path):
    expected = hashing.of_folder(plain(tmp_path / "plain"))
    assert hashing.of_folder(config_map(tmp_path / "pod_a", "2026_11_27_10_00_00.1")) == expected
    assert hashing.of_folder(config_map(tmp_path / "pod_b", "2026_11_27_10_00_07.2")) == expected


def test_only_names_that_begin_with_a_dot_are_ignored(tmp_path):
    folder = plain(tmp_path / "m")
    expected = hashing.of_folder(folder)
    for name in (".DS_Store", "._model.keras", ".nfs000001"):
        (folder / name).write_text(name)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "file").write_text("")
    assert hashing.of_folder(folder) == expected
    (folder / "variables").mkdir()
    (folder / "variables" / "data").write_text("")
    assert hashing.of_folder(folder) != expected
