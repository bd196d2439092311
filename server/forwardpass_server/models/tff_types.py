"""TFF's serialized types: the structures that its SavedModels describe, read without TFF.

A type is the message `Type { oneof { FunctionType function = 1; StructType struct = 2; SequenceType sequence = 3;
TensorType tensor = 4; } }`, `StructType { repeated Element element = 1; }`, `Element { string name = 1; Type value =
2; }`, `TensorType { DataType dtype = 1; repeated int64 dims = 2; bool unknown_rank = 3; }`.
Source: tensorflow_federated/proto/v0/computation.proto.
"""

from __future__ import annotations

import collections
from typing import Any

import tensorflow as tf

from forwardpass.wire import errors, fields
from forwardpass.wire.limits import DEFAULT

_STRUCT, _TENSOR = 2, 4


def decode(serialized: bytes, place: str) -> Any:
    """The structure of tf.TensorSpec that a type stands for: named elements are an OrderedDict, others a tuple.

    Raises InvalidRequest for bytes that are no type, StructureMismatch for types other than tensors and structs.
    """
    return _type(serialized, 0, len(serialized), place, DEFAULT.max_depth)


def _type(data: bytes, start: int, end: int, place: str, depth: int) -> Any:
    if not depth:
        raise errors.StructureMismatch(place=place, expected=f"at most {DEFAULT.max_depth} levels", found="more")
    for number, _, _, value_start, value_end in fields.scan(data, start, end):
        if number == _TENSOR:
            return _tensor(data, value_start, value_end)
        if number == _STRUCT:
            return _struct(data, value_start, value_end, place, depth - 1)
        raise errors.StructureMismatch(place=place, expected="tensors and structs", found=f"a TFF type {number}")
    raise errors.InvalidRequest("an empty TFF type", place=place)


def _struct(data: bytes, start: int, end: int, place: str, depth: int) -> Any:
    names: list[str] = []
    values: list[Any] = []
    for _, _, _, element_start, element_end in fields.scan(data, start, end):
        name = ""
        value: Any = ()
        for number, _, _, value_start, value_end in fields.scan(data, element_start, element_end):
            if number == 1:
                name = data[value_start:value_end].decode()
            else:
                value = _type(data, value_start, value_end, place, depth)
        names.append(name)
        values.append(value)
    if not any(names):
        return tuple(values)
    if not all(names):
        raise errors.StructureMismatch(place=place, expected="names for all elements or none", found=f"{names}")
    return collections.OrderedDict(zip(names, values, strict=True))


def _tensor(data: bytes, start: int, end: int) -> tf.TensorSpec:
    dtype = 0
    dims: list[int] = []
    unknown_rank = False
    for number, wire_type, _, value_start, value_end in fields.scan(data, start, end):
        if number == 2:
            dims += fields.read_int64s(data, wire_type, value_start, value_end)
        else:
            value, _ = fields.read_varint(data, value_start, value_end)
            if number == 1:
                dtype = value
            elif number == 3:
                unknown_rank = bool(value)
    shape = None if unknown_rank else [None if dim < 0 else dim for dim in dims]
    return tf.TensorSpec(shape, tf.dtypes.as_dtype(dtype))
