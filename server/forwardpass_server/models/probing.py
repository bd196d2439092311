"""Random arrays for probes of a model, and the comparison of two results up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from forwardpass.wire import dtypes, specs
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import TensorSpec

# Relative to the largest number: kernels sum in another order for another number of rows.
_TOLERANCE = {
    "float16": 2e-2,
    "bfloat16": 1e-1,
    "float32": 1e-4,
    "float64": 1e-9,
    "complex64": 1e-4,
    "complex128": 1e-9,
}


def random(
    spec: TensorSpec,
    rows: int,
    rng: np.random.Generator,
    draw: Callable[[Sequence[int]], Array] | None = None,
    other: int | None = None,
) -> Array:
    """An array that fits a spec.

    rows: the size of a first dimension that is free. other: the size of the other free dimensions; None for `rows`.
    draw: floating-point numbers of a shape; None for those of a normal distribution.
    """
    shape = specs.zeros(spec, rows, rows if other is None else other).shape
    if spec.data_type is dtypes.STRING:
        return rng.choice(np.array([b"", b"a", b"bc"], object), shape)
    if spec.dtype.kind in "biu":
        # Small numbers: they may be indices.
        return rng.integers(0, 2, shape).astype(spec.dtype)
    return np.asarray((draw or rng.standard_normal)(shape)).astype(spec.dtype)


def agree(one: Array, other: Array, spec: TensorSpec) -> bool:
    """Whether two arrays of a spec are equal up to rounding. Arrays without floating-point numbers must be equal."""
    if one.shape != other.shape:
        return False
    tolerance = _TOLERANCE.get(spec.data_type.name)
    if tolerance is None:
        return bool(np.array_equal(one, other))
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    one, other = one.astype(wide), other.astype(wide)
    # Random inputs may give NaN or infinity, as the logarithm of a negative number does.
    scale = max(float(np.abs(one[np.isfinite(one)]).max(initial=0)), 1e-6)
    return bool(np.allclose(one, other, rtol=0, atol=tolerance * scale, equal_nan=True))
