"""Which versions are served, as an operator has it while the server runs."""

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
    """One version. entry: None where it is not loaded. is_loadable: its files, or its factory, are there.

    labels: what callers know it by.
    """

    source: ModelSource
    entry: Entry | None
    is_loadable: bool
    labels: Sequence[str]


class ModelSessions(Protocol):
    """What becomes of metric sessions whose model goes."""

    async def count(self, model: ModelIdentity) -> int:
        """How many a model has. After 0, none is opened before the caller awaits something else.

        Raises SessionStoreUnavailable.
        """

    def retain(self, servable: Servable) -> None:
        """Keeps a model that is about to be unloaded or replaced, for its open sessions."""

    async def release(self) -> bool:
        """Drops retained models that have no sessions any more; returns whether it dropped any."""


class Management(Protocol):
    """What an operator can do. Models are named, never located. Any method may be called again."""

    async def load(self, name: str, version: int, label: str = "") -> VersionDetail:
        """Loads a version, 0 for the highest that there is, unless it is available. Returns once it can be called.

        label: in place of a version, the one that it is to stand for, as its model's file says now.
        Raises ModelNotFound, ModelVersionNotFound or ModelFailed.
        """

    async def reload(self, name: str, version: int, label: str = "") -> VersionDetail:
        """Loads a version anew, whatever is served under its name until then. Raises what `load` raises.

        If it fails, what was served is served on.
        """

    async def unload(self, name: str, version: int, label: str = "") -> None:
        """Serves a version no longer. Calls that use it go on; that it is not served is no error.

        label: in place of a version, the one that callers know by it. Raises ModelNotFound, ModelVersionNotFound where
        it stands for none.
        Raises ModelInUse or SessionStoreUnavailable where a version is to wait for its sessions.
        """

    async def describe(self) -> list[VersionDetail]:
        """Every version that is served or could be, by name and version."""


class RegistryManagement:
    """Management of a registry, over what its operator named at the start: see Management.

    policies: which versions are served without being asked for, and their labels.
    on_change: is told of each version that was loaded, failed, or was unloaded.
    waits_for_sessions: a version that has any is not unloaded; else it is, and they are served on.
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
    ) -> None:
        self._registry = registry
        self._loader = loader
        self._folder = folder
        self._factories = repository.from_factories(factories)
        self._policies = policies
        self._on_change = on_change
        self._sessions = sessions
        self._waits_for_sessions = waits_for_sessions
        # What the files of each version were when it was last loaded, or tried.
        self._tried: dict[str, FileStates] = {}
        # One writes the registry at a time.
        self._writing = asyncio.Lock()

    @property
    def is_loading(self) -> bool:
        """Whether a version is being loaded, on a thread that only the end of the process can end."""
        return self._writing.locked()

    async def load(self, name: str, version: int, label: str = "") -> VersionDetail:
        return await self._load(name, version, label, anew=False)

    async def reload(self, name: str, version: int, label: str = "") -> VersionDetail:
        return await self._load(name, version, label, anew=True)

    async def load_all(self) -> None:
        """Loads every version that the registry knows, one after another, whatever becomes of each."""
        async with self._writing:
            for entry in self._registry.entries():
                await self._load_one(entry.source)

    async def unload(self, name: str, version: int, label: str = "") -> None:
        async with self._writing:
            await self._unload(ModelSource(name, self._registry.asked_for(name, version, label)))

    async def _unload(self, source: ModelSource) -> None:
        if self.serves(source):
            served = self._registry.get(source.name, source.version)
            count = await self._sessions.count(served.identity) if self._waits_for_sessions else 0
            if count:
                raise errors.ModelInUse(place=f"model {source}", expected="no open metric sessions", found=str(count))
            # Nothing is awaited in between: no session can be opened.
            self._sessions.retain(served)
        if self._registry.unload(source.name, source.version):
            await self._sessions.release()
            await self._on_change(source)

    async def follow(self, source: ModelSource, files: FileStates) -> None:
        """Loads a version, anew if it is loaded, unless its files are those that were tried last.

        What goes wrong is kept with the version.
        """
        async with self._writing:
            if self._tried.get(str(source)) != files:
                await self._load_one(source)

    async def drop(self, source: ModelSource) -> bool:
        """Unloads a version that is not to be served: should it be again, the same files are loaded again.

        Returns whether it is gone. One that has to wait for its sessions says so, until it is dropped or retained.
        """
        async with self._writing:
            try:
                await self._unload(source)
            except (errors.ModelInUse, errors.SessionStoreUnavailable) as error:
                if not self._registry.entry(source).waiting:
                    _LOGGER.info("model %s is not to be served any more, and waits for its sessions: %s", source, error)
                self._registry.wait(source, f"it is to be unloaded, and waits for its sessions: {error}")
                return False
            self._tried.pop(str(source), None)
            return True

    async def retain(self, source: ModelSource) -> None:
        """A version that was to be dropped, and had to wait, is to be served after all."""
        async with self._writing:
            if self.serves(source):
                self._registry.wait(source, "")

    def serves(self, source: ModelSource) -> bool:
        """Whether a version can be called."""
        return self._registry.is_available(source.name, source.version)

    def relabel(self) -> None:
        """Gives the versions the labels that they are to have, as far as they are available."""
        self._registry.set_labels(self._policies.labels())

    async def describe(self) -> list[VersionDetail]:
        found = {(one.name, one.version): one for one in await asyncio.to_thread(self._loadable)}
        entries = {(one.source.name, one.source.version): one for one in self._registry.entries()}
        return [
            self._detail(entries[key].source if key in entries else found[key], entries.get(key), key in found)
            for key in sorted(found.keys() | entries.keys())
        ]

    def _detail(self, source: ModelSource, entry: Entry | None, is_loadable: bool) -> VersionDetail:
        return VersionDetail(source, entry, is_loadable, self._registry.labels(source))

    async def _load(self, name: str, version: int, label: str, anew: bool) -> VersionDetail:
        # A load goes on whatever becomes of who asked for it.
        return await asyncio.shield(asyncio.ensure_future(self._load_in_turn(name, version, label, anew)))

    async def _load_in_turn(self, name: str, version: int, label: str, anew: bool) -> VersionDetail:
        async with self._writing:
            source = await asyncio.to_thread(self._find, name, version, label)
            # Where both versions are available, a label that has moved is all that there is to do.
            self.relabel()
            served = [entry for entry in self._registry.entries() if str(entry.source) == str(source)]
            if anew or not served or served[0].state is not State.AVAILABLE:
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
            # Before they are read: what changes meanwhile is another state.
            self._tried.pop(str(source), None)
            with contextlib.suppress(OSError):
                self._tried[str(source)] = repository.file_states(source.folder)
        return self._registry.load(source, self._loader)

    def _find(self, name: str, version: int, label: str) -> ModelSource:
        with contextlib.suppress(OSError):
            self._policies.refresh()
        versions = [source for source in self._loadable() if source.name == name]
        if not versions:
            raise errors.ModelNotFound(place="model", expected="one of the model repository", found=repr(name[:128]))
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
