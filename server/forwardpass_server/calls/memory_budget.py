"""How many bytes of requests and responses the memory of this process holds at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from forwardpass.wire.dtypes import Array

_MIB = 2**20

COPIES = 4
"""Of each byte of a request or of a response, at the worst moment: the highest figure of benchmarks/memory.py.

A request in one message is copied by gRPC in Python on its way from gRPC's buffer, and once more to the tensor. What
travels in pieces, as the SDK sends it from 8 MiB on, takes one copy.
"""

SAFETY_SHARE = 0.1
"""Of the memory: for what models compute in between, fragmentation of the heap, and messages that gRPC is receiving."""

BASE_BYTES = 640 * _MIB
"""A server on a CPU without a model: 585 MiB measured, most of it TensorFlow. On a GPU it is more, and is looked up."""

MODEL_BYTES = 16 * _MIB
"""One version without its weights: its graphs in TensorFlow's runtime."""

_WEIGHTS_COPIES = 2.1
"""Of a model's initial weights while it is served. Measured: 1.06 without oneDNN, 2.08 with its caching allocator."""

# Less than this would refuse whatever is not alone.
_LEAST_BYTES = 16 * _MIB


def model_bytes(initial_weights: Iterable[Array]) -> int:
    """What a version takes of the memory while it is served."""
    return MODEL_BYTES + int(_WEIGHTS_COPIES * sum(weight.nbytes for weight in initial_weights))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """memory_bytes: that the process may take. base_bytes: that it takes without a model.

    weights_bytes: that weights of callers may take of it; 0 where they are on a GPU.
    """

    memory_bytes: int
    base_bytes: int
    weights_bytes: int

    def messages_bytes(self, models_bytes: int) -> int:
        """How many bytes of requests and responses fit beside models of so many bytes."""
        usable = int(self.memory_bytes * (1 - SAFETY_SHARE))
        free = usable - max(self.base_bytes, BASE_BYTES) - self.weights_bytes - models_bytes
        return max(free // COPIES, _LEAST_BYTES)
