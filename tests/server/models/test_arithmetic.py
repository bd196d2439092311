"""Sums of tensors: the same numbers on the host, by TensorFlow, and by plain NumPy."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwardpass_server.models import arithmetic
from forwardpass_server.models.placement import CPU, TensorFlowDevice

# A scalar, empty arrays, and arrays of less than one block, of one, and of more.
SHAPES = [(), (0,), (3, 0, 2), (1,), (2, 3, 5), (2**16,), (2**16 + 1,), (3, 70_000)]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# The dtype of the leaves, and that of their sum.
SUMS = [
    (np.dtype(np.float16), np.dtype(np.float32)),
    (BFLOAT16, np.dtype(np.float32)),
    (np.dtype(np.float32), np.dtype(np.float32)),
    (np.dtype(np.float64), np.dtype(np.float64)),
    (np.dtype(np.complex64), np.dtype(np.complex64)),
    (np.dtype(np.complex128), np.dtype(np.complex128)),
    (np.dtype(np.float16), np.dtype(np.float64)),
    (BFLOAT16, np.dtype(np.float64)),
    (np.dtype(np.float32), np.dtype(np.float64)),
    (np.dtype(np.complex64), np.dtype(np.complex128)),
]


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    array = np.asarray(rng.standard_normal(shape))
    if dtype.kind == "c":
        array = array + 1j * rng.standard_normal(shape)
    return np.asarray(array).astype(dtype)


def expected(arrays, coefficients, dtype: np.dtype) -> np.ndarray:
    """A running sum in NumPy, rounded after each product and each addition."""
    real = dtype.type(0).real.dtype.type
    products = [array.astype(dtype) * real(number) for array, number in zip(arrays, coefficients, strict=True)]
    return list(itertools.accumulate(products, np.add))[-1].astype(arrays[0].dtype)


class OtherDevice(TensorFlowDevice):
    """A CPU that is used as a GPU is: by operations of TensorFlow."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._is_host = False


@pytest.mark.parametrize("device", [TensorFlowDevice(CPU), OtherDevice(CPU)], ids=["host", "operations"])
@pytest.mark.parametrize("dtype, sum_dtype", SUMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sum_is_that_of_numpy_to_the_last_bit(device, dtype, sum_dtype, shape):
    rng = np.random.default_rng(0)
    arrays = [random(rng, shape, dtype) for _ in range(5)]
    coefficients = [0.1, -3.0, 1 / 3, 0.0, 1e-3]
    before = [np.copy(array) for array in arrays]
    terms = list(zip(map(device.place, arrays), coefficients, strict=True))
    # In two parts, as of a combination of many sets.
    total = device.add(None, terms[:2], sum_dtype)
    total = device.add(total, terms[2:], sum_dtype)
    found = device.fetch(device.rounded(total, dtype))
    assert found.shape == shape
    assert found.dtype == dtype
    wanted = expected(arrays, coefficients, sum_dtype)
    if isinstance(device, OtherDevice) and (dtype, sum_dtype) == (np.float16, np.float64):
        # TensorFlow converts float64 to float16 by way of float32, so the last bit may differ.
        assert np.array_equal(np.abs(found.view(np.int16) - wanted.view(np.int16)) <= 1, np.ones(shape, bool))
    else:
        assert np.array_equal(found, wanted)
    assert all(np.array_equal(array, copy) for array, copy in zip(arrays, before, strict=True))


@given(
    numbers=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=2, max_size=20),
    coefficients=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=6),
)
@settings(deadline=None, max_examples=60)
def test_infinities_nan_and_overflows_are_those_of_numpy(numbers, coefficients):
    array = np.float32(numbers)
    terms = [(array, number) for number in coefficients]
    with np.errstate(all="ignore"):
        wanted = expected([array] * len(terms), coefficients, np.dtype(np.float32))
    found = arithmetic.add_on_host(None, terms, np.dtype(np.float32))
    assert np.array_equal(found, wanted, equal_nan=True)


def test_the_result_shares_the_memory_of_the_sum():
    device = TensorFlowDevice(CPU)
    total = device.add(None, [(device.place(np.ones(1000, np.float32)), 2.0)], np.dtype(np.float32))
    assert np.shares_memory(device.fetch(device.rounded(total, np.dtype(np.float32))), total)
    longer = device.add(None, [(device.place(np.ones(1000, np.float32)), 2.0)], np.dtype(np.float64))
    rounded = arithmetic.round_on_host(longer, np.dtype(np.float32))
    assert np.shares_memory(device.fetch(device.place(rounded)), rounded)


def test_a_scalar_of_bfloat16_is_fetched_as_an_array():
    device = TensorFlowDevice(CPU)
    found = device.fetch(device.place(np.array(1.5, BFLOAT16)))
    assert (found.shape, found.dtype, float(found)) == ((), BFLOAT16, 1.5)
