"""The model repository, looked at again and again: what is served follows what is in it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
from collections.abc import Mapping, Sequence

from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog import repository
from forwardpass_server.catalog.management import RegistryManagement
from forwardpass_server.catalog.repository import FileStates
from forwardpass_server.catalog.version_policy import VersionPolicies

_LOGGER = logging.getLogger(__name__)


class RepositoryWatch:
    """What came, changed and went in a repository since it was last looked at.

    A change counts once two looks have found the same: files that are being copied are left alone until they rest.
    policies: which versions are to be served. known: those of the repository that were tried at the start.
    """

    def __init__(
        self,
        management: RegistryManagement,
        folder: pathlib.Path,
        policies: VersionPolicies,
        known: Sequence[ModelSource],
    ) -> None:
        self._management = management
        self._folder = folder
        self._policies = policies
        # Not those that an operator loads against the policy: they are the operator's to unload.
        self._known = {str(source): source for source in known}
        self._seen: dict[str, FileStates | None] = dict.fromkeys(self._known)
        # Those that are to be unloaded, and have to wait.
        self._waiting: set[str] = set()
        self._passed_over: frozenset[str] = frozenset()
        self._complaint = ""
        self._has_failed = False
        # The start has logged what it passed over: from here on only what is new is.
        with contextlib.suppress(OSError):
            self._passed_over = frozenset(repository.look(folder).passed_over)

    @property
    def is_good(self) -> bool:
        """Whether the last look found a repository that can be followed."""
        return not self._complaint and not self._has_failed and self._policies.are_good

    async def watch(self, every_s: float) -> None:
        """Looks every so many seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
                self._has_failed = False
            except Exception:  # Whatever it is: who watches must not end by it.
                _LOGGER.exception("model repository: a look at it failed")
                self._has_failed = True

    async def look(self) -> None:
        """Loads what is new or has changed, one after another, and then unloads what is gone, or served no longer."""
        try:
            found, unreadable = await asyncio.to_thread(self._scan)
        except OSError as error:
            self._complain(f"it cannot be read: {error}")
            return
        if self._known and not found:
            # A volume that is not mounted looks like that; nobody takes all models out at once.
            self._complain("it is empty")
            return
        self._complaint = ""
        seen, self._seen = self._seen, {name: files for name, (_, files) in found.items()}
        wanted = {str(source): source for source in self._policies.served([source for source, _ in found.values()])}
        self._known |= wanted
        for name, source in wanted.items():
            files = found[name][1]
            if files is not None and seen.get(name) == files:
                await self._management.follow(source, files)
        self._management.relabel()
        for name, source in list(self._known.items()):
            # A folder that cannot be read for now is still there.
            is_gone = name not in found and name not in seen and source.name not in unreadable
            if is_gone or (name in found and self._is_replaced(source, wanted)):
                if await self._management.drop(source):
                    self._waiting.discard(name)
                    del self._known[name]
                else:
                    self._waiting.add(name)
            elif name in self._waiting:
                self._waiting.remove(name)
                await self._management.retain(source)

    def _is_replaced(self, source: ModelSource, wanted: Mapping[str, ModelSource]) -> bool:
        """Whether a version need not be served any more, and those that shall be in its place can be called."""
        others = [one for one in wanted.values() if one.name == source.name]
        return str(source) not in wanted and bool(others) and all(map(self._management.serves, others))

    def _scan(self) -> tuple[dict[str, tuple[ModelSource, FileStates | None]], frozenset[str]]:
        """Every version and its files, None for those that change under this very look; and names of unreadable models.

        What is passed over is logged once, and not at each look.
        """
        self._policies.refresh()
        contents = repository.look(self._folder)
        for sentence in contents.passed_over:
            if sentence not in self._passed_over:
                _LOGGER.warning("%s", sentence)
        self._passed_over = frozenset(contents.passed_over)
        return {str(source): (source, _file_states(source)) for source in contents.sources}, contents.unreadable

    def _complain(self, what: str) -> None:
        if what != self._complaint:
            self._complaint = what
            _LOGGER.warning("model repository: %s; the models are served on as they are", what)


def _file_states(source: ModelSource) -> FileStates | None:
    assert source.folder is not None
    try:
        return repository.file_states(source.folder)
    except OSError:
        return None
