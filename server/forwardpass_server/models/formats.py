"""Version folders of a model repository: which format each holds, and how to read it."""

from __future__ import annotations

import pathlib

import keras
import tensorflow as tf

from forwardpass_server.models import export, keras_metrics, model_config, tf_specs, tff_saved_model
from forwardpass_server.models.functional import FunctionalModel, MetricsFns
from forwardpass_server.models.keras_models import functional_model_from_keras
from forwardpass_server.models.model_config import FILE_NAME, ModelConfig
from forwardpass_server.serving import repository
from forwardpass_server.serving.errors import ModelLoadError

KERAS_FORMAT = "keras"


def read(folder: pathlib.Path) -> tuple[FunctionalModel, str, ModelConfig]:
    """The functional model in a version folder, the name of its format, and what its forwardpass.json says.

    Raises ModelLoadError where the folder holds no model, or not what its forwardpass.json says of it.
    """
    config = model_config.read(folder / FILE_NAME)
    if (folder / export.SPEC_FILE_NAME).exists():
        _refuse(config, folder, "input_spec", "loss", "metrics", "sample_weight_spec")
        return export.load_functional_model(folder), export.FORMAT, config
    if (folder / "saved_model.pb").exists():
        return *_tff(folder, config), config
    archives = [path for path in repository.visible(folder) if path.suffix == ".keras"]
    if len(archives) == 1:
        return read_keras(archives[0], config), KERAS_FORMAT, config
    found = sorted(path.name for path in folder.iterdir())[:10]
    raise ModelLoadError(f"expected a saved_model.pb or one .keras file, found {found or 'an empty folder'}")


def _tff(folder: pathlib.Path, config: ModelConfig) -> tuple[FunctionalModel, str]:
    _refuse(config, folder, "input_spec", "loss", "sample_weight_spec")
    root = tf.saved_model.load(str(folder))
    if not tff_saved_model.is_functional_model(root):
        raise ModelLoadError("the SavedModel holds no functional model")

    def metrics_fns(label_spec: object, prediction_spec: object) -> MetricsFns:
        metrics = keras_metrics.resolve_metrics(config.metrics)
        return keras_metrics.functional_metrics(metrics, tf_specs.zeros(label_spec), tf_specs.zeros(prediction_spec))

    model = tff_saved_model.functional_model(root, metrics_fns if config.metrics is not None else None)
    return model, tff_saved_model.generation(root)


def read_keras(archive: pathlib.Path, config: ModelConfig) -> FunctionalModel:
    """The functional model of a .keras file. Raises ModelLoadError where its configuration lacks something."""
    for name in ("input_spec", "loss"):
        if getattr(config, name) is None:
            raise ModelLoadError(f"{archive.name} needs a {FILE_NAME} beside it with {name}")
    return functional_model_from_keras(
        keras.saving.load_model(archive, compile=False, safe_mode=True),
        config.loss,
        config.input_spec,
        config.metrics,
        sample_weight_spec=config.sample_weight_spec,
    )


def _refuse(config: ModelConfig, folder: pathlib.Path, *names: str) -> None:
    """A setting that would change nothing is a mistake of the operator's: say so."""
    given = [name for name in names if getattr(config, name) is not None]
    if given:
        raise ModelLoadError(f"{folder / FILE_NAME}: {given} cannot be set for a model that was saved with its own")
