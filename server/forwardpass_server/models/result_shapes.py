"""Checks that results have the shapes that their graph describes, and corrects those of empty batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from forwardpass.wire import errors, specs
from forwardpass.wire.dtypes import Array
from forwardpass_server.calls.model import Leaf

Run = Callable[[Sequence[Leaf]], list[Array]]
_Shape = tuple[int | None, ...] | None


def checked(run: Run, concrete: Any) -> Run:
    """Wraps `run` of a concrete function: its results then have the shapes that the function describes.

    TensorFlow with oneDNN returns a convolution of zero rows in the shape of its input, such as (0, 8, 3) instead of
    [None, 6, 4]. Such a result gets the described shape. A free dimension other than the batch gets the size that it
    has in the results of one and of two rows of zeros. If these differ, the dimension depends on the rows and stays.

    The wrapped function raises ModelRefusedInput for a result that does not fit.
    """
    shapes = [_static_shape(tensor) for tensor in concrete.outputs]
    are_right = [_check(shape) for shape in shapes]

    def run_checked(leaves: Sequence[Leaf]) -> list[Array]:
        results = run(leaves)
        for is_right, result in zip(are_right, results, strict=True):
            if not is_right(result.shape):
                return _mended(results, shapes, lambda rows: run(_with_rows(leaves, rows)))
        return results

    return run_checked


def _static_shape(tensor: Any) -> _Shape:
    return None if tensor.shape.rank is None else tuple(tensor.shape.as_list())


def _check(shape: _Shape) -> Callable[[tuple[int, ...]], bool]:
    """The check whether a result has the shape. Each call makes it, so the common cases compare two tuples only."""
    if shape is None:
        return lambda found: True
    if None not in shape:
        return lambda found: found == shape
    rank, tail = len(shape), shape[1:]
    if None not in tail:
        return lambda found: found[1:] == tail and len(found) == rank
    # The free dimensions of an empty result cannot be checked.
    return lambda found: _fits(shape, found) and bool(found[0] or shape[0])


def _fits(shape: _Shape, found: Sequence[int]) -> bool:
    return shape is None or (len(found) == len(shape) and all(map(_same, shape, found)))


def _same(size: int | None, found: int) -> bool:
    return size is None or size == found


def _mended(results: Sequence[Array], shapes: Sequence[_Shape], run_zeros: Callable[[int], list[Array]]) -> list[Array]:
    """The results; those without rows get the described shape.

    run_zeros: returns the results of a number of rows of zeros.
    """
    mended = list(results)
    samples: list[list[Array]] = []
    for index, (result, shape) in enumerate(zip(results, shapes, strict=True)):
        if shape and shape[0] is None and result.shape[:1] == (0,):
            row: Sequence[int | None] = shape[1:]
            if None in row:
                # If the model refuses zeros, the shape is unknown, and the call fails.
                samples = samples or [run_zeros(1), run_zeros(2)]
                row = _common_row([sample[index].shape for sample in samples], result.shape)
            mended[index] = result.reshape((0, *row))
        if not _fits(shape, mended[index].shape):
            raise errors.ModelRefusedInput(
                f"The model returned an array of shape {specs.describe_shape(result.shape)}, expected "
                f"{specs.describe_shape(shape)} as its graph describes."
            )
    return mended


def _common_row(samples: Sequence[Sequence[int]], found: Sequence[int]) -> Sequence[int]:
    """The sizes after the batch dimension: those in which the samples agree, else those that were found."""
    if any(len(sample) != len(found) for sample in samples):
        return found[1:]
    return [one if one == two else size for one, two, size in zip(*samples, found, strict=True)][1:]


def _with_rows(leaves: Sequence[Leaf], rows: int) -> list[Leaf]:
    """The arguments, with rows of zeros or empty strings in those without rows."""
    return [
        np.full((rows, *leaf.shape[1:]), b"" if leaf.dtype.kind == "O" else 0, leaf.dtype)
        if isinstance(leaf, np.ndarray) and leaf.shape[:1] == (0,)
        else leaf
        for leaf in leaves
    ]
