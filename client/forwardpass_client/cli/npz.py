"""Structures in .npz files: one array for each leaf, its path as its name, joined by "/": `x/dense`, `trainable/0`."""

from __future__ import annotations

import pathlib
import zipfile
from typing import Any

import numpy as np

from forwardpass.wire import dtypes, errors, trees
from forwardpass.wire.specs import StructureSpec


def load(path: pathlib.Path) -> dict[str, Any]:
    """The arrays of a file by name. Raises ValueError for another file than .npz. Nothing in it is unpickled."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an .npz file without pickled objects: {error}") from None


def save(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Writes arrays by name. Strings are stored with a fixed width, bfloat16 as float32.

    Raises ValueError where the file cannot be written, and for a string that ends in NUL, which would be cut.
    """
    stored: dict[str, Any] = {name: _storable(name, np.asarray(array)) for name, array in arrays.items()}
    try:
        # numpy.savez adds .npz to a name that lacks it, and leaves its archive open where the disk is full.
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in stored.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None


def _storable(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype == object:
        stored = array.astype(np.bytes_)
        if not np.array_equal(stored, array):
            raise ValueError(f"{name}: a string that ends in a NUL cannot be written to an .npz file")
        return stored
    return array.astype(np.float32) if array.dtype == dtypes.BFLOAT16.numpy else array


def take(arrays: dict[str, Any], name: str, spec: StructureSpec) -> Any:
    """The structure under `name` in a file's arrays. Raises StructureMismatch, naming an array that is missing."""
    leaves = []
    for path in spec.tree.file_names(name):
        if path not in arrays:
            raise errors.StructureMismatch(place="file", expected=f"an array {path!r}", found=f"{sorted(arrays)[:20]}")
        leaves.append(arrays[path])
    return spec.tree.unflatten(leaves)


def put(arrays: dict[str, Any], name: str, value: Any) -> None:
    """Adds a structure's leaves to a file's arrays, under `name`."""
    tree, leaves = trees.flatten(value, name)
    arrays.update(zip(tree.file_names(name), leaves, strict=True))
