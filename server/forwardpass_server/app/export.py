"""Writes functional models into a model repository."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Sequence

from forwardpass_server.catalog.repository import MODEL_NAME, scan
from forwardpass_server.errors import SettingsError
from forwardpass_server.models import custom_objects, formats, keras_settings, loading, model_config
from forwardpass_server.models.export import save_functional_model
from forwardpass_server.models.functional import FunctionalModel


def export(
    source: str,
    repository: pathlib.Path,
    name: str,
    version: int | None,
    config: pathlib.Path | None,
    imports: Sequence[str] = (),
) -> pathlib.Path:
    """Writes the model of `source` as a version of model `name`, and returns its folder.

    source: a .keras file, or `module:function`. version: None for the highest one plus 1.
    config: the .keras file's forwardpass.json, if it is not in the same folder.
    imports: modules that register custom Keras objects.
    The version appears complete or not at all. Raises SettingsError, ModelLoadError or FileExistsError.
    """
    if not MODEL_NAME.fullmatch(name):
        raise SettingsError(f"name: expected {MODEL_NAME.pattern}, got {name!r}")
    repository.mkdir(parents=True, exist_ok=True)
    versions = [found.version for found in scan(repository) if found.name == name]
    folder = repository / name / str(version or max(versions, default=0) + 1)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another --version")
    keras_settings.use_defaults()
    custom_objects.import_modules(imports, "--import")
    model = _read(source, config)
    folder.parent.mkdir(exist_ok=True)
    # Written next to its final folder, under a name that is not a version, so that the last step is one rename.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as temporary:
        written = pathlib.Path(temporary) / "model"
        save_functional_model(model, written)
        written.rename(folder)
    return folder


def _read(source: str, config: pathlib.Path | None) -> FunctionalModel:
    if not source.endswith(".keras"):
        if config is not None:
            raise SettingsError(
                "--config: expected a .keras file as SOURCE, which is the only format with a configuration"
            )
        return loading.from_factory(source)
    archive = pathlib.Path(source)
    return formats.read_keras(archive, model_config.read(config or archive.parent / model_config.FILE_NAME))
