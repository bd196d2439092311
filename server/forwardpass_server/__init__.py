"""forwardpass's server, and the functional models that it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forwardpass_server.models.export import load_functional_model, save_functional_model
    from forwardpass_server.models.functional import FunctionalModel
    from forwardpass_server.models.keras_models import functional_model_from_keras

__all__ = ["FunctionalModel", "functional_model_from_keras", "load_functional_model", "save_functional_model"]

_HOMES = {
    "FunctionalModel": "functional",
    "functional_model_from_keras": "keras_models",
    "load_functional_model": "export",
    "save_functional_model": "export",
}


def __getattr__(name: str) -> Any:
    # These bring TensorFlow with them, which takes seconds: the command line's --help must not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if _HOMES[name] == "keras_models":
        # Says what to set where Keras cannot start on the user's backend.
        importlib.import_module(f"{__name__}.models.keras_settings")
    return getattr(importlib.import_module(f"{__name__}.models.{_HOMES[name]}"), name)
