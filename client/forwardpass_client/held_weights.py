"""Weights by their id, with the steps that put them on a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from forwardpass.wire import errors, manifests
from forwardpass.wire.manifests import WeightsManifest
from forwardpass.wire.structures import Structure
from forwardpass_client import transfers
from forwardpass_client.deadlines import Deadline
from forwardpass_client.transfers import Progress, Steps

_ATTEMPTS = 4


class Puttable(Protocol):
    """Weights that a call names by id."""

    def put(self, deadline: Deadline) -> Steps:
        """Puts what the server lacks. Raises WeightsNotFound where this client has no arrays to send."""


class HeldWeights:
    """Weights by their id, with their arrays where this client has them.

    structure: the arrays themselves, not a copy: once they are changed, they cannot be put again.
    """

    def __init__(
        self, weights_id: bytes, manifest: WeightsManifest | None = None, structure: Structure | None = None
    ) -> None:
        self.weights_id = weights_id
        self._manifest = manifest
        self._structure = structure

    @classmethod
    def of(cls, structure: Structure) -> HeldWeights:
        """Weights whose arrays the caller has."""
        manifest = manifests.of_structure(structure, "model_weights")
        return cls(manifest.weights_id, manifest, structure)

    def put(self, deadline: Deadline, progress: Progress | None = None) -> Steps:
        """Puts the tensors that the server lacks. Raises WeightsNotFound where this client has no arrays to send."""
        if self._manifest is None or self._structure is None:
            raise errors.WeightsNotFound(
                f"the server does not hold weights {self.weights_id.hex()}, and this handle has no arrays to send: "
                "call put_weights"
            )
        for attempts_left in reversed(range(_ATTEMPTS)):
            try:
                yield from transfers.put(self._manifest, self._structure, deadline, progress)
            except errors.TensorCorrupted as error:
                if manifests.of_structure(self._structure, "model_weights") != self._manifest:
                    raise errors.WeightsNotFound(
                        f"weights {self.weights_id.hex()} cannot be sent again, because their arrays were changed "
                        "after put_weights: put the changed arrays"
                    ) from error
                # Another client had begun the same tensor with other bytes; the server has dropped these.
                if not attempts_left:
                    raise
            else:
                return

    @property
    def size_bytes(self) -> int | None:
        """The size of the distinct tensors; None without the arrays."""
        return None if self._manifest is None else self._manifest.size_bytes

    @property
    def has_arrays(self) -> bool:
        """Whether this client has the arrays, so that it can put them."""
        return self._structure is not None


class SeveralHeldWeights:
    """The weights of one call that names several."""

    def __init__(self, sets: Sequence[HeldWeights]) -> None:
        self._sets = {one.weights_id: one for one in sets if one.has_arrays}
        self._first = sets[0]

    def put(self, deadline: Deadline) -> Steps:
        """Puts each set of which this client has the arrays: a server that has them is sent their hashes only.

        Raises WeightsNotFound where it has the arrays of none.
        """
        for one in self._sets.values() or [self._first]:
            yield from one.put(deadline)
