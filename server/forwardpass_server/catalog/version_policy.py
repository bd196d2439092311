"""Version policies: the versions to serve and their labels, from a file in each model's folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog import repository
from forwardpass_server.errors import ModelLoadError

_LOGGER = logging.getLogger(__name__)

FILE = "forwardpass-versions.json"
"""The file's name. Its contents: `{"serve": "all", "labels": {"stable": 3, "canary": 4}}`.

"serve" may also be `{"latest": 2}` or a list of versions.
"""

_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersionPolicy:
    """The policy of one model.

    latest: serve this number of the highest versions. versions: serve these. If both are None, serve all versions.
    labels: versions by label.
    """

    latest: int | None = None
    versions: frozenset[int] | None = None
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def served(self, versions: Iterable[int]) -> set[int]:
        """The versions to serve, out of those that exist. A version with a label is always served."""
        there = sorted(versions)
        wanted = set(there if self.versions is None else self.versions)
        if self.latest is not None:
            wanted = set(there[-self.latest :])
        return (wanted | set(self.labels.values())).intersection(there)


def parse(text: bytes) -> VersionPolicy:
    """Parses the contents of a file. Raises ModelLoadError, which names the place."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ModelLoadError(f"{FILE}: expected JSON: {error}") from None
    if not isinstance(found, dict) or not found.keys() <= {"serve", "labels"}:
        raise ModelLoadError(f"{FILE}: expected an object of serve and labels, got {text[:100]!r}")
    labels = found.get("labels", {})
    if (
        not isinstance(labels, dict)
        or not all(map(_LABEL.fullmatch, labels))
        or not all(map(_is_count, labels.values()))
    ):
        raise ModelLoadError(f"{FILE}: labels: expected versions by names like {_LABEL.pattern}, got {labels}")
    serve = found.get("serve", "all")
    if serve == "all":
        return VersionPolicy(labels=labels)
    if isinstance(serve, dict) and serve.keys() == {"latest"} and _is_count(serve["latest"]):
        return VersionPolicy(latest=serve["latest"], labels=labels)
    if isinstance(serve, list) and serve and all(map(_is_count, serve)):
        return VersionPolicy(versions=frozenset(serve), labels=labels)
    raise ModelLoadError(f'{FILE}: serve: expected "all", {{"latest": N}} or a list of versions, got {serve}')


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


class VersionPolicies:
    """The policies of all models of a repository. A file that cannot be read leaves the former policy in place."""

    def __init__(self, folder: pathlib.Path | None) -> None:
        """folder: the repository, or None. Raises ModelLoadError for a file that cannot be read."""
        self._folder = folder
        self._policies: dict[str, VersionPolicy] = {}
        self._failures: dict[str, str] = {}
        for name in self._names():
            try:
                self._read(name)
            except ModelLoadError as error:
                raise ModelLoadError(f"{name}/{error}") from None
            except OSError as error:
                raise ModelLoadError(f"{name}/{FILE}: it cannot be read ({error.strerror})") from None

    @property
    def are_good(self) -> bool:
        """Whether the last read of each file succeeded."""
        return not self._failures

    def refresh(self) -> None:
        """Reads the files again. Raises OSError if the repository cannot be listed."""
        names = self._names()
        for gone in self._failures.keys() - set(names):
            del self._failures[gone]
        for name in names:
            try:
                self._read(name)
            except (ModelLoadError, OSError) as error:
                # Logged once for each failure, not at each read.
                if self._failures.get(name) != str(error):
                    self._failures[name] = str(error)
                    _LOGGER.error("model %s: the former versions and labels stay in use: %s", name, error)

    def _names(self) -> Sequence[str]:
        return [] if self._folder is None else repository.look(self._folder).models

    def _read(self, name: str) -> None:
        assert self._folder is not None
        file = self._folder / name / FILE
        self._policies[name] = parse(file.read_bytes()) if file.exists() else VersionPolicy()
        self._failures.pop(name, None)

    def served(self, sources: Sequence[ModelSource]) -> list[ModelSource]:
        """The versions to serve, out of those in the repository."""
        versions: dict[str, set[int]] = {}
        for source in sources:
            versions.setdefault(source.name, set()).add(source.version)
        wanted = {name: self._of(name).served(there) for name, there in versions.items()}
        return [source for source in sources if source.version in wanted[source.name]]

    def labels(self) -> dict[str, Mapping[str, int]]:
        """The labels of each model: versions by label, by the name of the model."""
        return {name: policy.labels for name, policy in self._policies.items()}

    def _of(self, name: str) -> VersionPolicy:
        return self._policies.get(name) or VersionPolicy()
