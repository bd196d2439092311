"""Finds values of a graph that rounding may change, and operations that use such a value as an index.

Kernels choose the order of summation by the number of rows, so that a row's floating-point numbers may differ in the
last bits between a batch of one call and a batch of several. This is harmless unless such a number becomes an integer
that selects an entry: then the last bit decides which entry the client gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from forwardpass_server.models import row_kinds
from forwardpass_server.models.row_kinds import Inseparable, Kind, Pieces, Rows

# The operations with rules whose floating-point results do not depend, bit for bit, on the row's place and the size
# of the batch. They move numbers, or compute each number by one operation that IEEE 754 rounds correctly.
_EXACT = (
    "Abs Add AddV2 BatchToSpaceND BroadcastTo Cast Ceil CheckNumerics ClipByValue ConcatV2 Conj ConjugateTranspose "
    "DepthToSpace Div EnsureShape ExpandDims Fill Floor GatherNd GatherV2 Imag MatrixBandPart Max MaxPool MaxPool3D "
    "Maximum Min Minimum MirrorPad Mul Neg OneHot OnesLike Pack Pad PadV2 Real RealDiv Relu Relu6 Reshape "
    "ResizeNearestNeighbor ReverseSequence ReverseV2 Rint Roll Round SelectV2 Sign Slice SpaceToBatchND "
    "SpaceToDepth Split SplitV Square Squeeze StridedSlice StringToNumber Sub TensorListFromTensor "
    "TensorListGetItem TensorListStack Tile TopKV2 Transpose Unpack ZerosLike"
)
_EXACT_TYPES = frozenset(_EXACT.split())

# The argument that selects entries, by operation.
_INDEX = {"GatherV2": 1, "GatherNd": 1, "OneHot": 0, "LookupTableFindV2": 1, "DenseBincount": 0, "ReverseSequence": 1}


def followed(operation: Any, arguments: Sequence[Kind], results: Sequence[Kind]) -> list[Kind]:
    """The results of an operation, each with the first operation that rounded its numbers.

    Raises Inseparable if the operation selects entries by numbers that rounding may change.
    """
    origins = [row_kinds.rounded(kind) for kind in arguments]
    index = _INDEX.get(operation.type)
    if index is not None and origins[index]:
        raise Inseparable(f"picks entries by numbers that {origins[index]} rounds")
    origin = next(filter(None, origins), "")
    found = []
    for tensor, kind in zip(operation.outputs, results, strict=True):
        is_inexact = tensor.dtype.is_floating or tensor.dtype.is_complex
        own = f"{operation.type} ({operation.name})" if is_inexact and operation.type not in _EXACT_TYPES else ""
        if isinstance(kind, Rows | Pieces) and not kind.rounded:
            kind = dataclasses.replace(kind, rounded=origin or own)
        found.append(kind)
    return found
