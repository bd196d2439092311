"""The model repository: the folder `NAME/VERSION/` that says which models there are."""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Mapping

from forwardpass_server.serving.models import ModelSource

_LOGGER = logging.getLogger(__name__)

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a model may be called."""

MAX_VERSION = 2**63 - 1


def scan(folder: pathlib.Path) -> list[ModelSource]:
    """Every version of every model in a repository, by name and version. What is named otherwise is logged and left."""
    sources = []
    for model in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not MODEL_NAME.fullmatch(model.name):
            _LOGGER.warning("model repository: %s is no model name, left out", model.name)
            continue
        for version in sorted(path for path in model.iterdir() if path.is_dir() and not path.name.startswith(".")):
            if not re.fullmatch(r"[1-9][0-9]*", version.name) or int(version.name) > MAX_VERSION:
                _LOGGER.warning("model repository: %s/%s is no version, left out", model.name, version.name)
                continue
            sources.append(ModelSource(model.name, int(version.name), folder=version))
    return sorted(sources, key=lambda source: (source.name, source.version))


def from_factories(factories: Mapping[str, str]) -> list[ModelSource]:
    """Models that Python functions make: `module:function` by name. Each is version 1."""
    return [ModelSource(name, 1, factory=factory) for name, factory in sorted(factories.items())]
