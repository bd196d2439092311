"""Content hashes: what a model was loaded from, as 32 bytes."""

from __future__ import annotations

import hashlib
import logging
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire import description
from forwardpass.wire.description import ModelDescription, ModelIdentity
from forwardpass.wire.functions import GRADIENT_FUNCTIONS
from forwardpass_server.catalog import repository
from forwardpass_server.models import graphs
from forwardpass_server.models.tracing import TracedModel

_CHUNK_BYTES = 1 << 20


def of_folder(folder: pathlib.Path) -> bytes:
    """SHA-256 over the files of a folder: for each, in order of its path, path, length and contents.

    Which files count: see `repository.files_in`.
    """
    digest = hashlib.sha256()
    for path in sorted(repository.files_in(folder, logging.WARNING)):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.digest()


def of_traced(model: TracedModel) -> bytes:
    """SHA-256 over the specs, graphs, constants and initial weights of a model that has no files.

    It is the same in every process. What lookup tables hold does not count.
    """
    described = ModelDescription(ModelIdentity("", 0, b""), "", model.spec)
    message = description.encode(described)
    # Gradients follow from the other functions.
    others = [one for one in message.functions if int(one.function) not in GRADIENT_FUNCTIONS]
    del message.functions[:]
    message.functions.extend(others)
    digest = hashlib.sha256(message.SerializeToString(deterministic=True))
    keys = [key for key in model.functions if key[0] not in GRADIENT_FUNCTIONS]
    for key in sorted(keys, key=lambda key: (key[0].value, key[1])):
        concrete = model.functions[key]
        digest.update(graphs.fingerprint(concrete))
        for captured in concrete.captured_inputs:
            if captured.dtype != tf.resource:
                _add_array(digest, captured.numpy())
    for weight in model.initial_weights:
        _add_array(digest, weight)
    return digest.digest()


def _add_array(digest: hashlib._Hash, value: Any) -> None:
    array = np.asarray(value)
    digest.update(f"{array.dtype}{array.shape}".encode())
    digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
