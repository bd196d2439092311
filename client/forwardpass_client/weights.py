"""Weights that a server holds, and what stands for them in a call."""

from __future__ import annotations

import abc
import secrets
from typing import Any

from forwardpass import v1
from forwardpass.wire import errors, manifests
from forwardpass.wire.manifests import WeightsManifest
from forwardpass.wire.methods import METHODS
from forwardpass.wire.structures import Structure
from forwardpass_client import transfers
from forwardpass_client.processes import OfOneProcess
from forwardpass_client.transfers import Progress, Steps, Unary
from forwardpass_client.transport import AsyncTransport, Transport

_ATTEMPTS = 4


class HeldWeights:
    """Weights by the id that their numbers give them, with the numbers where this side has them.

    structure: the arrays themselves, not a copy: with numbers that were changed since, nothing can be sent again.
    """

    def __init__(
        self, weights_id: bytes, manifest: WeightsManifest | None = None, structure: Structure | None = None
    ) -> None:
        self.weights_id = weights_id
        self._manifest = manifest
        self._structure = structure

    @classmethod
    def of(cls, structure: Structure) -> HeldWeights:
        """The weights that a caller has."""
        manifest = manifests.of_structure(structure, "model_weights")
        return cls(manifest.weights_id, manifest, structure)

    def put(self, progress: Progress | None = None) -> Steps:
        """Sends them, as far as the server lacks them. Raises WeightsNotFound where there are no numbers to send."""
        if self._manifest is None or self._structure is None:
            raise errors.WeightsNotFound(
                f"the server does not hold weights {self.weights_id.hex()}, and this handle has no numbers to send"
            )
        for attempts_left in reversed(range(_ATTEMPTS)):
            try:
                yield from transfers.put(self._manifest, self._structure, progress)
            except errors.TensorCorrupted as error:
                if manifests.of_structure(self._structure, "model_weights") != self._manifest:
                    raise errors.WeightsNotFound(
                        f"weights {self.weights_id.hex()} cannot be sent: their arrays were changed since"
                    ) from error
                # Another client began the same tensor with other bytes; the server has dropped them.
                if not attempts_left:
                    raise
            else:
                return

    @property
    def size_bytes(self) -> int | None:
        """What they take, tensors that stand in them several times counted once; None without the numbers."""
        return None if self._manifest is None else self._manifest.size_bytes


class WeightsHandleApi(OfOneProcess, abc.ABC):
    """Weights that a server holds under an id, to be passed wherever `model_weights` is.

    The id is a hash of the numbers and their containers: the same weights have the same id on every client, server
    and restart. A handle of `put_weights` keeps the arrays (not a copy: do not change them) and sends them again,
    unseen, to a server that has dropped them; one of `weights_handle` raises WeightsNotFound then.
    """

    def __init__(self, held: HeldWeights) -> None:
        self.held = held
        self._lease_id = secrets.token_bytes(16)

    @property
    def id(self) -> str:
        """The weights id, 64 hexadecimal digits."""
        return self.held.weights_id.hex()

    def lease(self, ttl_s: float) -> Any:
        """Keeps the weights on the server for so many seconds from now, whatever room others want; 0 ends that.

        Each handle has one lease; calling again renews it. Raises WeightsNotFound.
        """
        if not 0 <= ttl_s < float("inf"):
            raise ValueError(f"ttl_s: expected seconds >= 0, got {ttl_s}")
        request = v1.LeaseWeightsRequest(weights_id=self.held.weights_id, lease_id=self._lease_id, ttl_s=ttl_s)
        call = Unary(METHODS["LeaseWeights"].path, request.SerializeToString())
        return self._run(with_weights(self.held, call))

    def delete(self) -> Any:
        """Drops the weights on the server. Calls that use them go on; that they are not there is no error."""
        request = v1.DeleteWeightsRequest(weights_id=self.held.weights_id)
        return self._run(_call(Unary(METHODS["DeleteWeights"].path, request.SerializeToString())))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id[:12]}>"

    @abc.abstractmethod
    def _run(self, steps: Steps) -> Any:
        """Makes the calls: returns None, or what to await."""


class WeightsHandle(WeightsHandleApi):
    def __init__(self, held: HeldWeights, transport: Transport, timeout_s: float | None) -> None:
        super().__init__(held)
        self._transport = transport
        self._timeout_s = timeout_s

    def _run(self, steps: Steps) -> None:
        self._transport.run(steps, self._timeout_s)


class AsyncWeightsHandle(WeightsHandleApi):
    """`WeightsHandle` for asyncio: the results of its methods are to be awaited."""

    def __init__(self, held: HeldWeights, transport: AsyncTransport, timeout_s: float | None) -> None:
        super().__init__(held)
        self._transport = transport
        self._timeout_s = timeout_s

    async def _run(self, steps: Steps) -> None:
        await self._transport.run(steps, self._timeout_s)


def with_weights(held: HeldWeights, call: Unary) -> Steps:
    """A call that names weights; they are sent, and it again, where the server does not hold them."""
    try:
        return (yield call)
    except errors.WeightsNotFound:
        return (yield from after_put(held, call))


def after_put(held: HeldWeights, call: Unary) -> Steps:
    """A call that names weights which the server does not hold: they are sent first."""
    yield from held.put()
    return (yield call)


def _call(call: Unary) -> Steps:
    return (yield call)
