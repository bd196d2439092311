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

    TensorFlow 2.21 gives wrong numbers, or corrupts its heap, if the array's second dimension is 1 (TensorFlow issue
    117700). The trial in a child process does not find this reliably.
    functions: concrete functions; bodies of loops in them are not judged. Raises ModelLoadError, which names the
    operation.
    """
    if not private_tensorflow.uses_onednn():
        return
    for concrete in functions:
        if _MATMULS.isdisjoint(graphs.operations(concrete)):
            continue
        graph = private_tensorflow.inlined_graph(concrete)
        for operation in graph.get_operations():
            if operation.type not in _MATMULS:
                continue
            left, right = (tensor.shape for tensor in operation.inputs)
            if _may_have_second_of_one(left) and _may_be_one_matrix(right):
                raise ModelLoadError(
                    f"operation {operation.name!r} multiplies an array of shape {left} by a matrix of shape {right}, "
                    "which TensorFlow computes wrong with oneDNN if the second dimension is 1: start the server with "
                    "--onednn off, or fix that dimension in input_spec"
                )


def _may_have_second_of_one(shape: tf.TensorShape) -> bool:
    return shape.rank is None or (shape.rank == 4 and shape[1] in (None, 1))


def _may_be_one_matrix(shape: tf.TensorShape) -> bool:
    """Whether an array may hold a single matrix, which is multiplied with each matrix of another array."""
    return shape.rank is None or all(dim == 1 for dim in shape[:-2])
