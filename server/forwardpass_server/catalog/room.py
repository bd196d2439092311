"""Builds the catalogue of the models that a server serves from its start."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from forwardpass_server.calls import memory_budget
from forwardpass_server.catalog import repository
from forwardpass_server.catalog.registry import Registry
from forwardpass_server.catalog.version_policy import VersionPolicies
from forwardpass_server.errors import ModelLoadError, SettingsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CatalogRoom:
    """Which versions are served, and their state."""

    policies: VersionPolicies
    registry: Registry

    def models_bytes(self) -> int:
        """The memory that the loaded models take, in bytes."""
        servables = [entry.servable for entry in self.registry.entries() if entry.servable is not None]
        return sum(memory_budget.model_bytes(one.model.initial_weights) for one in servables)


def build(model_repository: pathlib.Path | None, factories: Mapping[str, str]) -> CatalogRoom:
    """The versions in the repository that its policies serve, and the factories' models.

    Raises SettingsError for a version policy that cannot be read, and for a factory whose model is in the repository.
    """
    try:
        policies = VersionPolicies(model_repository)
    except ModelLoadError as error:
        raise SettingsError(f"--model-repository: {error}") from None
    sources = repository.from_factories(factories)
    if model_repository is not None:
        found = repository.scan(model_repository)
        for taken in {str(source) for source in sources} & {str(source) for source in found}:
            raise SettingsError(f"--factory: the model repository has a {taken} already")
        sources += policies.served(found)
    return CatalogRoom(policies=policies, registry=Registry(sources))
