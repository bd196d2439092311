"""The private interfaces of TensorFlow that this server uses. No other module imports tensorflow.python.

An upgrade of TensorFlow may change them. So each one is tried with a small call when the server starts. If it fails, a
slower public interface takes its place, which the log says, or the server does not start.

| interface | what for | without it |
|---|---|---|
| EagerTensor(array, device, dtype) | a tensor that shares an array's memory | tf.constant, which copies the array |
| AtomicFunction | holds a function without its graph | the graph stays: twice the memory of a model |
| Context.clear_kernel_cache | frees the kernels of unloaded models | each unloaded model leaves 0.6 MiB or more |
| StatefulPartitionedCall(f=an object with a name) | runs a function | no start |
| _run_inline_graph_optimization | judges whether a model can be batched | no start, unless with --no-batching |
| function_def_to_graph_def | judges the loops of a model | models with loops are not batched |
| IsMklEnabled | whether TensorFlow uses oneDNN | what TF_ENABLE_ONEDNN_OPTS says |
| Context.add_function_def, remove_function | copies functions to the child process | no start, unless with --no-trial |
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire.dtypes import Array
from forwardpass_server.errors import UnsupportedLibrary

_LOGGER = logging.getLogger(__name__)

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}


@dataclasses.dataclass(frozen=True, slots=True)
class NamedFunction:
    """What the call operation needs of a function in TensorFlow's runtime."""

    name: bytes


def check(*, batching: bool, trial: bool) -> None:
    """Tries the interfaces that a server needs. Logs a warning for each that is replaced by a public one.

    Call it after the device was chosen: it starts TensorFlow. batching, trial: whether the server uses these features.
    Raises UnsupportedLibrary where one without a replacement fails.
    """
    _replaced()
    if reason := _failure_of_calls():
        raise _unsupported("to run a function", "StatefulPartitionedCall with a named function", reason)
    if batching and (reason := _failure_of_inlining()):
        raise _unsupported("batching", "_run_inline_graph_optimization", reason, "--no-batching")
    if trial and (reason := _failure_of_definitions()):
        raise _unsupported("the trial of models", "Context.add_function_def", reason, "--no-trial")


@functools.cache
def eager_tensor_class() -> Any:
    """The class of tensors that are not in a graph. A function, since the first tensor starts TensorFlow."""
    return type(tf.constant(0))


@functools.cache
def tensor_maker() -> Callable[[Array, str, int], Any]:
    """The function that makes a tensor of (array, device, number of the data type).

    On a CPU the tensor shares the memory of an array whose data is aligned to 64 bytes, and keeps it alive; any other
    array is copied once. The public replacement always copies.
    """
    return _constant if _EAGER_TENSOR in _replaced() else _constructor()


def hold(concrete: Any) -> list[Any]:
    """The objects that keep a concrete function, and all functions that it calls, in TensorFlow's runtime.

    They are few, and hold no graph. The public replacement is the concrete function itself with its graph.
    """
    if _ATOMIC_FUNCTION in _replaced():
        return [concrete]
    return _atomic_functions(concrete)


def clear_kernel_cache() -> None:
    """Drops the kernels that TensorFlow keeps of all calls. Does nothing if the interface failed: see `_WITHOUT`."""
    if _KERNEL_CACHE not in _replaced():
        _context().clear_kernel_cache()


def inlined(concrete: Any) -> Any:
    """The GraphDef of a concrete function in which the functions that it calls are inlined."""
    from tensorflow.python.framework import convert_to_constants

    return convert_to_constants._run_inline_graph_optimization(concrete, False, aggressive_inlining=True)


def inlined_graph(concrete: Any) -> tf.Graph:
    """The graph of `inlined`, with shapes that TensorFlow infers from the operations.

    The shapes that a file or `set_shape` claims are dropped, because they may be wrong.
    """
    return _imported(inlined(concrete))


@dataclasses.dataclass(frozen=True, slots=True)
class FunctionBody:
    """A function as a graph, and its tensors that are arguments and results."""

    graph: tf.Graph
    inputs: Sequence[Any]
    outputs: Sequence[Any]


def function_body(graph: tf.Graph, name: str, shapes: Sequence[tuple[int | None, ...] | None]) -> FunctionBody:
    """A function of a graph, as `inlined_graph` returns one.

    shapes: of the arguments; None for an unknown rank. Those that the file claims are dropped.
    Raises NotImplementedError if the interface failed: see `_WITHOUT`.
    """
    if _FUNCTION_BODY in _replaced():
        raise NotImplementedError(_WITHOUT[_FUNCTION_BODY])
    return _function_body(graph, name, shapes)


def _function_body(graph: tf.Graph, name: str, shapes: Sequence[tuple[int | None, ...] | None]) -> FunctionBody:
    from tensorflow.python.framework import function_def_to_graph

    library = graph.as_graph_def().library
    function = next(one for one in library.function if one.signature.name == name)
    definition, names = function_def_to_graph.function_def_to_graph_def(function)
    # The function's own claims take precedence over shapes that are given to TensorFlow's method.
    arguments = zip(function.signature.input_arg, shapes, strict=True)
    shape_of = {argument.name: tf.TensorShape(shape).as_proto() for argument, shape in arguments}
    for node in definition.node:
        if node.name in shape_of:
            node.attr["shape"].shape.CopyFrom(shape_of[node.name])
    definition.library.CopyFrom(library)
    body = _imported(definition)
    return FunctionBody(
        body,
        [body.get_tensor_by_name(names[argument.name]) for argument in function.signature.input_arg],
        [body.get_tensor_by_name(names[function.ret[result.name]]) for result in function.signature.output_arg],
    )


def definitions(concrete: Any) -> dict[bytes, bytes]:
    """The serialized FunctionDefs of a concrete function and of all functions that it calls, by name."""
    return {name: one.cached_definition.SerializeToString() for name, one in _called(concrete).items()}


def add_definition(serialized: bytes) -> str:
    """Adds the function of a serialized FunctionDef to TensorFlow's runtime. Returns its name."""
    from tensorflow.core.framework import function_pb2

    definition = function_pb2.FunctionDef.FromString(serialized)
    _context().add_function_def(definition)
    name: str = definition.signature.name
    return name


def remove_definition(name: str) -> None:
    """Removes a function that was added by `add_definition`."""
    _context().remove_function(name)


def uses_onednn() -> bool:
    """Whether TensorFlow's kernels use oneDNN on this CPU. Without the interface: whether the environment allows it."""
    try:
        from tensorflow.python.util import _pywrap_util_port

        return bool(_pywrap_util_port.IsMklEnabled())
    except (AttributeError, ImportError):
        return os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"


def _imported(definition: Any) -> tf.Graph:
    """The graph of a GraphDef, without the shapes that its nodes claim for their results."""
    for node in definition.node:
        node.attr.pop("_output_shapes", None)
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(definition, name="")
    return graph


def _context() -> Any:
    from tensorflow.python.eager import context

    return context.context()


def _constructor() -> Any:
    return eager_tensor_class()


def _constant(array: Array, device: str, data_type: int) -> Any:
    with tf.device(device):
        return tf.constant(array, tf.as_dtype(data_type))


def _atomic_functions(concrete: Any) -> list[Any]:
    from tensorflow.python.eager.polymorphic_function import atomic_function

    # TensorFlow's runtime counts by name how many objects hold a function. The type matters to calls from Python only.
    return [
        # A Defun stays in the runtime as long as its Python object.
        function if _is_defun(function) else atomic_function.AtomicFunction(name, _context(), function_type=None)
        for name, function in _called(concrete).items()
    ]


def _called(concrete: Any) -> dict[bytes, Any]:
    """A concrete function and all functions that it calls, directly or not, by name."""
    functions: dict[bytes, Any] = {}
    waiting = [concrete.inference_fn]
    while waiting:
        one = waiting.pop()
        if one.name not in functions:
            functions[one.name] = one
            if not _is_defun(one):
                waiting += one.children
    return functions


def _is_defun(function: Any) -> bool:
    """Whether this is a function of TensorFlow 1, as in tf.nn.ctc_loss.

    It has no list of the functions that it calls: the function that calls it lists those too.
    """
    return not hasattr(function, "children")


_EAGER_TENSOR = "EagerTensor"
_ATOMIC_FUNCTION = "AtomicFunction"
_KERNEL_CACHE = "Context.clear_kernel_cache"
_FUNCTION_BODY = "function_def_to_graph_def"

_WITHOUT = {
    _EAGER_TENSOR: "arrays are copied into tensors by tf.constant, so that calls with large arrays take longer",
    _ATOMIC_FUNCTION: "models keep their graphs, so that each takes about twice the memory",
    _KERNEL_CACHE: "the kernels of unloaded models stay in memory, 0.6 MiB or more for each load",
    _FUNCTION_BODY: "models with loops are not batched",
}


@functools.cache
def _replaced() -> frozenset[str]:
    """The interfaces with a replacement that fail in this process. Each is tried once."""
    failures = {
        _EAGER_TENSOR: _failure(_try_eager_tensor),
        _ATOMIC_FUNCTION: _failure(_try_atomic_functions),
        _KERNEL_CACHE: _failure(lambda: _context().clear_kernel_cache()),
        _FUNCTION_BODY: _failure(_try_function_body),
    }
    for interface, reason in failures.items():
        if reason:
            _LOGGER.warning(
                "TensorFlow %s: the private %s failed (%s): %s",
                tf.__version__,
                interface,
                reason,
                _WITHOUT[interface],
            )
    return frozenset(interface for interface, reason in failures.items() if reason)


@functools.cache
def _failure_of_calls() -> str:
    return _failure(_try_calls)


@functools.cache
def _failure_of_inlining() -> str:
    return _failure(_try_inlining)


@functools.cache
def _failure_of_definitions() -> str:
    return _failure(_try_definitions)


def _failure(attempt: Callable[[], object]) -> str:
    """What an attempt raises, as a sentence; "" if it succeeds."""
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _unsupported(use: str, interface: str, reason: str, option: str = "") -> UnsupportedLibrary:
    remedy = f", or start the server with {option}" if option else ""
    return UnsupportedLibrary(
        f"TensorFlow {tf.__version__} is not supported: {use} needs its private {interface}, which failed ({reason}): "
        f"install the TensorFlow version that forwardpass[server] asks for{remedy}"
    )


def _sample() -> Any:
    """A concrete function that calls another one: twice the sum of its argument and 1."""

    @tf.function(autograph=False)
    def inner(x: Any) -> Any:
        return x + 1.0

    @tf.function(autograph=False)
    def outer(x: Any) -> Any:
        return inner(x) * 2.0

    return outer.get_concrete_function(tf.TensorSpec([None], tf.float32))


def _check_sample(name: bytes) -> None:
    """Calls the sample by its name in TensorFlow's runtime."""
    argument = tf.constant([1.0, 2.0])
    (result,) = tf.raw_ops.StatefulPartitionedCall(args=[argument], Tout=[tf.float32], f=NamedFunction(name))
    _check_equal(result, [4.0, 6.0])


def _check_equal(found: Any, expected: list[float]) -> None:
    values = np.asarray(found).tolist()
    if values != expected:
        raise ValueError(f"expected {expected}, got {values}")


def _try_eager_tensor() -> None:
    array = np.array([1.0, 2.0], np.float32)
    _check_equal(_constructor()(array, "/device:CPU:0", tf.float32.as_datatype_enum), array.tolist())


def _try_atomic_functions() -> None:
    concrete = _sample()
    held = _atomic_functions(concrete)
    if len(held) != 2:
        raise ValueError(f"expected a function and one that it calls, got {len(held)}")


def _try_function_body() -> None:
    """Takes the sample's inner function out of its graph."""
    graph = _imported(_sample().graph.as_graph_def())
    call = next(operation for operation in graph.get_operations() if operation.type in _CALLS)
    body = _function_body(graph, call.get_attr("f").name, [(2,)])
    operations = [operation.type for operation in body.graph.get_operations()]
    if "AddV2" not in operations or [tensor.shape.as_list() for tensor in (*body.inputs, *body.outputs)] != [[2], [2]]:
        raise ValueError(f"expected a sum of two numbers, got {operations}")


def _try_calls() -> None:
    concrete = _sample()
    _check_sample(concrete.name)


def _try_inlining() -> None:
    definition = inlined(_sample())
    operations = {node.op for node in definition.node}
    if not {"AddV2", "Mul"} <= operations or operations & _CALLS:
        raise ValueError(f"expected a graph without calls, got one of {sorted(operations)}")


def _try_definitions() -> None:
    with _copy_of_sample() as name:
        _check_sample(name.encode())


@contextlib.contextmanager
def _copy_of_sample() -> Iterator[str]:
    """The sample under another name, as the child process would have it."""
    from tensorflow.core.framework import function_pb2

    concrete = _sample()
    definition = function_pb2.FunctionDef.FromString(definitions(concrete)[concrete.name])
    definition.signature.name += "_copy"
    name = add_definition(definition.SerializeToString())
    try:
        yield name
    finally:
        remove_definition(name)
