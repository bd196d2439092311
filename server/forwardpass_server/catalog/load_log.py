"""The last load of each version: its time and duration."""

from __future__ import annotations

import dataclasses
import time
from typing import Protocol

from forwardpass_server.calls.model import LoadedModel, ModelLoader, ModelSource


class LoadObserver(Protocol):
    """Receives the loads."""

    def loaded(self, model: str, is_available: bool, seconds: float) -> None:
        """A load has ended. is_available: whether it succeeded. seconds: its duration."""


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """The last load of a version. ended_at: in seconds since 1970."""

    seconds: float
    ended_at: float


class ObservedLoader:
    """A ModelLoader that reports the loads of another one to an observer.

    `loads`: the last load of each version, by "name/version".
    """

    def __init__(self, loader: ModelLoader, observer: LoadObserver) -> None:
        self._loader = loader
        self._observer = observer
        self.loads: dict[str, Load] = {}

    def load(self, source: ModelSource) -> LoadedModel:
        """See `ModelLoader.load`."""
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
        """Removes the load of a version that is unloaded."""
        self.loads.pop(str(source), None)
