"""The element types of the wire and their numpy counterparts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from forwardpass import v1
from forwardpass.wire import errors

try:
    import ml_dtypes
except ImportError:  # An optional dependency: see `BFLOAT16`.
    HAS_NATIVE_BFLOAT16 = False
else:
    HAS_NATIVE_BFLOAT16 = True

if sys.byteorder != "little":
    # Arrays are sent as they are in memory. On a big-endian machine each would have to be swapped.
    raise ImportError("forwardpass supports little-endian machines only")

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    name: numpy's name; "bfloat16" and "string" for types that numpy does not have.
    code: the number in `forwardpass.v1.DataType`.
    itemsize: bytes per element on the wire; 0 for strings, whose length varies.
    numpy: the dtype of arrays in memory. Strings are object arrays of `bytes`.
    """

    name: str
    code: int
    itemsize: int
    numpy: np.dtype[np.generic]

    @property
    def is_differentiable(self) -> bool:
        """Whether functions of such numbers have derivatives: floating-point and complex numbers."""
        return self is BFLOAT16 or self.numpy.kind in "fc"

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], DType], tuple[str]]:
        # Types are compared by identity: a copy or an unpickled spec must refer to the same object.
        return by_name, (self.name,)


def by_name(name: str) -> DType:
    """The element type of this name. Raises KeyError. Pickles refer to this function: keep its name."""
    return BY_NAME[name]


def _plain(code: int, name: str) -> DType:
    dtype = np.dtype(name)
    return DType(name, code, dtype.itemsize, dtype)


# The kinds of numpy's bytes, str and (since numpy 2) StringDType.
STRING_KINDS = "SUT"

STRING = DType("string", v1.DataType.DATA_TYPE_STRING, 0, np.dtype(object))

BOOL = _plain(v1.DataType.DATA_TYPE_BOOL, "bool")

# Without ml_dtypes numpy has no bfloat16, and such leaves are float32 in memory. Received values are exact, because
# every bfloat16 is a float32; sent values are rounded to nearest even.
BFLOAT16 = DType(
    "bfloat16",
    v1.DataType.DATA_TYPE_BFLOAT16,
    2,
    np.dtype(ml_dtypes.bfloat16 if HAS_NATIVE_BFLOAT16 else np.float32),
)

ALL: tuple[DType, ...] = (
    _plain(v1.DataType.DATA_TYPE_FLOAT16, "float16"),
    _plain(v1.DataType.DATA_TYPE_FLOAT32, "float32"),
    _plain(v1.DataType.DATA_TYPE_FLOAT64, "float64"),
    BFLOAT16,
    _plain(v1.DataType.DATA_TYPE_INT8, "int8"),
    _plain(v1.DataType.DATA_TYPE_INT16, "int16"),
    _plain(v1.DataType.DATA_TYPE_INT32, "int32"),
    _plain(v1.DataType.DATA_TYPE_INT64, "int64"),
    _plain(v1.DataType.DATA_TYPE_UINT8, "uint8"),
    _plain(v1.DataType.DATA_TYPE_UINT16, "uint16"),
    _plain(v1.DataType.DATA_TYPE_UINT32, "uint32"),
    _plain(v1.DataType.DATA_TYPE_UINT64, "uint64"),
    BOOL,
    _plain(v1.DataType.DATA_TYPE_COMPLEX64, "complex64"),
    _plain(v1.DataType.DATA_TYPE_COMPLEX128, "complex128"),
    STRING,
)
BY_CODE: dict[int, DType] = {dtype.code: dtype for dtype in ALL}
BY_NAME: dict[str, DType] = {dtype.name: dtype for dtype in ALL}
_BY_NUMPY: dict[np.dtype[np.generic], DType] = {
    dtype.numpy: dtype for dtype in reversed(ALL) if dtype is not BFLOAT16 or HAS_NATIVE_BFLOAT16
}


def of(array: Array, place: str = "array") -> DType:
    """The element type of an array. Raises DTypeMismatch, which names `place`, for a dtype without one."""
    dtype = _BY_NUMPY.get(array.dtype)
    if dtype is not None:
        return dtype
    if array.dtype.kind in STRING_KINDS:
        return STRING
    dtype = _BY_NUMPY.get(array.dtype.newbyteorder("="))
    if dtype is None:
        raise errors.DTypeMismatch(
            place=place, expected=f"one of {', '.join(sorted(BY_NAME))}", found=f"dtype {array.dtype}"
        )
    return dtype


def foreign_object(array: Array) -> str:
    """The type and index of an element of an object array that is not a string, as `None at [3]`; "" if all are.

    Reports the first element that is neither a string nor a number, such as None in a column of floats; else the first
    number.
    """
    others = [one for one in enumerate(array.ravel().tolist()) if not isinstance(one[1], (bytes, str))]
    if not others:
        return ""
    index, element = next((one for one in others if not isinstance(one[1], (int, float, complex))), others[0])
    name = "None" if element is None else type(element).__name__
    return f"{name} at [{', '.join(map(str, np.unravel_index(index, array.shape)))}]" if array.ndim else name


def bfloat16_bits(array: Array) -> npt.NDArray[np.uint16]:
    """Rounds float32 values to bfloat16 (to nearest even; NaN stays NaN). Returns bit patterns of the same shape."""
    flat = np.ascontiguousarray(array, np.float32).reshape(-1)
    bits = flat.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could turn a NaN into infinity: keep its upper bits instead, and set the quiet bit.
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return cast(Array, np.where(np.isnan(flat), quiet_nan, rounded)).astype(np.uint16).reshape(array.shape)


def bfloat16_values(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Converts bfloat16 bit patterns to float32 values of the same shape. Exact."""
    return np.left_shift(bits.reshape(-1), 16, dtype=np.uint32).view(np.float32).reshape(bits.shape)
