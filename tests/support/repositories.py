"""A model repository that a test writes, its registry, and who loads from it."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import threading
from typing import Any

from forwardpass.wire import errors
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog.management import RegistryManagement
from forwardpass_server.catalog.registry import Registry, State
from forwardpass_server.catalog.version_policy import FILE, VersionPolicies
from forwardpass_server.models.loading import TensorFlowLoader


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


class OpenSessions(collections.Counter):
    """How many sessions there are, as a test has it, by the name and version of the model; None cannot be counted.

    left: the models that were to be left, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left = []

    async def count(self, model):
        if self[str(model)] is None:
            raise errors.SessionStoreUnavailable
        return self[str(model)]

    def retain(self, servable):
        self.left.append(servable)

    async def release(self):
        return False


class Situation:
    def __init__(self, repository: pathlib.Path, folder: pathlib.Path) -> None:
        self.folder = folder
        self.registry = Registry([])
        self.loader = Loader(repository)
        self.changes = []
        self.policies = VersionPolicies(folder)
        self.sessions = OpenSessions()
        self.management = self._manage()

    def wait_for_sessions(self) -> None:
        """From now on a version that has sessions is not unloaded."""
        self.management = self._manage(waits_for_sessions=True)

    def _manage(self, **options: Any) -> RegistryManagement:
        return RegistryManagement(
            self.registry, self.loader, self.folder, {}, self.policies, self._change, self.sessions, **options
        )

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
