"""TensorFlow's converter of parallel loops (pfor), a private interface: rewrites a graph for several sets of arguments.

It is tried with a small graph when the server starts. Where it fails, the log says so, and calls with different weights
are computed one by one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from forwardpass_server.calls.model import CannotVectorize
from forwardpass_server.models import private_tensorflow

_LOGGER = logging.getLogger(__name__)

# Operations with a state that do not depend on how often, or in which order, they run.
_HARMLESS = frozenset(
    ["Assert", "HashTableV2", "If", "PartitionedCall", "Placeholder", "StatefulPartitionedCall", "VarHandleOp", "While"]
)


class _Abandoned(BaseException):
    """Ends a conversion. A BaseException, so that pfor does not catch it: it would log every operation as an error."""


def vectorized(
    definition: Any, inputs: Sequence[str], outputs: Sequence[str], arguments: Sequence[tuple[Any, bool]], count: Any
) -> list[Any]:
    """Adds a graph, rewritten for several sets of arguments, to the graph that is being built. Returns its results.

    definition: a GraphDef without calls of functions, but with loops. inputs, outputs: names of tensors in it.
    arguments: for each input a tensor, and whether it is stacked: it then has a first dimension of `count` sets.
    Each result has such a dimension. Raises CannotVectorize.
    """
    from tensorflow.python.ops.parallel_for import pfor

    graph = _imported(definition)
    loop_variable = tf.compat.v1.placeholder_with_default(0, [])
    try:
        with _converters():
            converter = pfor.PFor(loop_variable, count, graph.get_operations(), fallback_to_while_loop=True)
            for name, (tensor, is_stacked) in zip(inputs, arguments, strict=True):
                converter._add_conversion(graph.get_tensor_by_name(name), pfor.wrap(tensor, is_stacked))
            results = [converter._convert_helper(graph.get_tensor_by_name(name)) for name in outputs]
    except (_Abandoned, Exception) as error:
        raise CannotVectorize(str(error).strip().split("\n")[0] or type(error).__name__) from None
    return [one.t if one.is_stacked else _repeated(one.t, count) for one in results]


@functools.cache
def failure() -> str:
    """Why no graph can be rewritten with this version of TensorFlow; "" if graphs can. Logs a warning, once."""
    try:
        _try_out()
    except Exception as error:
        _LOGGER.warning(
            "TensorFlow %s: the private PFor failed (%s: %s): calls with different weights are computed one by one",
            tf.__version__,
            type(error).__name__,
            error,
        )
        return f"the private PFor of TensorFlow {tf.__version__} failed"
    return ""


def _repeated(tensor: Any, count: Any) -> Any:
    return tf.repeat(tensor[tf.newaxis], count, axis=0)


def _imported(definition: Any) -> Any:
    """The graph of a definition. Its functions are graphs too, as pfor needs them: TensorFlow imports them without."""
    from tensorflow.python.framework import func_graph

    graph = func_graph.FuncGraph("imported")
    with graph.as_default():
        tf.import_graph_def(definition, name="")
    library = {function.signature.name.encode(): function for function in definition.library.function}
    graph._get_function = _Functions(graph, library).get
    _refuse_states(graph)
    return graph


class _Function:
    """What pfor reads of a function that a graph calls."""

    def __init__(self, name: bytes, graph: Any) -> None:
        self.name = name
        self.graph = graph
        self.function_type = _FunctionType(graph.outputs)


class _FunctionType:
    def __init__(self, outputs: Sequence[Any]) -> None:
        self.flat_outputs = list(outputs)


class _Functions:
    """The functions of a graph, each imported at its first use."""

    def __init__(self, graph: Any, library: Mapping[bytes, Any]) -> None:
        self._graph = graph
        self._library = library
        self._known: dict[bytes, _Function] = {}

    def get(self, name: bytes | str) -> _Function:
        """A function by its name."""
        from tensorflow.python.framework import function_def_to_graph

        name = name.encode() if isinstance(name, str) else name
        if name not in self._known:
            with self._graph.as_default():
                graph = function_def_to_graph.function_def_to_graph(self._library[name])
            graph._get_function = self.get
            _refuse_states(graph)
            self._known[name] = _Function(name, graph)
        return self._known[name]


def _refuse_states(graph: Any) -> None:
    """Raises CannotVectorize for operations that draw random numbers, call Python, or have another effect."""
    for operation in graph.get_operations():
        if operation.op_def.is_stateful and operation.type not in _HARMLESS:
            raise CannotVectorize(f"{operation.type} ({operation.name}) has a state")


# pfor's converters are registered for the process. They are replaced by one thread at a time.
_LOCK = threading.Lock()


@contextlib.contextmanager
def _converters() -> Iterator[None]:
    """Replaces converters of pfor, and ends a conversion at the first error."""
    from tensorflow.python.ops.parallel_for import pfor

    registry = pfor._pfor_converter_registry
    with _LOCK:
        registered = dict(registry)
        ours = {
            "BatchMatMulV2": _batch_matmul,
            "BiasAdd": _bias_add,
            "LookupTableFindV2": _look_up,
            "MatMul": _matmul,
        }
        try:
            for name, converter in (registered | ours).items():
                registry[name] = functools.partial(_guarded, converter)
            yield
        finally:
            registry.clear()
            registry.update(registered)


def _guarded(converter: Callable[[Any], Any], operation: Any) -> Any:
    from tensorflow.python.ops.parallel_for import pfor

    try:
        return converter(operation)
    except (pfor.ConversionNotImplementedError, _Abandoned):
        raise
    except Exception as error:
        _abandon(operation, error)


def _abandon(operation: Any, error: Exception) -> NoReturn:
    reason = (str(error).strip().split("\n") or [""])[0]
    raise _Abandoned(f"{operation.op_type} ({operation.op.name}): {type(error).__name__}: {reason}") from None


def _matmul(operation: Any) -> Any:
    """A product of matrices.

    pfor's own converter transposes stacked matrices on the right if the left is shared, and fails for empty batches.
    """
    from tensorflow.python.ops.parallel_for import pfor

    (left, is_left_stacked, _), (right, is_right_stacked, _) = operation.input(0), operation.input(1)
    transpose_left, transpose_right = operation.get_attr("transpose_a"), operation.get_attr("transpose_b")
    if is_right_stacked:
        left = left if is_left_stacked else left[tf.newaxis]
        return pfor.wrap(tf.matmul(left, right, transpose_a=transpose_left, transpose_b=transpose_right), True)
    if transpose_left:
        left = tf.transpose(left, [0, 2, 1])
    return pfor.wrap(_times_matrix(left, right, transpose_right), True)


def _times_matrix(left: Any, matrix: Any, transpose_matrix: bool) -> Any:
    """The product of an array of any rank with one matrix, as a product of two matrices."""
    shape = tf.shape(left)
    flat = tf.reshape(left, [tf.reduce_prod(shape[:-1]), shape[-1]])
    product = tf.matmul(flat, matrix, transpose_b=transpose_matrix)
    return tf.reshape(product, tf.concat([shape[:-1], tf.shape(product)[-1:]], axis=0))


def _batch_matmul(operation: Any) -> Any:
    """A product with one shared matrix on the right, as a product of two matrices.

    This is faster, and TensorFlow issue 117700 does not concern it: see `onednn_faults`.
    """
    from tensorflow.python.ops.parallel_for import pfor

    (left, _, _), (right, is_right_stacked, _) = operation.input(0), operation.input(1)
    if is_right_stacked or right.shape.rank != 2 or operation.get_attr("adj_x"):
        return pfor._convert_batch_mat_mul_v2(operation)
    if operation.get_attr("adj_y"):
        right = tf.linalg.adjoint(right)
    return pfor.wrap(_times_matrix(left, right, False), True)


def _bias_add(operation: Any) -> Any:
    """Adds stacked biases. pfor's own converter takes another shape for them if there is one set."""
    from tensorflow.python.ops.parallel_for import pfor

    (values, are_stacked, _), (bias, is_bias_stacked, _) = operation.input(0), operation.input(1)
    rank = operation.op.inputs[0].shape.rank
    if not is_bias_stacked or rank is None:
        return pfor._convert_biasadd(operation)
    axis = 1 if operation.get_attr("data_format") == b"NCHW" else rank - 1
    shape = [1] * rank
    shape[axis] = tf.shape(bias)[1]
    bias = tf.reshape(bias, [tf.shape(bias)[0], *shape])
    return pfor.wrap((values if are_stacked else values[tf.newaxis]) + bias, True)


def _look_up(operation: Any) -> Any:
    """Looks up each key by itself, so that one call looks up the keys of all sets."""
    from tensorflow.python.ops.parallel_for import pfor

    table, keys, default = operation.unstacked_input(0), operation.stacked_input(1), operation.unstacked_input(2)
    found = tf.raw_ops.LookupTableFindV2(table_handle=table, keys=keys, default_value=default)
    return pfor.wrap(found, True)


def _try_out() -> None:
    """Rewrites a product of matrices in a loop for two left matrices, and compares its results."""

    @tf.function(autograph=False)
    def multiply(left: Any, right: Any) -> Any:
        return tf.while_loop(lambda step, _: step < 2, lambda step, product: (step + 1, product @ right), (0, left))[1]

    concrete = multiply.get_concrete_function(tf.TensorSpec([1, 2]), tf.TensorSpec([2, 2]))
    definition = private_tensorflow.inlined(concrete)

    @tf.function(autograph=False)
    def both(left: Any, right: Any) -> Any:
        return vectorized(
            definition,
            [tensor.name for tensor in concrete.inputs],
            [tensor.name for tensor in concrete.outputs],
            [(left, True), (right, False)],
            tf.shape(left)[0],
        )

    left, right = np.arange(4, dtype=np.float32).reshape(2, 1, 2), np.array([[1, 2], [3, 4]], np.float32)
    (product,) = both(left, right)
    expected = left @ right @ right
    if not np.array_equal(product, expected):
        raise ValueError(f"expected {expected.tolist()}, got {np.asarray(product).tolist()}")
