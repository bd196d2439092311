"""One call of an RPC, without what sends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar

from forwardpass.wire.chunks import Pieces
from forwardpass_client.held_weights import HeldWeights

ResultT = TypeVar("ResultT")


@dataclasses.dataclass(frozen=True, slots=True)
class Call(Generic[ResultT]):
    """One call: the path of its method, its request, and the function that reads its answer.

    request: in pieces where it is long; the pieces share the memory of the caller's arrays.
    held: weights that the request names by id, instead of carrying them.
    """

    path: str
    request: bytes | Pieces
    read: Callable[[bytes], ResultT]
    held: HeldWeights | None = None

    def joined(self) -> Call[ResultT]:
        """The same call with its request in one piece: the caller may change the arrays from now on."""
        return dataclasses.replace(self, request=self.request.join()) if isinstance(self.request, Pieces) else self
