"""Management of versions: load, reload and unload while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from forwardpass.wire import errors
from forwardpass.wire.description import ModelIdentity
from forwardpass_server.calls.model import ModelLoader, ModelSource
from forwardpass_server.calls.plans import Servable
from forwardpass_server.catalog import repository
from forwardpass_server.catalog.registry import Entry, Registry, State, version_labelled
from forwardpass_server.catalog.repository import FileStates
from forwardpass_server.catalog.version_policy import VersionPolicies
from forwardpass_server.process import background

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class VersionDetail:
    """One version, for operators.

    entry: its entry in the registry; None if it is not loaded. is_loadable: whether its files or its factory exist.
    labels: the labels that stand for it.
    """

    source: ModelSource
    entry: Entry | None
    is_loadable: bool
    labels: Sequence[str]


class ModelSessions(Protocol):
    """Metric sessions of models that are unloaded or replaced."""

    async def count(self, model: ModelIdentity) -> int:
        """The number of sessions of a model. If it is 0, no session is opened until the caller's next await.

        Raises SessionStoreUnavailable.
        """

    def retain(self, servable: Servable) -> None:
        """Keeps a model that is about to be unloaded or replaced, for its open sessions."""

    async def release(self) -> bool:
        """Drops retained models that have no sessions any more; returns whether it dropped any."""


class Management(Protocol):
    """The operations of an operator. All are idempotent. Models are given by name, never by path."""

    async def load(self, name: str, version: int, label: str = "") -> VersionDetail:
        """Loads a version unless it is available. Returns when it can be called.

        version: 0 for the highest in the repository. label: in place of a version; it is read from the model's
        forwardpass-versions.json now.
        Raises ModelNotFound, ModelVersionNotFound or ModelFailed.
        """

    async def reload(self, name: str, version: int, label: str = "") -> VersionDetail:
        """Loads a version again and replaces the loaded one. If the load fails, the former one stays in service.

        Arguments and errors: see `load`.
        """

    async def unload(self, name: str, version: int, label: str = "") -> None:
        """Unloads a version. Running calls that use it continue. Does nothing if it is not loaded.

        label: in place of a version; the present label of the registry.
        Raises ModelNotFound or ModelVersionNotFound for a label without a version. Raises ModelInUse or
        SessionStoreUnavailable if the server refuses to unload versions with sessions.
        """

    async def describe(self) -> list[VersionDetail]:
        """Every version that is loaded or could be loaded, ordered by name and version."""


class RegistryManagement:
    """Management of a registry: see Management.

    folder, factories: the sources of models, as given at the start. policies: the versions to serve, and their labels.
    on_change: called for each version after it was loaded, failed to load, or was unloaded.
    waits_for_sessions: refuse to unload a version that has sessions. Otherwise the version is unloaded, and its model
      stays in memory for the sessions.
    refresh: brings the folder up to date, and with it a version by the name of its model and its number, 0 for the
      highest; called on a thread. Raises OSError.
    """

    def __init__(
        self,
        registry: Registry,
        loader: ModelLoader,
        folder: pathlib.Path | None,
        factories: Mapping[str, str],
        policies: VersionPolicies,
        on_change: Callable[[ModelSource], Awaitable[None]],
        sessions: ModelSessions,
        waits_for_sessions: bool = False,
        refresh: Callable[[tuple[str, int] | None], None] = lambda asked: None,
    ) -> None:
        self._registry = registry
        self._loader = loader
        self._folder = folder
        self._factories = repository.from_factories(factories)
        self._policies = policies
        self._on_change = on_change
        self._sessions = sessions
        self._waits_for_sessions = waits_for_sessions
        self._refresh = refresh
        # The state of each version's files at its last load, successful or not.
        self._tried: dict[str, FileStates] = {}
        # Only one coroutine at a time changes the registry.
        self._writing = asyncio.Lock()

    @property
    def is_loading(self) -> bool:
        """Whether a version is being loaded. Its thread cannot be stopped; it ends with the load or the process."""
        return self._writing.locked()

    async def load(self, name: str, version: int, label: str = "") -> VersionDetail:
        """See `Management.load`."""
        return await self._load(name, version, label, reloads=False)

    async def reload(self, name: str, version: int, label: str = "") -> VersionDetail:
        """See `Management.reload`."""
        return await self._load(name, version, label, reloads=True)

    async def load_all(self) -> None:
        """Loads every version of the registry, one after another. A failed load does not stop the others."""
        async with self._writing:
            for entry in self._registry.entries():
                await self._load_one(entry.source)

    async def unload(self, name: str, version: int, label: str = "") -> None:
        """See `Management.unload`."""
        async with self._writing:
            await self._unload(ModelSource(name, self._registry.asked_for(name, version, label)))

    async def _unload(self, source: ModelSource) -> None:
        if self.serves(source):
            served = self._registry.get(source.name, source.version)
            count = await self._sessions.count(served.identity) if self._waits_for_sessions else 0
            if count:
                raise errors.ModelInUse(place=f"model {source}", expected="no open metric sessions", found=str(count))
            # No await since `count` returned 0: no session can have been opened.
            self._sessions.retain(served)
        if self._registry.unload(source.name, source.version):
            await self._sessions.release()
            await self._on_change(source)

    async def follow(self, source: ModelSource, files: FileStates) -> None:
        """Loads a version, or reloads it, unless its files are the same as at the last load.

        An error is stored with the version.
        """
        async with self._writing:
            if self._tried.get(str(source)) != files:
                await self._load_one(source)

    async def drop(self, source: ModelSource) -> bool:
        """Unloads a version that the repository or its policy does not serve any more.

        Returns False if the version must wait for its sessions to end; its entry then says so until the version is
        dropped or retained.
        """
        async with self._writing:
            try:
                await self._unload(source)
            except (errors.ModelInUse, errors.SessionStoreUnavailable) as error:
                if not self._registry.entry(source).waiting:
                    _LOGGER.info("the unload of model %s waits for its sessions: %s", source, error)
                self._registry.wait(source, f"to be unloaded; waits for its sessions: {error}")
                return False
            self._tried.pop(str(source), None)
            return True

    async def retain(self, source: ModelSource) -> None:
        """Cancels `drop` for a version that still waits for its sessions."""
        async with self._writing:
            if self.serves(source):
                self._registry.wait(source, "")

    def serves(self, source: ModelSource) -> bool:
        """Whether a version can be called."""
        return self._registry.is_available(source.name, source.version)

    def relabel(self) -> None:
        """Updates the labels of the registry from the policies. A label moves only to an available version."""
        self._registry.set_labels(self._policies.labels())

    async def describe(self) -> list[VersionDetail]:
        """See `Management.describe`."""
        found = {(one.name, one.version): one for one in await asyncio.to_thread(self._loadable)}
        entries = {(one.source.name, one.source.version): one for one in self._registry.entries()}
        return [
            self._detail(entries[key].source if key in entries else found[key], entries.get(key), key in found)
            for key in sorted(found.keys() | entries.keys())
        ]

    def _detail(self, source: ModelSource, entry: Entry | None, is_loadable: bool) -> VersionDetail:
        return VersionDetail(source, entry, is_loadable, self._registry.labels(source))

    async def _load(self, name: str, version: int, label: str, reloads: bool) -> VersionDetail:
        # The load continues if the call is cancelled.
        return await asyncio.shield(asyncio.ensure_future(self._load_in_turn(name, version, label, reloads)))

    async def _load_in_turn(self, name: str, version: int, label: str, reloads: bool) -> VersionDetail:
        async with self._writing:
            source = await asyncio.to_thread(self._find, name, version, label)
            # If the version is available already, only its label may have to move.
            self.relabel()
            served = [entry for entry in self._registry.entries() if str(entry.source) == str(source)]
            if reloads or not served or served[0].state is not State.AVAILABLE:
                loaded = await self._load_one(source)
                if loaded.servable is None:
                    raise errors.ModelFailed(f"model {source} failed to load: {loaded.error}")
            return self._detail(source, self._registry.entry(source), True)

    async def _load_one(self, source: ModelSource) -> Entry:
        if self.serves(source):
            self._sessions.retain(self._registry.get(source.name, source.version))
        entry = await background.run(functools.partial(self._load_files, source), "load")
        await self._sessions.release()
        self.relabel()
        await self._on_change(source)
        return entry

    def _load_files(self, source: ModelSource) -> Entry:
        if source.folder is not None:
            # Before the files are read: a change during the load then counts as a new state.
            self._tried.pop(str(source), None)
            with contextlib.suppress(OSError):
                self._tried[str(source)] = repository.file_states(source.folder)
        return self._registry.load(source, self._loader)

    def _find(self, name: str, version: int, label: str) -> ModelSource:
        try:
            # A label's version is always served.
            self._refresh(None if label else (name, version))
        except OSError as error:
            _LOGGER.warning("model repository: it cannot be read: %s", error)
        with contextlib.suppress(OSError):
            self._policies.refresh()
        versions = [source for source in self._loadable() if source.name == name]
        if not versions:
            raise errors.ModelNotFound(
                place="model", expected="the name of a model in the repository", found=repr(name[:128])
            )
        if label:
            version = version_labelled(name, label, self._policies.labels().get(name, {}))
        wanted = version or versions[-1].version
        for source in versions:
            if source.version == wanted:
                return source
        raise errors.ModelVersionNotFound(
            place=f"version of model {name!r}",
            expected=f"one of {', '.join(str(source.version) for source in versions[-10:])}",
            found=str(version),
        )

    def _loadable(self) -> list[ModelSource]:
        return self._factories + ([] if self._folder is None else repository.scan(self._folder, logging.DEBUG))
