"""A model repository that a test writes, its registry, and who loads from it."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import threading
from typing import Any

from forwardpass.wire import errors
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.serving.management import RegistryManagement
from forwardpass_server.serving.models import ModelSource
from forwardpass_server.serving.registry import Registry, State
from forwardpass_server.serving.version_policy import FILE, VersionPolicies


class Loader:
    """Loads one real model for each source, when its gate is open; fails for folders that hold nothing."""

    def __init__(self, repository: pathlib.Path) -> None:
        self._loader = TensorFlowLoader("cpu")
        self._folder = repository / "no_metrics" / "1"
        self.started = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.loads = []

    def load(self, source):
        self.started.set()
        self.gate.wait(30)
        self.loads.append(str(source))
        if not (source.folder / "model").exists():
            raise KeyError("nothing in it")
        return self._loader.load(ModelSource(source.name, source.version, folder=self._folder))


class Situation:
    def __init__(self, repository: pathlib.Path, folder: pathlib.Path) -> None:
        self.folder = folder
        self.registry = Registry([])
        self.loader = Loader(repository)
        self.changes = []
        self.policies = VersionPolicies(folder)
        self.management = RegistryManagement(self.registry, self.loader, folder, {}, self.policies, self._change)
        self.sessions = collections.Counter()

    def refuse_with_sessions(self) -> None:
        """From now on what has `sessions`, by its name and version, is not unloaded; None cannot be counted."""
        self.management = RegistryManagement(
            self.registry, self.loader, self.folder, {}, self.policies, self._change, self._count_sessions
        )

    async def _count_sessions(self, model):
        if self.sessions[str(model)] is None:
            raise errors.SessionStoreUnavailable
        return self.sessions[str(model)]

    async def _change(self, source):
        self.changes.append(str(source))

    def write(self, name: str, version: int) -> pathlib.Path:
        folder = self.folder / name / str(version)
        folder.mkdir(parents=True)
        (folder / "model").touch()
        return folder

    def states(self) -> dict[str, State]:
        return {str(entry.source): entry.state for entry in self.registry.entries()}

    def rule(self, name: str, **policy: Any) -> None:
        """Writes a model's version policy."""
        (self.folder / name / FILE).write_text(json.dumps(policy))

    def overwrite(self, name: str, version: int) -> None:
        """Changes what is in a version's file, and no more."""
        file = self.folder / name / str(version) / "model"
        file.write_text("changed")
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
