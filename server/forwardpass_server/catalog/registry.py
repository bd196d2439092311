"""The registry: the models and versions of a server, and their states."""

from __future__ import annotations

import dataclasses
import enum
import logging
import time
from collections.abc import Iterable, Mapping

from forwardpass.wire import errors
from forwardpass_server.calls.model import ModelLoader, ModelSource
from forwardpass_server.calls.plans import Servable
from forwardpass_server.errors import ModelLoadError

_LOGGER = logging.getLogger(__name__)


class State(enum.Enum):
    """The state of a version. A version that failed to reload stays AVAILABLE."""

    LOADING = "loading"
    AVAILABLE = "available"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One version of a model.

    servable: None until the version is available. error: why the load, or a later reload, failed; else "".
    waiting: why a version that is to be unloaded is still served; else "".
    """

    source: ModelSource
    state: State
    servable: Servable | None = None
    error: str = ""
    waiting: str = ""


class Registry:
    """All versions. One thread at a time may write, any thread may read: each write replaces whole dictionaries."""

    def __init__(self, sources: Iterable[ModelSource]) -> None:
        self._entries: dict[str, dict[int, Entry]] = {}
        self._labels: dict[str, dict[str, int]] = {}
        for source in sources:
            self._entries.setdefault(source.name, {})[source.version] = Entry(source, State.LOADING)

    def load(self, source: ModelSource, loader: ModelLoader) -> Entry:
        """Loads one version, adds or replaces its entry, and returns the entry.

        An error is logged and stored in the entry, not raised. If the version is available already, it stays so.
        """
        former = self._entries.get(source.name, {}).get(source.version)
        if former is None:
            self._put(Entry(source, State.LOADING))
        started = time.monotonic()
        try:
            servable = Servable(loader.load(source))
        except (Exception, SystemExit) as error:  # A model's files and code may raise anything.
            entry = Entry(source, State.FAILED, error=_log_failure(source, error))
        else:
            _LOGGER.info("model %s is available after %.2f s", source, time.monotonic() - started)
            entry = Entry(source, State.AVAILABLE, servable)
        is_kept = entry.servable is None and former is not None and former.servable is not None
        self._put(dataclasses.replace(former, error=entry.error) if former is not None and is_kept else entry)
        return entry

    def _put(self, entry: Entry) -> None:
        name, version = entry.source.name, entry.source.version
        self._entries = {**self._entries, name: {**self._entries.get(name, {}), version: entry}}

    def wait(self, source: ModelSource, why: str) -> None:
        """Records why a version that is to be unloaded is still served; "" if it is not to be unloaded."""
        self._put(dataclasses.replace(self.entry(source), waiting=why))

    def unload(self, name: str, version: int) -> bool:
        """Removes a version, and returns whether it existed. Running calls that use it continue."""
        if version not in self._entries.get(name, {}):
            return False
        versions = {number: entry for number, entry in self._entries.get(name, {}).items() if number != version}
        others = {other: entries for other, entries in self._entries.items() if other != name}
        self._entries = {**others, name: versions} if versions else others
        _LOGGER.info("model %s/%d is unloaded", name, version)
        return True

    def entry(self, source: ModelSource) -> Entry:
        """The entry of a version that the registry has."""
        return self._entries[source.name][source.version]

    def count(self, state: State) -> int:
        """The number of versions in a state."""
        return sum(entry.state is state for entry in self.entries())

    def is_available(self, name: str, version: int = 0) -> bool:
        """Whether a version of a model is available; 0 for any."""
        return any(
            entry.state is State.AVAILABLE and version in (0, number)
            for number, entry in self._entries.get(name, {}).items()
        )

    def entries(self) -> list[Entry]:
        """Every version of every model, ordered by name and version."""
        return [entry for _, versions in sorted(self._entries.items()) for _, entry in sorted(versions.items())]

    def versions(self, name: str) -> list[Entry]:
        """Every version of one model, in ascending order. Raises ModelNotFound."""
        versions = self._entries.get(name)
        if versions is None:
            raise errors.ModelNotFound(place="model", expected=_one_of(self._entries), found=repr(name[:128]))
        return [entry for _, entry in sorted(versions.items())]

    def set_labels(self, labels: Mapping[str, Mapping[str, int]]) -> None:
        """Sets the labels: versions by label, by the name of the model.

        A label moves only when its new version is available.
        """
        self._labels = {name: self._movable(name, wanted) for name, wanted in labels.items()}

    def _movable(self, name: str, wanted: Mapping[str, int]) -> dict[str, int]:
        former = self._labels.get(name, {})
        standing = {label: version for label, version in former.items() if self.is_available(name, version)}
        return {
            label: version if self.is_available(name, version) else standing.get(label, version)
            for label, version in wanted.items()
        }

    def labels(self, source: ModelSource) -> list[str]:
        """The labels of a version, sorted."""
        return sorted(
            label for label, version in self._labels.get(source.name, {}).items() if version == source.version
        )

    def labelled(self, name: str, label: str) -> int:
        """The version of a label; the version need not be loaded. Raises ModelNotFound or ModelVersionNotFound."""
        labels = self._labels.get(name, {})
        if label not in labels:
            self.versions(name)
        return version_labelled(name, label, labels)

    def asked_for(self, name: str, version: int, label: str) -> int:
        """The version of a label, or `version` if the label is "". Raises what `labelled` raises."""
        return self.labelled(name, label) if label else version

    def get(self, name: str, version: int) -> Servable:
        """The servable of a version; version 0 is the highest available one.

        Raises ModelNotFound, ModelVersionNotFound, ModelLoading or ModelFailed.
        """
        entry = self._entries.get(name, {}).get(version)
        if entry is None:
            entries = self.versions(name)
            if version:
                known = [str(entry.source.version) for entry in entries]
                raise errors.ModelVersionNotFound(
                    place=f"version of model {name!r}", expected=_one_of(known), found=str(version)
                )
            available = [entry for entry in entries if entry.state is State.AVAILABLE]
            entry = available[-1] if available else entries[-1]
        if entry.servable is not None:
            return entry.servable
        if entry.state is State.LOADING:
            raise errors.ModelLoading(f"model {entry.source} is still being loaded: retry later")
        raise errors.ModelFailed(f"model {entry.source} failed to load: {entry.error}")


def _log_failure(source: ModelSource, error: BaseException) -> str:
    """Logs why a model failed to load, and returns the sentence for callers.

    An expected error, such as an invalid file, is logged in one line; any other with its traceback.
    """
    is_explained = isinstance(error, (ModelLoadError, errors.ForwardPassError))
    needs_traceback = not is_explained or getattr(error, "needs_traceback", False)
    _LOGGER.error("model %s failed to load: %s", source, error, exc_info=error if needs_traceback else None)
    # The message of any other error may hold anything: it appears only in the log.
    return str(error) if is_explained else f"{type(error).__name__}: the server's log has the traceback"


def version_labelled(name: str, label: str, labels: Mapping[str, int]) -> int:
    """The version of a label. Raises ModelVersionNotFound, which lists the existing labels."""
    if label not in labels:
        raise errors.ModelVersionNotFound(
            place=f"label of model {name!r}",
            expected=f"one of {', '.join(sorted(labels)[:10])}" if labels else "none: the model has no labels",
            found=repr(label[:128]),
        )
    return labels[label]


def _one_of(names: Iterable[str]) -> str:
    listed = sorted(names)
    shown = ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")
    return f"one of {shown}" if listed else "no model: the server has none"
