"""Loads models as a server does, without serving them, and shows the facts of each."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

from forwardpass.wire import description
from forwardpass.wire.description import ModelDescription
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog import repository
from forwardpass_server.catalog.registry import Entry, Registry
from forwardpass_server.errors import SettingsError
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.models.trial_process import TrialProcess
from forwardpass_server.process import control_groups


def check(folder: pathlib.Path, device: str, has_trial: bool, imports: Sequence[str] = ()) -> Iterator[Entry]:
    """Loads the models in a folder, and yields the registry's entry of each version.

    folder: a version's, a model's with its versions, or a repository.
    imports: modules that register custom Keras objects.
    Raises SettingsError for a folder without a version, DeviceNotFound, and ModelLoadError for a missing module.
    """
    found = sources(folder)
    process = TrialProcess(control_groups.cores()) if has_trial else None
    loader = TensorFlowLoader(device, trial_process=process, imports=imports)
    try:
        for source in found:
            yield Registry([source]).load(source, loader)
    finally:
        if process is not None:
            process.close()


def sources(folder: pathlib.Path) -> list[ModelSource]:
    """The versions in a folder. Raises SettingsError where it holds none."""
    if not folder.is_dir():
        raise SettingsError(f"{folder}: expected a folder")
    folder = folder.resolve()
    if any(_is_version(path) for path in folder.iterdir()):
        return [one for one in repository.scan(folder.parent) if one.name == folder.name]
    if any(path.is_file() for path in folder.iterdir()):
        name, version = (folder.parent.name, int(folder.name)) if _is_version(folder) else (folder.name, 1)
        return [ModelSource(name, version, folder=folder)]
    found = repository.scan(folder)
    if not found:
        raise SettingsError(f"{folder}: expected a version, a model or a repository NAME/VERSION/, found none")
    return found


def _is_version(path: pathlib.Path) -> bool:
    return path.is_dir() and path.name.isdecimal()


def lines(described: ModelDescription) -> Iterator[str]:
    """The facts of a model, as `forwardpass describe` shows them."""
    facts = [
        ("content", described.identity.content_hash.hex()),
        *description.facts(described),
        *description.function_facts(described.spec),
    ]
    for name, value in facts:
        yield f"  {name}: {value}"
