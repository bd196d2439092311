"""Watches the model repository: loads new versions, reloads changed ones, unloads removed ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence

from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog import repository
from forwardpass_server.catalog.management import RegistryManagement
from forwardpass_server.catalog.repository import FileStates
from forwardpass_server.catalog.version_policy import VersionPolicies

_LOGGER = logging.getLogger(__name__)


class RepositoryWatch:
    """Applies the changes of a repository to the served versions.

    A version is loaded only when two successive looks find the same state of its files: files may still be being
    copied.

    policies: the versions to serve. known: the versions of the repository that were loaded at the start.
    refresh: brings the folder up to date; called on a thread. Raises OSError.
    """

    def __init__(
        self,
        management: RegistryManagement,
        folder: pathlib.Path,
        policies: VersionPolicies,
        known: Sequence[ModelSource],
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._management = management
        self._folder = folder
        self._policies = policies
        self._refresh = refresh
        # Without versions that an operator loaded against the policy: only the operator unloads those.
        self._known = {str(source): source for source in known}
        self._seen: dict[str, FileStates | None] = dict.fromkeys(self._known)
        # Versions that are to be unloaded, and wait for their sessions.
        self._waiting: set[str] = set()
        self._skipped: frozenset[str] = frozenset()
        self._failure = ""
        self._has_failed = False
        # The start has logged these entries already.
        with contextlib.suppress(OSError):
            self._skipped = frozenset(repository.look(folder).skipped)

    @property
    def is_good(self) -> bool:
        """Whether the last look succeeded."""
        return not self._failure and not self._has_failed and self._policies.are_good

    async def watch(self, every_s: float) -> None:
        """Calls `look` every `every_s` seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
                self._has_failed = False
            except Exception:  # Any exception: the watch must not end.
                _LOGGER.exception("model repository: the check for changes failed")
                self._has_failed = True

    async def look(self) -> None:
        """Loads new and changed versions, one after another, then unloads the versions that are not to be served."""
        try:
            found, unreadable = await asyncio.to_thread(self._scan)
        except OSError as error:
            self._warn(f"it cannot be read: {error}")
            return
        if self._known and not found:
            # Probably a volume that is not mounted: removing all models at once is unlikely.
            self._warn("it is empty")
            return
        self._failure = ""
        seen, self._seen = self._seen, {name: files for name, (_, files) in found.items()}
        wanted = {str(source): source for source in self._policies.served([source for source, _ in found.values()])}
        self._known |= wanted
        for name, source in wanted.items():
            files = found[name][1]
            if files is not None and seen.get(name) == files:
                await self._management.follow(source, files)
        self._management.relabel()
        for name, source in list(self._known.items()):
            # A folder that cannot be read now is not removed.
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
        """Whether the policy has dropped a version and all versions to serve instead are available."""
        others = [one for one in wanted.values() if one.name == source.name]
        return str(source) not in wanted and bool(others) and all(map(self._management.serves, others))

    def _scan(self) -> tuple[dict[str, tuple[ModelSource, FileStates | None]], frozenset[str]]:
        """Every version with the states of its files, and the names of unreadable models.

        The states are None if files changed during the scan. A skipped entry is logged once, not at each look.
        """
        self._refresh()
        self._policies.refresh()
        contents = repository.look(self._folder)
        for sentence in contents.skipped:
            if sentence not in self._skipped:
                _LOGGER.warning("%s", sentence)
        self._skipped = frozenset(contents.skipped)
        return {str(source): (source, _file_states(source)) for source in contents.sources}, contents.unreadable

    def _warn(self, what: str) -> None:
        if what != self._failure:
            self._failure = what
            _LOGGER.warning("model repository: %s; the loaded models stay in service", what)


def _file_states(source: ModelSource) -> FileStates | None:
    assert source.folder is not None
    try:
        return repository.file_states(source.folder)
    except OSError:
        return None
