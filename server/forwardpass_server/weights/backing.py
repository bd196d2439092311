"""Where sets of weights are kept besides the device."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Collection, Iterable
from typing import Protocol

from forwardpass.wire.dtypes import Array
from forwardpass.wire.manifests import TensorManifest, WeightsManifest


class Backing(Protocol):
    """A folder of this server, or a tier that servers share. Thread-safe.

    The methods block, except `has` of a folder. A principal has no access to the sets of another one. Each method
    raises OSError where it fails; that of a tier raises WeightStoreUnavailable or WeightStoreFull.
    """

    @property
    def threads(self) -> concurrent.futures.Executor | None:
        """Those that run the methods; None for the threads of the event loop."""

    def has(self, principal: str, weights_id: bytes) -> bool:
        """Whether a set is kept here."""

    def save(self, principal: str, manifest: WeightsManifest, arrays: Iterable[tuple[TensorManifest, Array]]) -> None:
        """Writes a set, unless it is kept here. arrays: each distinct tensor of the set with its elements."""

    def manifest(self, principal: str, weights_id: bytes) -> WeightsManifest:
        """The manifest of a set. Raises FileNotFoundError."""

    def tensors(
        self, principal: str, weights_id: bytes, wanted: Collection[TensorManifest]
    ) -> Iterable[tuple[TensorManifest, Array]]:
        """Tensors of a set with their elements. Raises TensorCorrupted or OSError; the set is deleted then."""

    def delete(self, principal: str, weights_id: bytes) -> None:
        """Deletes a set, if it is kept here."""
