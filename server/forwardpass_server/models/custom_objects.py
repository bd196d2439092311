"""Custom Keras objects: the modules that register them, and which of them a .keras file may use.

A file holds names of registered classes and functions, never code. Which names exist is the operator's choice, by
--import and "imports"; it must not depend on what other models of the process have imported before.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import keras_names


def import_modules(names: Sequence[str], place: str) -> None:
    """Imports modules in this order. Raises ModelLoadError, naming the place that names the module."""
    for name in names:
        try:
            with keras_names.of_imports():
                importlib.import_module(name)
        except Exception as error:  # The module's own code: anything may come out of it.
            raise ModelLoadError(
                f"{place}: module {name!r} cannot be imported ({type(error).__name__}: {error}): "
                "check its name, the server's working directory and its PYTHONPATH"
            ) from error


def registered() -> dict[str, Any]:
    """All custom objects that are registered now, by the names that files have for them."""
    return dict(keras.saving.get_custom_objects())


@contextlib.contextmanager
def only(objects: Mapping[str, Any], modules: Sequence[str]) -> Iterator[None]:
    """Lets Keras find these objects, and those that these modules define or import by name, and no others.

    The registry belongs to the process: one model is read at a time.
    """
    registry = keras.saving.get_custom_objects()
    before = dict(registry)
    visible = {**objects, **{name: value for name, value in before.items() if _is_of(value, modules)}}
    registry.clear()
    registry.update(visible)
    try:
        yield
    finally:
        # What was registered meanwhile stays.
        registry.update({**before, **registry})


def _is_of(value: Any, modules: Sequence[str]) -> bool:
    home = f"{getattr(value, '__module__', '')}."
    return any(
        home.startswith(f"{module}.") or any(value is held for held in vars(sys.modules[module]).values())
        for module in modules
    )
