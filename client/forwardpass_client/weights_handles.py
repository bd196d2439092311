"""Handles: references to weights that a server holds."""

from __future__ import annotations

import abc
import secrets
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from forwardpass import v1
from forwardpass.wire.methods import METHODS
from forwardpass_client import retries
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.processes import Connected
from forwardpass_client.transfers import Steps, Unary
from forwardpass_client.transport import AsyncTransport, Transport


class WeightsHandleApi(Connected, abc.ABC):
    """A reference to weights that a server holds, accepted wherever `model_weights` is.

    The id is a hash of the numbers and their containers: equal weights have the same id on every client and server,
    also after a restart. A handle of `put_weights` keeps the arrays (not a copy: do not change them), and puts them
    again when the server has dropped them. A handle of `weights_handle` has no arrays and raises WeightsNotFound then.
    """

    def __init__(self, held: HeldWeights, timeout_s: float | None) -> None:
        super().__init__(timeout_s)
        self.held = held
        self._lease_id = secrets.token_bytes(16)

    @property
    def id(self) -> str:
        """The weights id, 64 hexadecimal digits."""
        return self.held.weights_id.hex()

    def lease(self, ttl_s: float, *, timeout_s: float | None = None) -> Any:
        """Keeps the weights on the server for so many seconds from now, even when others need the room.

        ttl_s: seconds >= 0; 0 ends the lease. Each handle has one lease, and calling again renews it.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises WeightsNotFound, ServerUnavailable, DeadlineExceeded; ValueError and TypeError for another ttl_s.
        """
        deadline = self._deadline(timeout_s)
        if isinstance(ttl_s, (bool, str, bytes)):
            raise TypeError(f"ttl_s: expected seconds as a number, got {ttl_s!r}")
        if not 0 <= ttl_s < float("inf"):
            raise ValueError(f"ttl_s: expected seconds >= 0, got {ttl_s}")
        request = v1.LeaseWeightsRequest(weights_id=self.held.weights_id, lease_id=self._lease_id, ttl_s=ttl_s)
        return self._run("LeaseWeights", request, self.held, deadline)

    def delete(self, *, timeout_s: float | None = None) -> Any:
        """Drops the weights on the server. Calls that use them go on. Weights that are not there are no error.

        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises ServerUnavailable, DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run("DeleteWeights", v1.DeleteWeightsRequest(weights_id=self.held.weights_id), None, deadline)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id[:12]}>"

    def _run(self, method: str, request: Any, held: HeldWeights | None, deadline: Deadline) -> Any:
        attempt = Unary(METHODS[method].path, request.SerializeToString())
        return self._finish(retries.attempts(attempt, held, deadline), deadline)

    @abc.abstractmethod
    def _finish(self, steps: Steps, deadline: Deadline) -> Any:
        """Carries the steps out: returns None, or an awaitable of None."""


class WeightsHandle(WeightsHandleApi):
    """A reference to weights that a server holds, accepted wherever `model_weights` is: see `WeightsHandleApi`."""

    def __init__(self, held: HeldWeights, transport: Transport, timeout_s: float | None) -> None:
        super().__init__(held, timeout_s)
        self.transport = transport

    if TYPE_CHECKING:

        def lease(self, ttl_s: float, *, timeout_s: float | None = None) -> None: ...

        def delete(self, *, timeout_s: float | None = None) -> None: ...

    def _finish(self, steps: Steps, deadline: Deadline) -> None:
        self.transport.run(steps, deadline, self.transport.route(self.held))


class AsyncWeightsHandle(WeightsHandleApi):
    """`WeightsHandle` for asyncio: the results of its methods are to be awaited."""

    def __init__(self, held: HeldWeights, transport: AsyncTransport, timeout_s: float | None) -> None:
        super().__init__(held, timeout_s)
        self.transport = transport

    if TYPE_CHECKING:

        def lease(self, ttl_s: float, *, timeout_s: float | None = None) -> Coroutine[Any, Any, None]: ...

        def delete(self, *, timeout_s: float | None = None) -> Coroutine[Any, Any, None]: ...

    async def _finish(self, steps: Steps, deadline: Deadline) -> None:
        deadline.restart()
        await self.transport.run(steps, deadline, self.transport.route(self.held))
