"""The .npz file with example inputs that a forwardpass.json may name."""

from __future__ import annotations

import pathlib
import zipfile

import numpy as np

from forwardpass.wire import conform, errors
from forwardpass.wire.description import ModelSpec
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import StructureSpec
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models.examples import Given


def read(path: pathlib.Path, spec: ModelSpec) -> Given:
    """The batch in a file: an array for each leaf of x, and for each leaf of y unless the file has none of them.

    Arrays are named by their paths: `x`, `x/tokens`, `y`. Raises ModelLoadError where one is missing or does not fit.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise ModelLoadError(f"forwardpass.json: example_input: the folder has no file {path.name!r}") from None
    except (ValueError, OSError, AttributeError, TypeError, EOFError, zipfile.BadZipFile):
        raise ModelLoadError(f"{path.name}: expected an .npz file without pickled objects") from None
    has_labels = any(name in arrays for name in spec.y.tree.file_names("y"))
    return Given(_take(arrays, spec.x, "x", path), _take(arrays, spec.y, "y", path) if has_labels else None)


def _take(arrays: dict[str, Array], spec: StructureSpec, place: str, path: pathlib.Path) -> list[Array]:
    names = spec.tree.file_names(place)
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ModelLoadError(f"{path.name}: expected arrays {names}, found {sorted(arrays)[:20]}")
    found = [_as_strings(arrays[name]) for name in names]
    try:
        leaves = conform.conform(spec.tree.unflatten(found), spec, place).leaves
    except errors.ForwardPassError as error:
        raise ModelLoadError(f"{path.name}: {error}") from None
    if any(not leaf.shape or not leaf.shape[0] for leaf in leaves):
        raise ModelLoadError(f"{path.name}: {place}: expected a batch of at least one example")
    return list(leaves)


def _as_strings(array: Array) -> Array:
    return array.astype(object) if array.dtype.kind in "SU" else array
