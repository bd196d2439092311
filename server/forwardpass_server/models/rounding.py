"""Finds values of a graph that rounding may change, and operations that use such a value as an index.

Kernels choose the order of summation by the number of rows, so that a row's floating-point numbers may differ in the
last bits between a batch of one call and a batch of several. This is harmless unless such a number becomes an integer
that selects an entry: then the last bit decides which entry the client gets.
"""

from __future__ import annotations

from typing import Any

from forwardpass_server.models.row_rules import Inseparable

# The operations of `row_rules` whose floating-point results do not depend, bit for bit, on the row's place and the size
# of the batch. They move numbers, or compute each number by one operation that IEEE 754 rounds correctly.
_EXACT = (
    "Abs Add AddV2 BroadcastTo Cast Ceil CheckNumerics ClipByValue ConcatV2 Conj Div EnsureShape ExpandDims Fill Floor "
    "GatherV2 Identity IdentityN Imag Max MaxPool MaxPool3D Maximum Min Minimum MirrorPad Mul Neg OneHot OnesLike Pack "
    "Pad PadV2 PreventGradient Real RealDiv Relu Relu6 Reshape ResizeNearestNeighbor ReverseV2 Rint Round SelectV2 "
    "Sign Snapshot Split SplitV Square Squeeze StopGradient StridedSlice StringToNumber Sub Tile TopKV2 Transpose "
    "Unpack ZerosLike"
)
_EXACT_TYPES = frozenset(_EXACT.split())

# The argument that selects entries, by operation.
_INDEX = {"GatherV2": 1, "OneHot": 0}


class Rounding:
    """Follows a graph, operation by operation, and remembers which tensors rounding may change."""

    def __init__(self) -> None:
        # The first operation that rounded, by tensor.
        self._origins: dict[str, Any] = {}

    def follow(self, operation: Any, rows: list[Any]) -> None:
        """Adds the next operation of the graph.

        rows: its results that hold rows; the others are the same for each batch.
        Raises Inseparable if it selects entries by numbers that rounding may change.
        """
        origins = [self._origins.get(tensor.name) for tensor in operation.inputs]
        index = _INDEX.get(operation.type)
        if index is not None and (origin := origins[index]) is not None:
            raise Inseparable(f"picks entries by numbers that {origin.type} ({origin.name}) rounds")
        found = next((origin for origin in origins if origin is not None), None)
        for tensor in rows:
            is_inexact = tensor.dtype.is_floating or tensor.dtype.is_complex
            if found is not None:
                self._origins[tensor.name] = found
            elif is_inexact and operation.type not in _EXACT_TYPES:
                self._origins[tensor.name] = operation
