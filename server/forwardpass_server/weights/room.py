"""Builds the weight store, and its folder on disk."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Protocol

from forwardpass_server.errors import SettingsError
from forwardpass_server.storage import urls
from forwardpass_server.weights.deletions import Deletions
from forwardpass_server.weights.files import WeightFiles
from forwardpass_server.weights.store import Device, StoreObserver, StoreOptions, WeightStore
from forwardpass_server.weights.tier import TierObserver, WeightTier

_FLAG = "--weights-folder"


class WeightsObserver(StoreObserver, TierObserver, Protocol):
    """Shows the sizes of the store and of its folder, besides what happens in the store and in the tier."""

    def store(
        self,
        used_bytes: Callable[[], int],
        budget_bytes: int,
        set_count: Callable[[], int],
        tensor_count: Callable[[], int],
        stacks_bytes: Callable[[], int],
    ) -> None:
        """Shows the weights on the device. The functions give the current values, on any thread.

        used_bytes: of tensors and unfinished uploads.
        tensor_count: a tensor that several sets share counts once. stacks_bytes: of stacks of sets.
        """

    def files(self, size_bytes: Callable[[], int], max_bytes: int, set_count: Callable[[], int]) -> None:
        """Shows the weights in the folder. size_bytes: of all tensors; max_bytes: their limit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """store: limits of the store on the device. folder: where sets are kept too; None for the device only.

    A path is a folder of this server, up to disk_bytes. A URL is a tier that servers share.
    """

    store: StoreOptions
    folder: pathlib.Path | str | None = None
    disk_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsRoom:
    """The weight store, and what follows the deletions in its tier; None without a tier."""

    store: WeightStore
    deletions: Deletions | None = None


def build(options: WeightsOptions, device: Device, observer: WeightsObserver) -> WeightsRoom:
    """The weight store of a server. Raises SettingsError for a folder or a tier that cannot be used."""
    if isinstance(options.folder, str):
        tier = _tier(options.folder, observer)
        store = WeightStore(options.store, device, observer, tier)
        room = WeightsRoom(store=store, deletions=Deletions(store, tier))
    else:
        files = None if options.folder is None else _files(options.folder, options.disk_bytes, observer)
        store = WeightStore(options.store, device, observer, files)
        room = WeightsRoom(store=store)
    observer.store(
        lambda: store.used_bytes,
        options.store.budget_bytes,
        lambda: store.set_count,
        lambda: store.tensor_count,
        lambda: store.stacks_bytes,
    )
    return room


def _tier(url: str, observer: WeightsObserver) -> WeightTier:
    tier = WeightTier(urls.open_store(url, _FLAG, is_written=True), observer)
    try:
        tier.open()
    except OSError as error:
        raise SettingsError(f"{_FLAG}: {url}: {error}") from None
    return tier


def _files(folder: pathlib.Path, disk_bytes: int, observer: WeightsObserver) -> WeightFiles:
    try:
        files = WeightFiles(folder, disk_bytes)
    except OSError as error:
        raise SettingsError(f"{_FLAG}: {error}") from None
    observer.files(lambda: files.size_bytes, disk_bytes, lambda: files.set_count)
    return files
