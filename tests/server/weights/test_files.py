"""The cost of a start with a folder of weights. The contents of the folder are tested with the store."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

from forwardpass.wire import manifests
from forwardpass.wire.structures import Structure
from forwardpass_server.weights.files import WeightFiles

MIB = 2**20


def save(target: WeightFiles, tensors: int, sets: int) -> None:
    """Saves sets with this number of different tensors in all."""
    each = tensors // sets
    for first in range(0, tensors, each):
        structure = Structure.of(tuple(np.float32([number]) for number in range(first, first + each)))
        manifest = manifests.of_structure(structure, "w")
        target.save("", manifest, zip(manifest.tensors, structure.leaves, strict=True))


def calls_of(work: Callable[[], object]) -> int:
    """The number of function calls during `work`, including C functions."""
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("sets_of", [lambda tensors: 1, lambda tensors: tensors // 2])
def test_the_work_of_a_start_is_linear_in_the_number_of_tensors(tmp_path, sets_of):
    works = []
    for tensors in (200, 400):
        folder = tmp_path / str(tensors)
        save(WeightFiles(folder, MIB), tensors, sets_of(tensors))
        works.append(calls_of(lambda folder=folder: WeightFiles(folder, MIB)))
        again = WeightFiles(folder, MIB)
        assert (again.set_count, again.size_bytes) == (sets_of(tensors), 4 * tensors)
    # Twice the tensors cause at most twice the work; a quadratic scan causes 3.6 times the work.
    assert works[1] < 2.2 * works[0]


def test_a_start_reads_the_size_of_a_shared_tensor_once(tmp_path, monkeypatch):
    tensors, principals = 50, 20
    target = WeightFiles(tmp_path, MIB)
    structure = Structure.of(tuple(np.float32([number]) for number in range(tensors)))
    manifest = manifests.of_structure(structure, "w")
    for principal in range(principals):
        target.save(str(principal), manifest, zip(manifest.tensors, structure.leaves, strict=True))
    stated = []
    stat = pathlib.Path.stat
    monkeypatch.setattr(pathlib.Path, "stat", lambda path, **more: stated.append(path) or stat(path, **more))
    assert WeightFiles(tmp_path, MIB).set_count == principals
    # Only the sets are looked up, for their age. The sizes of tensors come with the listing of their folder.
    assert len([path for path in stated if path.is_relative_to(tmp_path / "sets")]) <= 3 * principals
    assert not [path for path in stated if path.is_relative_to(tmp_path / "tensors") and path != tmp_path / "tensors"]
