"""Graphs that TensorFlow computes wrong with oneDNN."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import graphs, private_tensorflow

_MATMULS = {"BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"}


def check(functions: Iterable[Any]) -> None:
    """Refuses graphs that multiply an array of rank 4 by one matrix, if TensorFlow uses oneDNN.

    functions: concrete functions. Raises ModelLoadError, which names the operation.
    """
    for concrete in functions:
        if reason := reason_against(concrete):
            raise ModelLoadError(f"{reason}: start the server with --onednn off, or fix that dimension in input_spec")


def reason_against(concrete: Any) -> str:
    """What TensorFlow computes wrong in a concrete function; "" if nothing is known.

    TensorFlow 2.21 gives wrong numbers, or corrupts its heap, where an array of rank 4 whose second dimension is 1 is
    multiplied by one matrix (TensorFlow issue 117700). The trial in a child process does not find this reliably.
    Bodies of loops are not judged.
    """
    if not private_tensorflow.uses_onednn() or _MATMULS.isdisjoint(graphs.operations(concrete)):
        return ""
    for operation in private_tensorflow.inlined_graph(concrete).get_operations():
        if operation.type not in _MATMULS:
            continue
        left, right = (tensor.shape for tensor in operation.inputs)
        if _may_have_second_of_one(left) and _may_be_one_matrix(right):
            return (
                f"operation {operation.name!r} multiplies an array of shape {left} by a matrix of shape {right}, "
                "which TensorFlow computes wrong with oneDNN if the second dimension is 1"
            )
    return ""


def _may_have_second_of_one(shape: tf.TensorShape) -> bool:
    return shape.rank is None or (shape.rank == 4 and shape[1] in (None, 1))


def _may_be_one_matrix(shape: tf.TensorShape) -> bool:
    """Whether an array may hold a single matrix, which is multiplied with each matrix of another array."""
    return shape.rank is None or all(dim == 1 for dim in shape[:-2])
