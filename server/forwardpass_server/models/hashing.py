"""Content hashes: what a model was loaded from, as 32 bytes."""

from __future__ import annotations

import hashlib
import pathlib

from forwardpass_server.models import graphs
from forwardpass_server.models.tracing import TracedModel

_CHUNK_BYTES = 1 << 20


def of_folder(folder: pathlib.Path) -> bytes:
    """SHA-256 over the files of a folder: for each, in order of its path, path, length and contents."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.digest()


def of_traced(model: TracedModel) -> bytes:
    """SHA-256 over the graphs and initial weights of a model that has no files: the same in every process."""
    digest = hashlib.sha256()
    for key in sorted(model.functions, key=lambda key: (key[0].value, key[1])):
        digest.update(graphs.fingerprint(model.functions[key]))
    for weight in model.initial_weights:
        digest.update(f"{weight.dtype}{weight.shape}".encode())
        digest.update(repr(weight.tolist()).encode() if weight.dtype == object else weight.tobytes())
    return digest.digest()
