"""Version folders of a model repository: which format each holds, and how to read it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from forwardpass_server.catalog import repository
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import (
    custom_objects,
    export,
    failures,
    keras_metrics,
    keras_names,
    model_config,
    tff_saved_model,
)
from forwardpass_server.models.functional import FunctionalModel, MetricsFns
from forwardpass_server.models.keras_archive import KerasArchive, unknown_object
from forwardpass_server.models.keras_losses import InvalidCompileArgument
from forwardpass_server.models.keras_models import functional_model_from_keras
from forwardpass_server.models.model_config import FILE_NAME, ModelConfig

KERAS_FORMAT = "keras"

Objects = Mapping[str, Any]
"""Custom Keras objects by the names that files have for them."""

# The settings that only a .keras file takes.
_OF_KERAS = ("input_spec", "loss", "loss_weights", "weighted_metrics", "sample_weight_spec")


def read(folder: pathlib.Path, objects: Objects | None = None) -> tuple[FunctionalModel, str, ModelConfig]:
    """The functional model in a version folder, the name of its format, and what its forwardpass.json says.

    objects: as `read_keras` takes them. Raises ModelLoadError where the folder holds no model, or not what its
    forwardpass.json says of it.
    """
    config = model_config.read(folder / FILE_NAME)
    if (folder / export.SPEC_FILE_NAME).exists():
        _refuse(config, folder, *_OF_KERAS, "metrics")
        return export.load_functional_model(folder), export.FORMAT, config
    if (folder / "saved_model.pb").exists():
        return *_tff(folder, config), config
    archives = [path for path in repository.visible(folder) if path.suffix == ".keras"]
    if len(archives) == 1:
        return read_keras(archives[0], config, objects), KERAS_FORMAT, config
    found = sorted(path.name for path in folder.iterdir())[:10]
    raise ModelLoadError(f"expected a saved_model.pb or one .keras file, found {found or 'an empty folder'}")


def _tff(folder: pathlib.Path, config: ModelConfig) -> tuple[FunctionalModel, str]:
    _refuse(config, folder, *_OF_KERAS)
    with failures.explained("saved_model.pb", "save the model again"):
        root = tf.saved_model.load(str(folder))
    if not tff_saved_model.is_functional_model(root):
        raise ModelLoadError(
            "the SavedModel is not a functional model: save one with TFF's save_functional_model or "
            "forwardpass-server export"
        )

    def metrics_fns(label_spec: object, prediction_spec: object) -> MetricsFns:
        with failures.explained(FILE_NAME, "name metrics that Keras knows and that fit the model"):
            return keras_metrics.functional_metrics(config.metrics, None, None, label_spec, prediction_spec)

    model = tff_saved_model.functional_model(root, metrics_fns if config.metrics is not None else None)
    return model, tff_saved_model.generation(root)


def read_keras(archive: pathlib.Path, config: ModelConfig, objects: Objects | None = None) -> FunctionalModel:
    """The functional model of a .keras file.

    objects: the custom Keras objects that it may use besides those of its `imports`; None for all that are registered.
    Raises ModelLoadError where its configuration lacks something or says what Keras does not accept.
    """
    custom_objects.import_modules(config.imports, f"{FILE_NAME}: imports")
    objects = custom_objects.registered() if objects is None else objects
    with keras_names.of_load(), custom_objects.only(objects, config.imports):
        opened = KerasArchive(archive)
        advice = f"save the model with Keras {keras.__version__} and without Lambda layers"
        with failures.explained(archive.name, advice):
            model = opened.model()
        with failures.explained(FILE_NAME, "make input_spec, loss and metrics fit the model"):
            return _functional_model(opened, model, config)


def _functional_model(archive: KerasArchive, model: keras.Model, config: ModelConfig) -> FunctionalModel:
    try:
        config = archive.with_defaults(config, model)
        for name in ("input_spec", "loss"):
            if getattr(config, name) is None:
                raise ModelLoadError(f"{archive.name} needs a {FILE_NAME} beside it with {name}")
        return functional_model_from_keras(
            model,
            config.loss,
            config.input_spec,
            config.metrics,
            loss_weights=config.loss_weights,
            weighted_metrics=config.weighted_metrics,
            sample_weight_spec=config.sample_weight_spec,
        )
    except InvalidCompileArgument as error:
        raise ModelLoadError(f"{FILE_NAME}: {unknown_object(error) or error}") from error


def _refuse(config: ModelConfig, folder: pathlib.Path, *names: str) -> None:
    """A setting that would change nothing is a mistake of the operator's: say so."""
    given = [name for name in names if getattr(config, name) not in (None, ())]
    if given:
        raise ModelLoadError(f"{folder / FILE_NAME}: {given} cannot be set for a model that was saved with its own")
