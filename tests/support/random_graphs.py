"""Random graphs of predict_on_batch, from a grammar of operations that keep rows apart, that mix them, and others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

raw = tf.raw_ops

# Each maker takes a random generator and two tensors, and returns a step: what to do with them, the same each time. It
# raises _Unfit, or what TensorFlow raises, where they do not fit.
Step = Callable[..., Any]

_MIXING_SHARE = 0.07


class _Unfit(Exception):
    """A step does not fit its tensors."""


class RandomGraph:
    """One random graph.

    x: its inputs. weights: arrays. steps: the names of its steps. operations: the types of its operations.
    is_sensitive: a last bit of a float may become a large difference, as by rounding it to a whole number.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._free_size = int(rng.integers(2, 7))
        self.x = [_input_spec(rng) for _ in range(rng.integers(1, 3))]
        self.weights = [rng.standard_normal(rng.integers(1, 5, rng.integers(0, 3))).astype(np.float32)]
        self.steps: list[str] = []
        self.is_sensitive = False
        self._recipe: list[tuple[Step, list[int]]] = []
        graph = tf.Graph()
        with graph.as_default():
            values = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in self.x]
            values += [tf.compat.v1.placeholder(tf.float32, weight.shape) for weight in self.weights]
            self._grow(rng, values, int(rng.integers(1, 7)))
        definition = graph.as_graph_def()
        functions = (function.node_def for function in definition.library.function)
        self.operations = {node.op for node in itertools.chain(definition.node, *functions)}

    def _grow(self, rng: np.random.Generator, values: list[Any], steps: int) -> None:
        inputs = len(self.x)
        last = int(rng.integers(inputs))
        while len(self._recipe) < steps:
            makers = _MIXING if rng.random() < _MIXING_SHARE else _MAKERS
            maker = makers[int(rng.integers(len(makers)))]
            # Mostly the last result goes on, so that the last step hangs on the first.
            arguments = [last, int(rng.integers(len(values)))]
            try:
                step = maker(rng, *(values[index] for index in arguments))
                value = step(*(values[index] for index in arguments))
            except (_Unfit, ValueError, TypeError, tf.errors.InvalidArgumentError):
                continue
            if value.shape.rank is None or (value.shape.rank and value.shape.num_elements() == 0):
                continue
            was_float = any(values[index].dtype.is_floating for index in arguments)
            self.is_sensitive |= was_float and (maker in _SENSITIVE or not value.dtype.is_floating)
            self.steps.append(maker.__name__.strip("_"))
            self._recipe.append((step, arguments))
            values.append(value)
            last = len(values) - 1

    def predict(self, x: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
        """The last result, and the one before."""
        values = [*x, *weights]
        for step, arguments in self._recipe:
            values.append(step(*(values[index] for index in arguments)))
        return [tf.identity(value) for value in values[len(x) + len(weights) :][-2:]]

    def inputs(self, rows: int, seed: int) -> list[np.ndarray]:
        """The leaves of x."""
        rng = np.random.default_rng(seed)
        found = []
        for spec in self.x:
            shape = [rows, *(self._free_size if dim is None else dim for dim in spec.shape.as_list()[1:])]
            if spec.dtype == tf.int32:
                found.append(rng.integers(0, 5, shape, np.int32))
            else:
                found.append(rng.standard_normal(shape).astype(np.float32))
        return found


def _input_spec(rng: np.random.Generator) -> tf.TensorSpec:
    dims: list[int | None] = rng.integers(1, 6, rng.choice([0, 1, 1, 2, 2, 3])).tolist()
    if dims and rng.random() < 0.15:
        dims[0] = None
    return tf.TensorSpec([None, *dims], tf.int32 if rng.random() < 0.2 else tf.float32)


def _fit(condition: bool) -> None:
    if not condition:
        raise _Unfit


def _pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    _fit(bool(items))
    return items[int(rng.integers(len(items)))]


def _constant(rng: np.random.Generator, shape: Sequence[Any], dtype: Any = tf.float32) -> np.ndarray:
    _fit(None not in shape)
    if dtype == tf.bool:
        return rng.random(shape) < 0.5
    if dtype.is_integer:
        return rng.integers(0, 3, shape).astype(dtype.as_numpy_dtype)
    return rng.standard_normal(shape).astype(np.float32)


def _float(value: Any) -> Any:
    _fit(value.dtype == tf.float32)
    return value


def _dims(value: Any, rank: int | None = None) -> list[int | None]:
    _fit(value.shape.rank is not None and (rank is None or value.shape.rank == rank))
    dims: list[int | None] = value.shape.as_list()
    return dims


def _axis(rng: np.random.Generator, value: Any, first: int = 1) -> int:
    """An axis behind the batch, counted from either end."""
    rank = len(_dims(value))
    _fit(rank > first)
    axis = int(rng.integers(first, rank))
    return axis - rank if rng.random() < 0.5 else axis


_SMOOTH = (
    "Abs Elu Erf Identity LeakyRelu Neg Relu Relu6 Selu Sigmoid Softplus Softsign Snapshot Square StopGradient Tanh "
    "ZerosLike OnesLike Atan Asinh PreventGradient CheckNumerics"
)
_STEEP = (
    "Acos Acosh Asin Atanh BesselI0 BesselI0e BesselI1 BesselI1e Ceil Cos Cosh Digamma Erfc Erfinv Exp Expm1 Floor "
    "Inv IsFinite IsInf IsNan Lgamma Log Log1p Ndtri Reciprocal Rint Round Rsqrt Sign Sin Sinh Sqrt Tan"
)
_STEEP_TWO = "Atan2 Div DivNoNan FloorDiv FloorMod Mod MulNoNan Pow RealDiv TruncateDiv TruncateMod Xdivy Xlog1py Xlogy"


# Steps that keep rows apart.


def _smooth(rng: Any, value: Any, _: Any) -> Step:
    name = _pick(rng, _SMOOTH.split())
    _float(value)
    argument = {
        "LeakyRelu": "features",
        "Elu": "features",
        "Relu": "features",
        "Relu6": "features",
        "Selu": "features",
        "Softplus": "features",
        "Softsign": "features",
        "Identity": "input",
        "Snapshot": "input",
        "StopGradient": "input",
        "PreventGradient": "input",
        "CheckNumerics": "tensor",
    }.get(name, "x")
    more = {"message": ""} if name == "CheckNumerics" else {}
    return lambda x, y: getattr(raw, name)(**{argument: x}, **more)


def _steep(rng: Any, value: Any, _: Any) -> Step:
    name = _pick(rng, _STEEP.split())
    _float(value)
    return lambda x, y: getattr(raw, name)(x=x)


def _two(rng: Any, one: Any, other: Any) -> Step:
    _fit(one.dtype == other.dtype and one.dtype != tf.bool)
    name = _pick(rng, ["Add", "AddV2", "Sub", "Mul", "Maximum", "Minimum", "SquaredDifference"])
    return lambda x, y: getattr(raw, name)(x=x, y=y)


def _with_constant(rng: Any, value: Any, _: Any) -> Step:
    _fit(value.dtype != tf.bool)
    dims = _dims(value)
    behind = dims[len(dims) - int(rng.integers(0, len(dims) + 1)) :]
    shape = [1 if dim is None or rng.random() < 0.3 else dim for dim in behind]
    constant = _constant(rng, shape, value.dtype)
    name = _pick(rng, ["AddV2", "Sub", "Mul", "Maximum", "Minimum", "SquaredDifference"])
    return lambda x, y: getattr(raw, name)(x=x, y=constant)


def _steep_two(rng: Any, one: Any, other: Any) -> Step:
    _fit(one.dtype == other.dtype == tf.float32)
    name = _pick(rng, _STEEP_TWO.split())
    if name == "Atan2":
        return lambda x, y: raw.Atan2(y=x, x=y)
    return lambda x, y: getattr(raw, name)(x=x, y=y)


def _compare(rng: Any, value: Any, other: Any) -> Step:
    _fit(value.dtype != tf.bool)
    name = _pick(rng, ["Less", "LessEqual", "Greater", "GreaterEqual", "Equal", "NotEqual"])
    if value.dtype == other.dtype and rng.random() < 0.4:
        return lambda x, y: getattr(raw, name)(x=x, y=y)
    return lambda x, y: getattr(raw, name)(x=x, y=tf.constant(0, value.dtype))


def _logic(rng: Any, one: Any, other: Any) -> Step:
    if one.dtype.is_integer and other.dtype == one.dtype:
        name = _pick(rng, ["BitwiseAnd", "BitwiseOr", "BitwiseXor"])
        return lambda x, y: getattr(raw, name)(x=x, y=y)
    _fit(one.dtype == tf.bool)
    if other.dtype != tf.bool:
        return lambda x, y: raw.LogicalNot(x=x)
    name = _pick(rng, ["LogicalAnd", "LogicalOr"])
    return lambda x, y: getattr(raw, name)(x=x, y=y)


def _select(rng: Any, one: Any, other: Any) -> Step:
    _fit(one.dtype == other.dtype != tf.bool)
    zero = tf.zeros([], one.dtype).dtype.as_numpy_dtype(0)
    return lambda x, y: raw.SelectV2(condition=x > zero, t=x, e=y)


def _clip(rng: Any, value: Any, _: Any) -> Step:
    _float(value)
    if rng.random() < 0.5:
        return lambda x, y: raw.AddN(inputs=[x, x])
    return lambda x, y: raw.ClipByValue(t=x, clip_value_min=-1.0, clip_value_max=1.0)


def _cast(rng: Any, value: Any, _: Any) -> Step:
    dtype = tf.float32 if value.dtype != tf.float32 else tf.int32
    return lambda x, y: tf.cast(x, dtype)


def _complex(rng: Any, value: Any, _: Any) -> Step:
    _float(value)
    part = _pick(rng, [tf.math.real, tf.math.imag])
    return lambda x, y: part(raw.Conj(input=tf.complex(x, x * 2.0)))


def _text(rng: Any, value: Any, _: Any) -> Step:
    _fit(value.dtype == tf.int32)
    kind = int(rng.integers(4))
    if kind == 0:
        return lambda x, y: tf.strings.length(tf.strings.as_string(x))
    if kind == 1:
        return lambda x, y: tf.strings.to_number(
            tf.strings.strip(
                tf.strings.upper(tf.strings.lower(tf.strings.regex_replace(tf.strings.as_string(x), "1", " 2")))
            )
        )
    hash_ = tf.strings.to_hash_bucket_fast if kind == 2 else _strong
    return lambda x, y: tf.cast(hash_(tf.strings.as_string(x), 5), tf.int32)


def _strong(text: Any, buckets: int) -> Any:
    return tf.strings.to_hash_bucket_strong(text, buckets, key=[1, 2])


def _reduce(rng: Any, value: Any, _: Any) -> Step:
    dims = _dims(value)
    axes = [_axis(rng, value)] if rng.random() < 0.7 else list(range(1, len(dims)))
    keep = bool(rng.random() < 0.4)
    if value.dtype == tf.bool:
        both = _pick(rng, [tf.reduce_all, tf.reduce_any])
        return lambda x, y: both(x, axes, keep)
    names = [tf.reduce_sum, tf.reduce_mean, tf.reduce_max, tf.reduce_min, tf.reduce_prod]
    reduction = _pick(rng, names if value.dtype.is_floating else names[2:4])
    return lambda x, y: reduction(x, axes, keep)


def _best(rng: Any, value: Any, _: Any) -> Step:
    axis = _axis(rng, value)
    best = _pick(rng, [tf.argmax, tf.argmin])
    _fit(value.dtype != tf.bool)
    return lambda x, y: tf.cast(best(x, axis), tf.int32)


def _scan(rng: Any, value: Any, _: Any) -> Step:
    axis = _axis(rng, _float(value))
    scan = _pick(rng, [tf.cumsum, tf.math.cumprod])
    options = {"exclusive": bool(rng.random() < 0.5), "reverse": bool(rng.random() < 0.5)}
    return lambda x, y: scan(x, axis, **options)


def _reverse(rng: Any, value: Any, _: Any) -> Step:
    axis = _axis(rng, value)
    return lambda x, y: tf.reverse(x, [axis])


def _flatten(rng: Any, value: Any, _: Any) -> Step:
    dims = _dims(value)[1:]
    _fit(None not in dims)
    size = math.prod(dims)
    shape = _pick(rng, [[size], [1, size], [size, 1], *([two, size // two] for two in (2, 3) if size % two == 0)])
    if rng.random() < 0.5:
        return lambda x, y: tf.reshape(x, [-1, *shape])
    return lambda x, y: tf.reshape(x, [tf.shape(x)[0], *shape])


def _reshape_as_itself(rng: Any, value: Any, _: Any) -> Step:
    dims = _dims(value)
    _fit(len(dims) > 1)
    if rng.random() < 0.5:
        return lambda x, y: tf.reshape(x, tf.concat([tf.shape(x)[:1], tf.shape(x)[1:]], 0))
    return lambda x, y: tf.reshape(x, tf.shape(x))


def _transpose(rng: Any, value: Any, _: Any) -> Step:
    rank = len(_dims(value))
    _fit(rank > 2)
    order = [0, *(rng.permutation(rank - 1) + 1).tolist()]
    return lambda x, y: tf.transpose(x, order)


def _expand(rng: Any, value: Any, _: Any) -> Step:
    rank = len(_dims(value))
    _fit(1 <= rank < 4)
    axis = int(rng.integers(1, rank + 1))
    axis = axis - rank - 1 if rng.random() < 0.5 else axis
    return lambda x, y: tf.expand_dims(x, axis)


def _squeeze(rng: Any, value: Any, _: Any) -> Step:
    axis = _pick(rng, [index for index, dim in enumerate(_dims(value)) if dim == 1])
    return lambda x, y: tf.squeeze(x, axis)


def _join(rng: Any, one: Any, other: Any) -> Step:
    _fit(one.dtype == other.dtype and len(_dims(one)) < 4)
    if rng.random() < 0.5:
        axis = _axis(rng, one)
        return lambda x, y: tf.concat([x, y], axis)
    axis = int(rng.integers(1, len(_dims(one)) + 1))
    return lambda x, y: tf.stack([x, y], axis)


def _part(rng: Any, value: Any, _: Any) -> Step:
    axis = _axis(rng, value)
    size = _dims(value)[axis]
    _fit(size is not None)
    assert size is not None
    index = int(rng.integers(size))
    kind = int(rng.integers(5))
    if kind == 0:
        return lambda x, y: tf.unstack(x, axis=axis)[index]
    if kind == 1:
        return lambda x, y: tf.split(x, size, axis)[index]
    if kind == 2:
        return lambda x, y: tf.split(x, [index, size - index], axis)[1]
    if kind == 3:
        return lambda x, y: tf.gather(x, [index, 0], axis=axis)
    slices = [slice(None)] * (axis % len(_dims(value)))
    taken = _pick(rng, [slice(index, None), slice(None, index + 1), slice(None, None, -1), slice(None, None, 2), index])
    return lambda x, y: x[(*slices, taken)]


def _new_axis(rng: Any, value: Any, _: Any) -> Step:
    _fit(1 <= len(_dims(value)) < 4)
    return lambda x, y: x[:, tf.newaxis]


def _grow(rng: Any, value: Any, _: Any) -> Step:
    axis = _axis(rng, value)
    rank = len(_dims(value))
    sizes = np.eye(rank, dtype=np.int32)[axis % rank]
    kind = int(rng.integers(3))
    if kind == 0:
        return lambda x, y: tf.tile(x, sizes + 1)
    _fit(value.dtype != tf.bool)
    if kind == 1:
        constant = int(rng.integers(2))
        return lambda x, y: tf.pad(x, np.stack([sizes, 0 * sizes], 1), constant_values=constant)
    return lambda x, y: tf.pad(x, np.stack([sizes, sizes], 1), "SYMMETRIC")


def _fill(rng: Any, value: Any, _: Any) -> Step:
    _float(value)
    _fit(len(_dims(value)) >= 1)
    if rng.random() < 0.5:
        return lambda x, y: x + tf.fill(tf.shape(x), 0.5)
    constant = _constant(rng, [1 if dim is None else dim for dim in _dims(value)[1:]])
    return lambda x, y: x * tf.broadcast_to(constant, tf.shape(x))


def _lookup(rng: Any, value: Any, _: Any) -> Step:
    _fit(value.dtype == tf.int32 and len(_dims(value)) < 4)
    table = _constant(rng, [64, *rng.integers(1, 4, rng.integers(0, 2))])
    if rng.random() < 0.5:
        return lambda x, y: tf.gather(table, tf.clip_by_value(x, 0, 63))
    return lambda x, y: tf.one_hot(x, 4, axis=-1)


def _sorted(rng: Any, value: Any, _: Any) -> Step:
    _float(value)
    size = _dims(value)[-1]
    _fit(size is not None)
    return lambda x, y: tf.math.top_k(x, min(2, size or 0)).values


def _softmax(rng: Any, value: Any, _: Any) -> Step:
    _float(value)
    softmax = _pick(rng, [tf.nn.softmax, tf.nn.log_softmax])
    return lambda x, y: softmax(x)


def _dense(rng: Any, value: Any, _: Any) -> Step:
    kernel = _constant(rng, [_dims(_float(value), 2)[1], int(rng.integers(1, 5))])
    bias = _constant(rng, kernel.shape[1:])
    return lambda x, y: tf.nn.bias_add(tf.matmul(x, kernel), bias)


def _product(rng: Any, value: Any, other: Any) -> Step:
    dims = _dims(_float(value))
    _fit(len(dims) == 3)
    if rng.random() < 0.5:
        return lambda x, y: tf.matmul(x, x, transpose_b=True)
    operation = _pick(rng, [raw.BatchMatMulV2, raw.BatchMatMulV3])
    more = {"Tout": tf.float32} if operation is raw.BatchMatMulV3 else {}
    kernel = _constant(rng, [*([1] if rng.random() < 0.5 else []), dims[2], 2])
    return lambda x, y: operation(x=x, y=kernel, **more)


_EQUATIONS = {
    1: ["a->a", "a,a->a"],
    2: ["ab->a", "ab,ab->a", "ab,ab->ab", "ab,ac->abc", "ab,bc->ac"],
    3: ["abc->acb", "abc->ab", "abc,acd->abd", "abc,abc->ac", "abb->ab", "abc,cd->abd", "abc,dc->adb"],
}


def _einsum(rng: Any, value: Any, _: Any) -> Step:
    dims = _dims(_float(value))
    equation = _pick(rng, _EQUATIONS.get(len(dims), []))
    left, _, _ = equation.partition("->")
    first, *rest = left.split(",")
    if not rest:
        return lambda x, y: raw.Einsum(inputs=[x], equation=equation)
    if rest[0].startswith("a"):
        return lambda x, y: raw.Einsum(inputs=[x, x], equation=equation)
    sizes = dict(zip(first, dims, strict=True))
    kernel = _constant(rng, [sizes.get(label, 2) for label in rest[0]])
    return lambda x, y: raw.Einsum(inputs=[x, kernel], equation=equation)


def _image(rng: Any, value: Any, _: Any) -> Step:
    dims = _dims(_float(value), 4)
    channels = dims[3]
    padding = _pick(rng, ["SAME", "VALID"])
    kind = int(rng.integers(8))
    if kind == 0:
        kernel = _constant(rng, [2, 1, channels, 3])
        return lambda x, y: tf.nn.conv2d(x, kernel, 1, [[0, 0], [1, 0], [0, 0], [0, 0]])
    if kind == 1:
        kernel = _constant(rng, [1, 2, channels, 3])
        return lambda x, y: tf.nn.conv2d(x, kernel, [1, 2], padding)
    if kind == 2:
        kernel = _constant(rng, [2, 2, channels, 2])
        return lambda x, y: tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], padding)
    if kind == 3:
        return lambda x, y: tf.nn.max_pool2d(x, 2, 1, padding)
    if kind == 4:
        return lambda x, y: tf.nn.avg_pool2d(x, 2, 1, padding)
    if kind == 5:
        method = _pick(rng, ["bilinear", "nearest"])
        return lambda x, y: tf.image.resize(x, [3, 4], method)
    if kind == 6:
        kernel = _constant(rng, [1, 1, 1, 1, 2])
        volume = _pick(rng, [tf.nn.max_pool3d, tf.nn.avg_pool3d, None])
        if volume is None:
            return lambda x, y: tf.nn.conv3d(x[..., tf.newaxis][:, :], kernel, [1] * 5, padding)[:, :, :, :, 0]
        return lambda x, y: volume(x[:, :, :, :, tf.newaxis], 2, 1, padding)[:, :, :, :, 0]
    scale, variance = np.abs(_constant(rng, [2, channels])) + 0.1
    operation = _pick(rng, [raw.FusedBatchNorm, raw.FusedBatchNormV2, raw.FusedBatchNormV3])
    return lambda x, y: operation(x=x, scale=scale, offset=scale, mean=scale, variance=variance, is_training=False).y


def _unknown(rng: Any, value: Any, _: Any) -> Step:
    """Operations that have no rule, although they keep rows apart."""
    _float(value)
    _fit(len(_dims(value)) == 2)
    if rng.random() < 0.5:
        return lambda x, y: tf.linalg.diag(x)
    return lambda x, y: tf.reduce_logsumexp(x, 1, keepdims=True) + tf.norm(tf.linalg.diag(x), axis=[-2, -1])[:, None]


def _dense_of_any_rank(rng: Any, value: Any, _: Any) -> Step:
    dims = _dims(_float(value))
    _fit(len(dims) in (3, 4))
    kernel = _constant(rng, [dims[-1], int(rng.integers(1, 5))])
    return lambda x, y: tf.tensordot(x, kernel, 1)


def _ellipsis(rng: Any, value: Any, _: Any) -> Step:
    size = _dims(value)[-1]
    _fit(len(_dims(value)) >= 2 and size is not None)
    assert size is not None
    index = int(rng.integers(size))
    kind = int(rng.integers(4))
    if kind == 0:
        return lambda x, y: x[..., index]
    if kind == 1:
        return lambda x, y: x[..., tf.newaxis, index:]
    if kind == 2:
        return lambda x, y: raw.Slice(
            input=x, begin=[0] * (len(x.shape) - 1) + [index], size=[-1] * (len(x.shape) - 1) + [1]
        )
    _float(value)
    kernel = _constant(rng, [size, 2])
    return lambda x, y: raw.Einsum(inputs=[x, kernel], equation="...a,ab->...b")


def _spectrum(rng: Any, value: Any, _: Any) -> Step:
    size = _dims(_float(value))[-1]
    _fit(len(_dims(value)) >= 2 and size is not None)
    spectrum = _pick(rng, [tf.signal.fft, tf.signal.ifft, tf.signal.rfft])
    dtype = tf.float32 if spectrum is tf.signal.rfft else tf.complex64
    return lambda x, y: tf.math.abs(spectrum(tf.cast(x, dtype)))


def _entries(rng: Any, value: Any, other: Any) -> Step:
    """Entries of each row by the row's own numbers."""
    size = _dims(value)[1] if len(_dims(value)) >= 2 else None
    _fit(size is not None)
    assert size is not None
    index = int(rng.integers(size))
    kind = int(rng.integers(3))
    if kind == 0 and other.dtype == tf.int32 and len(_dims(other)) == 2:
        return lambda x, y: tf.gather(x, tf.clip_by_value(y, 0, size - 1), axis=1, batch_dims=1)
    if kind == 1 and value.dtype == tf.int32 and len(_dims(value)) == 2:
        return lambda x, y: tf.gather_nd(tf.reshape(tf.range(81), [9, 9]), tf.clip_by_value(x[:, index:][:, :1], 0, 8))
    return lambda x, y: (
        tf.reverse_sequence(x, tf.zeros_like(tf.reshape(x, [-1, size])[:, 0], tf.int32), 1, 0)
        if (len(x.shape) == 2)
        else tf.roll(x, index, 1)
    )


def _buckets(rng: Any, value: Any, _: Any) -> Step:
    dims = _dims(value)
    if value.dtype == tf.float32:
        return lambda x, y: raw.Bucketize(input=x, boundaries=[-1.0, 0.0, 0.5])
    _fit(value.dtype == tf.int32 and len(dims) == 2)
    return lambda x, y: raw.DenseBincount(input=tf.clip_by_value(x, 0, 5), size=6, weights=tf.zeros([0]))


def _words(rng: Any, value: Any, _: Any) -> Step:
    """The lengths of the words of texts, of which each row has another number."""
    _fit(value.dtype == tf.int32)
    _fit(len(_dims(value)) == 1)

    def step(x: Any, y: Any) -> Any:
        texts = tf.strings.regex_replace(tf.strings.as_string(x * 111), "[13]", " 2")
        return tf.strings.length(tf.strings.split(texts).to_tensor("", shape=[None, 3]))

    return step


def _resized(rng: Any, value: Any, _: Any) -> Step:
    """Operations that put positions into the batch and take them out again, and others of images."""
    dims = _dims(_float(value), 4)
    channels = dims[3]
    kind = int(rng.integers(6))
    if kind == 0:
        kernel = _constant(rng, [2, 2, 3, channels])
        return lambda x, y: tf.nn.conv2d_transpose(
            x, kernel, tf.stack([tf.shape(x)[0], tf.shape(x)[1] + 1, tf.shape(x)[2] + 1, 3]), 1, "VALID"
        )
    if kind == 1:
        kernel = _constant(rng, [2, 2, channels, 2])
        return lambda x, y: tf.nn.depthwise_conv2d(x, kernel, [1] * 4, "SAME", dilations=[2, 2])
    if kind == 2:
        method = _pick(rng, ["bicubic", "area"])
        return lambda x, y: tf.image.resize(x, [3, 2], method)
    if kind == 3:
        return lambda x, y: tf.nn.space_to_depth(tf.pad(x, [[0, 0], [0, 1], [0, 1], [0, 0]])[:, :2, :2], 2)
    if kind == 4:
        return lambda x, y: tf.nn.depth_to_space(tf.tile(x[..., :1], [1, 1, 1, 4]), 2)
    return lambda x, y: tf.batch_to_space(
        tf.space_to_batch(x, [2, 1], [[0, x.shape[1] % 2], [0, 0]]), [2, 1], [[0, 0], [0, 0]]
    )


def _inner(rng: Any, rank: int, share: float = 0.35) -> Callable[[Any], Any]:
    """An operation of floats that keeps the shape, along an axis. share: of those that may work along the first."""
    first = 0 if rng.random() < share else 1
    if rank <= first:
        return lambda x: tf.tanh(x)
    axis = int(rng.integers(first, rank))
    return _pick(
        rng,
        [
            lambda x: tf.roll(x, 1, axis),
            lambda x: tf.nn.softmax(x, axis),
            lambda x: tf.cumsum(x, axis) * 0.25,
            lambda x: tf.reverse(x, [axis]),
            lambda x: tf.sort(x, axis),
            lambda x: x - tf.reduce_mean(x, axis, keepdims=True),
            lambda x: tf.math.sin(x),
        ],
    )


# Steps that keep rows apart, or mix them, by the axis that they happen to work along.


def _transposed(rng: Any, value: Any, _: Any) -> Step:
    rank = len(_dims(_float(value)))
    _fit(rank >= 2)
    order = rng.permutation(rank).tolist()
    back = np.argsort(order).tolist()
    place = order.index(0)
    inner = _inner(rng, rank, 0.3)
    if place != 0 and rng.random() < 0.5:
        return lambda x, y: tf.transpose(tf.tanh(tf.transpose(x, order)), back)
    return lambda x, y: tf.transpose(inner(tf.transpose(x, order)), back)


def _merged(rng: Any, value: Any, _: Any) -> Step:
    dims = _dims(_float(value))
    _fit(len(dims) >= 3 and None not in dims[1:])
    inner = _inner(rng, 2, 0.25)
    size = dims[-1]
    if rng.random() < 0.5:
        return lambda x, y: tf.reshape(inner(tf.reshape(x, [-1, size])), tf.shape(x))
    parts = math.prod(dim or 1 for dim in dims[1:-1])
    return lambda x, y: tf.reshape(
        inner(tf.reshape(x, tf.stack([tf.shape(x)[0] * parts, size]))), [-1, *(dim or 1 for dim in dims[1:])]
    )


def _merged_behind(rng: Any, value: Any, _: Any) -> Step:
    """Positions in front of rows, in one dimension."""
    dims = _dims(_float(value), 3)
    _fit(None not in dims[1:])
    inner = _inner(rng, 2, 0.25)
    front = [-1, *dims[1:]] if rng.random() < 0.2 else [dims[1], -1, dims[2]]

    def step(x: Any, y: Any) -> Any:
        joined = tf.reshape(tf.transpose(x, [1, 0, 2]), [-1, dims[2]])
        apart = tf.reshape(inner(joined), front)
        return apart if front[0] == -1 else tf.transpose(apart, [1, 0, 2])

    return step


def _looped(rng: Any, value: Any, other: Any) -> Step:
    rank = len(_dims(_float(value)))
    _fit(rank >= 1)
    first, second = _inner(rng, rank, 0.2), _inner(rng, rank, 0.2)
    rounds = int(rng.integers(0, 4))

    def step(x: Any, y: Any) -> Any:
        return tf.while_loop(
            lambda i, one, two: i < rounds,
            lambda i, one, two: (i + 1, first(two), second(one) * 0.5),
            (0, x, tf.sin(x)),
        )[1]

    return step


def _scanned(rng: Any, value: Any, _: Any) -> Step:
    """A recurrent layer over the second dimension, as Keras writes it: a list of a transposed batch."""
    rank = len(_dims(_float(value)))
    _fit(rank >= 2)
    inner, carried = _inner(rng, rank - 1, 0.2), _inner(rng, rank - 1, 0.1)
    order = [1, 0, *range(2, rank)]
    is_last = bool(rng.random() < 0.3)

    def step(x: Any, y: Any) -> Any:
        parts = tf.transpose(x, order)
        count = tf.shape(parts)[0]
        given = tf.TensorArray(tf.float32, count).unstack(parts)
        made = tf.TensorArray(tf.float32, count, element_shape=parts.shape[1:])

        def body(i: Any, state: Any, made: Any) -> Any:
            state = carried(state * 0.5) + inner(given.read(i))
            return i + 1, state, made.write(i, state)

        _, state, made = tf.while_loop(
            lambda i, *_: i < count, body, (0, tf.zeros_like(parts[0]) if is_last else parts[0] * 0.0, made)
        )
        return state if is_last else tf.transpose(made.stack(), order)

    return step


def _branched(rng: Any, value: Any, other: Any) -> Step:
    rank = len(_dims(_float(value)))
    inner, another = _inner(rng, rank, 0.15), _inner(rng, rank, 0.15)
    bound = float(rng.standard_normal())
    if rng.random() < 0.15:
        return lambda x, y: tf.cond(tf.reduce_mean(x) > bound, lambda: inner(x), lambda: another(x))
    return lambda x, y: tf.cond(tf.random.stateless_normal([], [1, 2]) > bound, lambda: inner(x), lambda: another(x))


def _dead(rng: Any, value: Any, _: Any) -> Step:
    _float(value)

    def step(x: Any, y: Any) -> Any:
        tf.reduce_sum(x)
        return tf.abs(x)

    return step


# Steps that mix rows, or may.


def _mix_by_reduction(rng: Any, value: Any, _: Any) -> Step:
    _float(value)
    reduction = _pick(rng, [tf.reduce_sum, tf.reduce_mean, tf.reduce_max])
    axes = _pick(rng, [[0], [-len(_dims(value))], None])
    return lambda x, y: x - reduction(x, axes, keepdims=True)


def _mix_by_scan(rng: Any, value: Any, _: Any) -> Step:
    _fit(value.dtype != tf.bool and len(_dims(value)) > 0)
    return _pick(
        rng,
        [
            lambda x, y: tf.cumsum(x, 0),
            lambda x, y: tf.cumsum(x, -len(x.shape), exclusive=True),
            lambda x, y: tf.roll(x, 1, 0),
            lambda x, y: tf.reverse(x, [0]),
            lambda x, y: x[::-1],
        ],
    )


def _mix_by_slice(rng: Any, value: Any, _: Any) -> Step:
    _fit(value.dtype != tf.bool and len(_dims(value)) > 0)
    return _pick(
        rng,
        [
            lambda x, y: x + x[:1],
            lambda x, y: x[1:],
            lambda x, y: x[::2],
            lambda x, y: tf.tile(x, [2] + [1] * (len(x.shape) - 1)),
        ],
    )


def _mix_by_product(rng: Any, value: Any, _: Any) -> Step:
    _dims(_float(value), 2)
    return _pick(
        rng,
        [
            lambda x, y: tf.matmul(tf.matmul(x, x, transpose_b=True), x),
            lambda x, y: raw.Einsum(inputs=[x], equation="ab->aab"),
            lambda x, y: raw.Einsum(inputs=[x, x], equation="ab,cb->ac"),
            lambda x, y: raw.MatMul(a=x, b=x, transpose_a=True),
            lambda x, y: tf.nn.softmax(x, 0),
        ],
    )


def _mix_by_reshape(rng: Any, value: Any, _: Any) -> Step:
    dims = _dims(value)[1:]
    _fit(None not in dims)
    size = math.prod(dim or 1 for dim in dims)
    return _pick(
        rng,
        [
            lambda x, y: tf.reshape(x, [-1]),
            lambda x, y: tf.reshape(x, [size, -1]),
            lambda x, y: tf.reshape(tf.transpose(tf.reshape(x, [-1, size])), [-1, size]),
        ],
    )


def _mix_by_shape(rng: Any, value: Any, _: Any) -> Step:
    _float(value)
    _fit(len(_dims(value)) > 0)
    return _pick(
        rng,
        [
            lambda x, y: x * tf.cast(tf.shape(x)[0], tf.float32),
            lambda x, y: x + tf.reshape(tf.cast(tf.range(tf.shape(x)[0]), tf.float32), [-1] + [1] * (len(x.shape) - 1)),
            lambda x, y: tf.fill(tf.shape(x)[-1:], 1.0),
            lambda x, y: tf.fill(tf.shape(x)[::-1], 1.0),
        ],
    )


def _mix_by_training(rng: Any, value: Any, _: Any) -> Step:
    channels = _dims(_float(value), 4)[3]
    scale = _constant(rng, [channels])
    return lambda x, y: raw.FusedBatchNormV3(x=x, scale=scale, offset=scale, mean=[], variance=[], is_training=True).y


_MAKERS = [
    *itertools.chain.from_iterable([maker] * 2 for maker in (_smooth, _two, _with_constant, _reduce, _flatten, _part)),
    *itertools.chain.from_iterable([maker] * 4 for maker in (_image, _dense, _product, _einsum)),
    *(_steep, _steep_two, _compare, _logic, _select, _clip, _cast, _complex, _text, _best, _scan, _reverse),
    *(_reshape_as_itself, _transpose, _expand, _squeeze, _join, _new_axis, _grow, _fill, _lookup, _sorted, _softmax),
    *(
        _dense_of_any_rank,
        _ellipsis,
        _spectrum,
        _entries,
        _buckets,
        _buckets,
        _words,
        _words,
        _resized,
        _resized,
        _resized,
    ),
    *(_transposed, _merged, _merged_behind, _looped, _scanned, _scanned, _branched, _dead),
    _unknown,
]
_MIXING = [
    _mix_by_reduction,
    _mix_by_scan,
    _mix_by_slice,
    _mix_by_product,
    _mix_by_reshape,
    _mix_by_shape,
    _mix_by_training,
]
_SENSITIVE = {_steep, _steep_two, _compare, _best, _select}
