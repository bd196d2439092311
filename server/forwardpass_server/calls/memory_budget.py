"""Computes how many bytes of requests and responses fit into the memory of this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from forwardpass.wire.dtypes import Array

_MIB = 2**20

COPIES = 4
"""The largest number of copies of a request or response at one moment: the highest figure of benchmarks/memory.py.

gRPC copies a request of one message into Python's memory, and it is copied once more into a tensor. A request that
travels in pieces, as the SDK sends it from 8 MiB on, takes one copy.
"""

SAFETY_SHARE = 0.1
"""The share of the memory for intermediate tensors, heap fragmentation, and messages that gRPC is receiving."""

BASE_BYTES = 640 * _MIB
"""A server on a CPU without a model: 585 MiB measured, most of it TensorFlow. On a GPU it is more, and is measured."""

MODEL_BYTES = 16 * _MIB
"""The memory of one version without its weights: its graphs in TensorFlow's runtime."""

_WEIGHTS_COPIES = 2.1
"""Copies of a model's initial weights while it is loaded. Measured: 1.06 without oneDNN, 2.08 with its allocator."""

# A smaller limit would refuse nearly all concurrent calls.
_LEAST_BYTES = 16 * _MIB


def model_bytes(initial_weights: Iterable[Array]) -> int:
    """The memory that one version of a model takes."""
    return MODEL_BYTES + int(_WEIGHTS_COPIES * sum(weight.nbytes for weight in initial_weights))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """memory_bytes: that the process may use. base_bytes: that it uses without a model.

    weights_bytes: the share of the weight store; 0 if the store is on a GPU.
    """

    memory_bytes: int
    base_bytes: int
    weights_bytes: int

    def messages_bytes(self, models_bytes: int) -> int:
        """The bytes of requests and responses that fit beside models of so many bytes."""
        usable = int(self.memory_bytes * (1 - SAFETY_SHARE))
        free = usable - max(self.base_bytes, BASE_BYTES) - self.weights_bytes - models_bytes
        return max(free // COPIES, _LEAST_BYTES)
