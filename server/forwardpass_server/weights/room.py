"""Builds the weight store, and its folder on disk."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Protocol

from forwardpass_server.errors import SettingsError
from forwardpass_server.weights.files import WeightFiles
from forwardpass_server.weights.store import Device, StoreObserver, StoreOptions, WeightStore


class WeightsObserver(StoreObserver, Protocol):
    """Shows the sizes of the store and of its folder, besides what happens in the store."""

    def store(
        self,
        used_bytes: Callable[[], int],
        budget_bytes: int,
        set_count: Callable[[], int],
        tensor_count: Callable[[], int],
    ) -> None:
        """Shows the weights on the device. The functions give the current values, on any thread.

        used_bytes: of tensors and unfinished uploads.
        tensor_count: a tensor that several sets share counts once.
        """

    def files(self, size_bytes: Callable[[], int], max_bytes: int, set_count: Callable[[], int]) -> None:
        """Shows the weights in the folder. size_bytes: of all tensors; max_bytes: their limit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """store: limits of the store on the device. folder: where sets are kept on disk too, up to disk_bytes; or None."""

    store: StoreOptions
    folder: pathlib.Path | None = None
    disk_bytes: int = 0


def build(options: WeightsOptions, device: Device, observer: WeightsObserver) -> WeightStore:
    """The weight store of a server. Raises SettingsError for a folder that cannot be used."""
    files = None
    if options.folder is not None:
        try:
            files = kept = WeightFiles(options.folder, options.disk_bytes)
        except OSError as error:
            raise SettingsError(f"--weights-folder: {error}") from None
        observer.files(lambda: kept.size_bytes, options.disk_bytes, lambda: kept.set_count)
    store = WeightStore(options.store, device, observer, files)
    observer.store(
        lambda: store.used_bytes, options.store.budget_bytes, lambda: store.set_count, lambda: store.tensor_count
    )
    return store
