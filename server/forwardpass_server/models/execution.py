"""Runs a traced model on NumPy arrays, by TensorFlow's call operation.

One call of a small model takes 16 us by the call operation, 150 us by the concrete function, and 300 us by tf.function
(measured).
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire import errors
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass_server.calls.model import Leaf
from forwardpass_server.models import graphs, placement, private_tensorflow, result_shapes
from forwardpass_server.models.runtime_functions import RuntimeFunction
from forwardpass_server.models.tracing import Key

_call: Any = tf.raw_ops.StatefulPartitionedCall


class Execution:
    """The functions of one model on one device. Any number of threads may call at once.

    functions: the same ones in TensorFlow's runtime.
    """

    def __init__(self, functions: Mapping[Key, Any], device: str) -> None:
        self.functions = {key: RuntimeFunction(concrete) for key, concrete in functions.items()}
        self._runners = {key: _runner(self.functions[key], concrete, device) for key, concrete in functions.items()}
        self._with_loops = {key for key, concrete in functions.items() if graphs.has_loops(concrete)}

    def has_loops(self, function: Function, training: bool) -> bool:
        """See `calls.model.LoadedModel.has_loops`."""
        return (function, training) in self._with_loops

    def run(self, function: Function, training: bool, leaves: Sequence[Leaf]) -> list[Array]:
        """One call: see `calls.model.LoadedModel.run`. Placed leaves are eager tensors."""
        try:
            return self._runners[function, training](leaves)
        except CAUSED_BY_ARGUMENTS as error:
            raise explained(error) from None


CAUSED_BY_ARGUMENTS = (
    tf.errors.InvalidArgumentError,
    tf.errors.OutOfRangeError,
    tf.errors.ResourceExhaustedError,
    UnicodeDecodeError,
)
"""What a call of a graph may raise because of its arguments."""


def explained(error: Exception) -> errors.ForwardPassError:
    """The error of the service for one of `CAUSED_BY_ARGUMENTS`: ModelRefusedInput or OutOfMemory."""
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return errors.OutOfMemory()
    if isinstance(error, UnicodeDecodeError):
        # TensorFlow's message quotes a string of the caller that is not UTF-8.
        return errors.ModelRefusedInput()
    return errors.ModelRefusedInput(_without_values(error.message))  # type: ignore[attr-defined]


def _runner(function: RuntimeFunction, concrete: Any, device: str) -> Callable[[Sequence[Leaf]], list[Array]]:
    call = caller(function, concrete, device)
    # np.asarray shares the tensor's buffer, .numpy() copies it (53 us at 1 MB). On a GPU both copy, to the host.
    readers = [placement.array_of if spec.dtype == tf.bfloat16 else np.asarray for spec in function.results]

    def run(leaves: Sequence[Leaf]) -> list[Array]:
        return [read(result) for read, result in zip(readers, call(leaves), strict=True)]

    return result_shapes.checked(run, concrete)


def caller(function: RuntimeFunction, concrete: Any, device: str) -> Callable[[Sequence[Leaf]], list[Any]]:
    """What calls a function with arrays or tensors, and returns its results as tensors. concrete: the same function."""
    captured = function.captured
    arguments = [
        (tensor.dtype.as_datatype_enum, placement.device_of(tensor.dtype, device))
        for tensor in concrete.inputs[: -len(captured) or None]
    ]
    eager_tensor, make_tensor = private_tensorflow.eager_tensor_class(), private_tensorflow.tensor_maker()
    result_types = [spec.dtype for spec in function.results]

    # No device scope for TensorFlow's default device: the scope costs as much as a small kernel.
    is_default = device == placement.CPU and not tf.config.list_logical_devices("GPU")
    on_device = contextlib.nullcontext if is_default else functools.partial(tf.device, device)

    def call(leaves: Sequence[Leaf]) -> list[Any]:
        with on_device():
            tensors = [
                leaf if type(leaf) is eager_tensor else make_tensor(leaf, place, data_type)
                for leaf, (data_type, place) in zip(leaves, arguments, strict=True)
            ]
            results: list[Any] = _call(args=tensors + captured, Tout=result_types, f=function)
            return results

    return call


# The text may quote the request. It is cut to this length, and each pattern takes linear time.
_MAX_CHARS = 4096
_NODE = re.compile(r"\[\[(?:\{\{function_node [^{}]+\}\})?\{\{node ([^{}]+)\}\}\]\]")
_CALLER = re.compile(r"^\{\{function_node .*?\}\}")
_BRACKETS = re.compile(r"(\[[^\[\]]*?[\])])")
_NUMBER = re.compile(r"(?<![\w/.:])-?\d+(\.\d+)?(e[+-]?\d+)?(?![\w/])")


def _without_values(message: str) -> str:
    """TensorFlow's message in one line, with the node, and without numbers that may be the caller's data.

    Numbers in brackets are shapes and ranges, and stay, except in a failed assertion, which prints values.
    """
    message = message[:_MAX_CHARS]
    node = _NODE.search(message)
    # A traceback of the model's code may precede the last paragraph, and the name of the call follows the node.
    text = _NODE.split(message)[0].strip().split("\n\n")[-1].split(" [Op:")[0]
    text = _CALLER.sub("", text)
    asserts = "assertion failed" in text
    parts = [
        part if index % 2 and not asserts else _NUMBER.sub("#", part)
        for index, part in enumerate(_BRACKETS.split(" ".join(text.split())))
    ]
    return "".join(parts).strip() + (f" (node {node[1]})" if node else "")
