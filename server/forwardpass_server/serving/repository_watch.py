"""The model repository, looked at again and again: what is served follows what is in it."""

from __future__ import annotations

import asyncio
import logging
import pathlib

from forwardpass_server.serving import repository
from forwardpass_server.serving.management import RegistryManagement
from forwardpass_server.serving.models import ModelSource
from forwardpass_server.serving.repository import FileStates

_LOGGER = logging.getLogger(__name__)


class RepositoryWatch:
    """What came, changed and went in a repository since it was last looked at.

    A change counts once two looks have found the same: files that are being copied are left alone until they rest.
    known: versions of the repository that are served already, or were tried.
    """

    def __init__(self, management: RegistryManagement, folder: pathlib.Path, known: list[ModelSource]) -> None:
        self._management = management
        self._folder = folder
        self._known = {str(source): source for source in known}
        self._seen: dict[str, FileStates | None] = dict.fromkeys(self._known)
        self._complaint = ""

    async def watch(self, every_s: float) -> None:
        """Looks every so many seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(every_s)
            await self.look()

    async def look(self) -> None:
        """Loads what is new or has changed, one after another, and then unloads what is gone."""
        try:
            found = await asyncio.to_thread(self._scan)
        except OSError as error:
            self._complain(f"it cannot be read: {error}")
            return
        if self._known and not found:
            # A volume that is not mounted looks like that; nobody takes all models out at once.
            self._complain("it is empty")
            return
        self._complaint = ""
        seen, self._seen = self._seen, {name: files for name, (_, files) in found.items()}
        for name, (source, files) in found.items():
            self._known[name] = source
            if files is not None and seen.get(name) == files:
                await self._management.follow(source, files)
        for name in self._known.keys() - found.keys() - seen.keys():
            await self._management.drop(self._known.pop(name))

    def _scan(self) -> dict[str, tuple[ModelSource, FileStates | None]]:
        """Every version, and its files; None for those that change under this very look."""
        # What cannot be served was said at the start, and need not be each time.
        sources = repository.scan(self._folder, logging.DEBUG)
        return {str(source): (source, _file_states(source)) for source in sources}

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
