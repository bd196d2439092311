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
    """The functions of one model on one device. Any number of threads may call at once."""

    def __init__(self, functions: Mapping[Key, Any], device: str) -> None:
        self._runners = {key: _runner(concrete, device) for key, concrete in functions.items()}
        self._with_loops = {key for key, concrete in functions.items() if graphs.has_loops(concrete)}

    def has_loops(self, function: Function, training: bool) -> bool:
        """See `calls.model.LoadedModel.has_loops`."""
        return (function, training) in self._with_loops

    def run(self, function: Function, training: bool, leaves: Sequence[Leaf]) -> list[Array]:
        """One call: see `calls.model.LoadedModel.run`. Placed leaves are eager tensors."""
        try:
            return self._runners[function, training](leaves)
        except (tf.errors.InvalidArgumentError, tf.errors.OutOfRangeError) as error:
            raise errors.ModelRefusedInput(_without_values(error.message)) from None
        except UnicodeDecodeError:
            # TensorFlow's message quotes a string of the caller that is not UTF-8.
            raise errors.ModelRefusedInput() from None
        except tf.errors.ResourceExhaustedError:
            raise errors.OutOfMemory() from None


def _runner(concrete: Any, device: str) -> Callable[[Sequence[Leaf]], list[Array]]:
    function = RuntimeFunction(concrete)
    captured = list(concrete.captured_inputs)
    arguments = [
        (tensor.dtype.as_datatype_enum, placement.device_of(tensor.dtype, device))
        for tensor in concrete.inputs[: -len(captured) or None]
    ]
    eager_tensor, make_tensor = private_tensorflow.eager_tensor_class(), private_tensorflow.tensor_maker()
    # np.asarray shares the tensor's buffer, .numpy() copies it (53 us at 1 MB). On a GPU both copy, to the host.
    result_types = [tensor.dtype for tensor in concrete.outputs]
    readers = [placement.array_of if data_type == tf.bfloat16 else np.asarray for data_type in result_types]

    # No device scope for TensorFlow's default device: the scope costs as much as a small kernel.
    is_default = device == placement.CPU and not tf.config.list_logical_devices("GPU")
    on_device = contextlib.nullcontext if is_default else functools.partial(tf.device, device)

    def run(leaves: Sequence[Leaf]) -> list[Array]:
        with on_device():
            tensors = [
                leaf if type(leaf) is eager_tensor else make_tensor(leaf, place, data_type)
                for leaf, (data_type, place) in zip(leaves, arguments, strict=True)
            ]
            results = _call(args=tensors + captured, Tout=result_types, f=function)
        return [read(result) for read, result in zip(readers, results, strict=True)]

    return result_shapes.checked(run, concrete)


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
