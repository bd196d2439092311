"""Functional models saved by real TFF, and what TFF computed with them before it saved them."""

from __future__ import annotations

import collections
import functools
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from forwardpass.wire.description import BatchOutput

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "tff"
NAMES = sorted(path.name for path in FOLDER.iterdir())


class Golden:
    """One model: its manifest, and its arrays put into structures."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.saved_model = FOLDER / name / "saved_model"
        self.manifest = json.loads((FOLDER / name / "manifest.json").read_text())
        with np.load(FOLDER / name / "golden.npz") as archive:
            self._arrays = {key: archive[key] for key in archive.files}
        self._structures = self.manifest["structures"]

    def __contains__(self, path: str) -> bool:
        return any(key == path or key.startswith(path + "/") for key in self._arrays)

    def array(self, path: str) -> Any:
        array = self._arrays[path]
        if self.manifest["npz"][path]["dtype"] == "bfloat16":
            return array.view(ml_dtypes.bfloat16)
        return array.astype(object) if array.dtype.kind == "S" else array

    def get(self, path: str, structure: str, item: int | str | None = None) -> Any:
        """The arrays under a path, in the containers that the manifest gives (an item of) a structure."""
        node = self._structures[structure]
        if item is not None:
            index = item if isinstance(item, int) else [name for name, _ in node["items"]].index(item)
            node = node["items"][index]
            node = node[1] if isinstance(node, list) else node
        return self._build(node, path)

    def _build(self, node: Any, path: str) -> Any:
        kind = node["kind"]
        if kind == "tensor":
            return self.array(path)
        if kind in ("tuple", "list"):
            items = [self._build(item, f"{path}/{index}") for index, item in enumerate(node["items"])]
            return tuple(items) if kind == "tuple" else items
        named = [(name, self._build(item, f"{path}/{name}")) for name, item in node["items"]]
        if kind == "namedtuple":
            assert node["type"] == "BatchOutput"
            return BatchOutput(**dict(named))
        return collections.OrderedDict(named)

    def weights(self, path: str = "weights") -> Any:
        """(trainable, non_trainable)."""
        return tuple(
            self._build(node, f"{path}/{name}")
            for name, node in zip(
                ("trainable", "non_trainable"), self._structures["initial_weights"]["items"], strict=True
            )
        )

    @property
    def batches(self) -> list[str]:
        """The prefixes of the batches' keys."""
        more = {key.split("/")[0] for key in self._arrays if key.startswith("batch")}
        return ["", *(f"{name}/" for name in sorted(more))]

    def batch(self, prefix: str) -> tuple[Any, Any]:
        """(x, y)."""
        return self.get(f"{prefix}x", "input_spec", 0), self.get(f"{prefix}y", "input_spec", 1)


@functools.cache
def golden(name: str) -> Golden:
    return Golden(name)
