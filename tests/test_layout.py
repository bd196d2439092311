"""Tests are where CONTRIBUTING.md says that they are."""

from __future__ import annotations

import pathlib
import re

import pytest

from support.environments import ROOT

TESTS = ROOT / "tests"
SERVER = ROOT / "server" / "forwardpass_server"
WIRE = ROOT / "protos" / "forwardpass" / "wire"

# Test files of rooms whose names are not those of modules, with the reason.
NAMED_OTHERWISE = {
    "protos/wire/test_fuzz.py": "random bytes for every decoder",
    "server/app/test_working_directory.py": "modules of the working directory, in serve, export and check",
    "server/models/test_batched_layers.py": "every Keras layer through separability",
    "server/models/test_private_interfaces.py": "the private interfaces of TensorFlow and Keras together",
    "server/models/test_random_graphs.py": "random graphs for separability, row_rules and rounding together",
    "server/sessions/test_stores.py": "the contract of the session stores, once for each store",
}

ROOMS = {
    **{f"server/{folder.name}": SERVER / folder.name for folder in (TESTS / "server").iterdir() if folder.is_dir()},
    "server/sessions/stores": SERVER / "sessions" / "stores",
    "protos/wire": WIRE,
}
ROOMS = {name: room for name, room in ROOMS.items() if not name.endswith("__pycache__")}


def files_of(room: str) -> list[str]:
    return sorted(f"{room}/{path.name}" for path in (TESTS / room).glob("test_*.py"))


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_each_folder_is_a_room_and_each_file_a_module_of_it(room):
    assert (ROOMS[room] / "__init__.py").exists()
    modules = {path.stem for path in ROOMS[room].glob("*.py")}
    strangers = {name for name in files_of(room) if pathlib.Path(name).stem.removeprefix("test_") not in modules}
    assert strangers == {name for name in NAMED_OTHERWISE if str(pathlib.Path(name).parent) == room}


def test_the_list_of_other_names_has_reasons():
    assert all(len(reason.split()) >= 3 for reason in NAMED_OTHERWISE.values())


def test_every_folder_with_tests_follows_the_rule_or_is_listed():
    folders = {str(path.parent.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    others = {".", "client", "compatibility", "deploy", "docs", "end_to_end", "examples", "protos/v1"}
    assert folders - set(ROOMS) == others


def test_contributing_names_each_folder():
    table = re.findall(r"^\| (`.*?/`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`([\w/]+)/`", row)}
    here = {path.name for path in TESTS.iterdir() if path.is_dir()} - {"__pycache__", "data"}
    assert {name.split("/")[0] for name in named} == here
