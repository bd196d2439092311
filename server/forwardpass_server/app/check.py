"""Loads models as a server does, without serving them, and says what came of each."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

from forwardpass.wire.description import Function, ModelDescription
from forwardpass_server.app.settings import SettingsError
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog import repository
from forwardpass_server.catalog.registry import Entry, Registry
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.models.trial_process import TrialProcess
from forwardpass_server.process import control_groups


def check(folder: pathlib.Path, device: str, has_trial: bool, imports: Sequence[str] = ()) -> Iterator[Entry]:
    """Loads what is in a folder, and yields what came of each version.

    folder: a version's, a model's with its versions, or a repository.
    imports: modules that register custom Keras objects.
    Raises SettingsError where there is no version, DeviceNotFound, and ModelLoadError for a module that is not there.
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


def lines(description: ModelDescription) -> Iterator[str]:
    """What there is to say of a model, as `forwardpass describe` says it."""
    spec = description.spec
    for name, value in (
        ("content", description.identity.content_hash.hex()),
        ("format", description.format),
        ("weights", f"{len(spec.weights.leaves)} arrays"),
        ("x", str(spec.x)),
        ("y", str(spec.y)),
        ("predictions", str(spec.predictions)),
        ("forward_pass", "the model's own" if spec.has_own_forward_pass else "predict_on_batch and loss"),
        ("metrics", str(spec.metrics)),
        ("batching", _yes_unless(description.unbatchable_reason)),
        ("merging metrics states", _yes_unless(description.unmergeable_reason)),
        ("guard", description.guard),
        *(("warning", warning) for warning in description.warnings),
        *((function.title, _yes_unless(spec.unavailable.get(function, ""))) for function in Function),
    ):
        yield f"  {name}: {value}"


def _yes_unless(reason: str) -> str:
    return f"no: {reason}" if reason else "yes"
