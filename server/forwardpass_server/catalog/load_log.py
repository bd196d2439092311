"""Loads that are timed, and remembered as long as their versions are known."""

from __future__ import annotations

import dataclasses
import time
from typing import Protocol

from forwardpass_server.calls.model import LoadedModel, ModelLoader, ModelSource


class LoadObserver(Protocol):
    """Is told of each load that ended."""

    def loaded(self, model: str, is_available: bool, seconds: float) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """The last load of a version. ended_at: in seconds since 1970."""

    seconds: float
    ended_at: float


class ObservedLoader:
    """A loader that tells of its loads: see ModelLoader. `loads`: the last of each version."""

    def __init__(self, loader: ModelLoader, observer: LoadObserver) -> None:
        self._loader = loader
        self._observer = observer
        self.loads: dict[str, Load] = {}

    def load(self, source: ModelSource) -> LoadedModel:
        started, is_available = time.perf_counter(), False
        try:
            loaded = self._loader.load(source)
            is_available = True
            return loaded
        finally:
            seconds = time.perf_counter() - started
            self.loads[str(source)] = Load(seconds, time.time())
            self._observer.loaded(source.name, is_available, seconds)

    def forget(self, source: ModelSource) -> None:
        """Drops what is known of a version that is unloaded."""
        self.loads.pop(str(source), None)
