"""Which values of a graph rounding may change, and whether one of them is used as an index.

Kernels choose their order of summing by the number of rows, so that a row's floating-point numbers may differ in the
last bits between a batch of one call and a batch of several. That is harmless, as long as no such number is made an
integer that picks an entry: then the last bit decides which entry the caller gets.
"""

from __future__ import annotations

from typing import Any

from forwardpass_server.models.row_rules import Inseparable

# Of the operations that `row_rules` knows: those whose floating-point results are the same, bit for bit, at any place
# in a batch of any size. They move numbers, or compute each by one operation that IEEE 754 rounds correctly.
_EXACT = (
    "Abs Add AddV2 BroadcastTo Cast Ceil CheckNumerics ClipByValue ConcatV2 Conj Div EnsureShape ExpandDims Fill Floor "
    "GatherV2 Identity IdentityN Imag Max MaxPool MaxPool3D Maximum Min Minimum MirrorPad Mul Neg OneHot OnesLike Pack "
    "Pad PadV2 PreventGradient Real RealDiv Relu Relu6 Reshape ResizeNearestNeighbor ReverseV2 Rint Round SelectV2 "
    "Sign Snapshot Split SplitV Square Squeeze StopGradient StridedSlice StringToNumber Sub Tile TopKV2 Transpose "
    "Unpack ZerosLike"
)
_EXACT_TYPES = frozenset(_EXACT.split())

# The argument that picks entries, by operation.
_INDEX = {"GatherV2": 1, "OneHot": 0}


class Rounding:
    """Follows a graph, operation by operation, and remembers which tensors rounding may change."""

    def __init__(self) -> None:
        # By tensor: the operation that rounded first.
        self._origins: dict[str, Any] = {}

    def follow(self, operation: Any, rows: list[Any]) -> None:
        """Takes the next operation.

        rows: those of its results that hold rows; others are the same for each batch.
        Raises Inseparable where it picks entries by numbers that rounding may change.
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
