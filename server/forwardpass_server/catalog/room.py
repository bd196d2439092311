"""Builds the catalogue of the models that a server serves from its start."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping

from forwardpass_server.calls import memory_budget
from forwardpass_server.catalog import repository
from forwardpass_server.catalog.mirror import RepositoryMirror, Version
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.catalog.version_policy import VersionPolicies
from forwardpass_server.errors import ModelLoadError, SettingsError
from forwardpass_server.storage import urls

_FLAG = "--model-repository"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CatalogRoom:
    """Which versions are served, and their state.

    folder: the repository, or the local copy of one with a URL; None if only factories are served. mirror: what keeps
    this copy; None without one.
    """

    folder: pathlib.Path | None
    mirror: RepositoryMirror | None
    policies: VersionPolicies
    registry: Registry

    def models_bytes(self) -> int:
        """The memory that the loaded models take, in bytes."""
        servables = [entry.servable for entry in self.registry.entries() if entry.servable is not None]
        return sum(memory_budget.model_bytes(one.model.initial_weights) for one in servables)

    def refresh(self, asked: Version | None = None) -> None:
        """Updates the local copy. asked: see `RepositoryMirror.refresh`. Raises OSError."""
        if self.mirror is not None:
            loaded = [(entry.source.name, entry.source.version) for entry in self.registry.entries()]
            self.mirror.refresh(loaded, asked)

    def close(self) -> None:
        """Removes the local copy."""
        if self.mirror is not None:
            self.mirror.close()


def build(
    model_repository: pathlib.Path | str | None, factories: Mapping[str, str], cache: pathlib.Path | None = None
) -> CatalogRoom:
    """The versions in the repository that its policies serve, and the factories' models.

    model_repository: a folder, or a URL, of which versions are copied to a new folder in `cache`; None for the folder
    of temporary files.
    Raises SettingsError for a repository or a version policy that cannot be read, and for a factory whose model is in
    the repository.
    """
    mirror = _mirror(model_repository, cache) if isinstance(model_repository, str) else None
    folder = model_repository if mirror is None else mirror.folder
    assert not isinstance(folder, str)
    try:
        policies = VersionPolicies(folder)
    except ModelLoadError as error:
        raise SettingsError(f"{_FLAG}: {error}") from None
    sources = repository.from_factories(factories)
    if folder is not None:
        found = repository.scan(folder)
        for taken in {str(source) for source in sources} & {str(source) for source in found}:
            raise SettingsError(f"--factory: the model repository has a {taken} already")
        sources += policies.served(found)
    return CatalogRoom(folder=folder, mirror=mirror, policies=policies, registry=Registry(sources))


def _mirror(url: str, cache: pathlib.Path | None) -> RepositoryMirror:
    """The local copy of a repository with a URL, with the versions that are served."""
    store = urls.open_store(url, _FLAG, is_written=False)
    try:
        store.open()
        mirror = RepositoryMirror(store, cache or pathlib.Path(tempfile.gettempdir()))
        mirror.refresh()
    except OSError as error:
        raise SettingsError(f"{_FLAG}: {url} cannot be copied: {error}") from None
    return mirror
