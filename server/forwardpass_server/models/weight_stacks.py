"""Graphs that compute a function for several sets of weights at once.

Weights that differ between the sets are stacked: they have a first dimension of K, the number of sets. Weights that all
sets share, and inputs that all sets share, are not: what depends on them alone is computed once.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import tensorflow as tf

from forwardpass.wire import errors
from forwardpass.wire.description import Vectorization
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass.wire.specs import TensorSpec
from forwardpass_server.calls.model import CannotVectorize, Leaf
from forwardpass_server.models import onednn_faults, placement, private_pfor, private_tensorflow, probing
from forwardpass_server.models.examples import Examples, Runs
from forwardpass_server.models.execution import CAUSED_BY_ARGUMENTS, caller, explained
from forwardpass_server.models.runtime_functions import RuntimeFunction
from forwardpass_server.models.trial import Trial

# Of one model. Each takes some hundred KiB, and a set of weights of another client seldom differs in other leaves.
_MAX_VARIANTS = 16

# The sets and rows of the probe. Kernels choose their order of summation by these sizes.
_PROBED = ((2, 1), (5, 3), (16, 1), (3, 33))
_MAX_PROBED_BYTES = 64 * 2**20

CHILD_SETS = 2
"""The sets of a call in the child process."""

VariantT = TypeVar("VariantT")


@dataclasses.dataclass(frozen=True)
class GraphSource:
    """A concrete function as bytes, from which `vectorized` makes functions. It takes less memory than its graph.

    definition: the serialized GraphDef, in which the functions that it calls are inlined.
    inputs: the names of its arguments, followed by those of captured tensors. outputs: the names of its results.
    specs: of the arguments. captured: the captured tensors.
    """

    definition: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    specs: tuple[tf.TensorSpec, ...]
    captured: tuple[Any, ...]

    @classmethod
    def of(cls, concrete: Any) -> GraphSource:
        """The source of a concrete function. Raises CannotVectorize where its graph cannot be read."""
        captured = tuple(concrete.captured_inputs)
        arguments = concrete.inputs[: -len(captured) or None]
        try:
            definition = private_tensorflow.inlined(concrete)
        except Exception as error:  # The inliner itself works: `private_tensorflow.check` has tried it.
            raise CannotVectorize(f"the graph cannot be analysed: {type(error).__name__}") from None
        for node in definition.node:
            # Shapes that a file claims may be wrong.
            node.attr.pop("_output_shapes", None)
        return cls(
            definition.SerializeToString(),
            tuple(tensor.name for tensor in concrete.inputs),
            tuple(tensor.name for tensor in concrete.outputs),
            tuple(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in arguments),
            captured,
        )


def vectorized(source: GraphSource, stacked: Sequence[bool]) -> Any:
    """A concrete function that computes a function for K sets of arguments, for any K from 2 on.

    stacked: for each argument whether it has a first dimension of K; at least one has.
    Each result has a first dimension of K. Raises CannotVectorize.
    The function may refuse arrays without elements, and a single set: pfor's loops over sets do.
    """
    if reason := private_pfor.failure():
        raise CannotVectorize(reason)
    definition = tf.compat.v1.GraphDef.FromString(source.definition)
    signature = [
        _with_sets(spec) if is_stacked else spec for spec, is_stacked in zip(source.specs, stacked, strict=True)
    ]
    first = list(stacked).index(True)

    @tf.function(autograph=False, input_signature=signature)
    def flat(*arguments: Any) -> list[Any]:
        given = [*zip(arguments, stacked, strict=True), *((tensor, False) for tensor in source.captured)]
        return private_pfor.vectorized(definition, source.inputs, source.outputs, given, tf.shape(arguments[first])[0])

    concrete = flat.get_concrete_function()
    if reason := onednn_faults.reason_against(concrete):
        raise CannotVectorize(reason)
    return concrete


def _with_sets(spec: tf.TensorSpec) -> tf.TensorSpec:
    """The spec of several arrays of a spec in one."""
    return tf.TensorSpec(tf.TensorShape([None]).concatenate(spec.shape), spec.dtype)


def stack(sets: Sequence[Sequence[Leaf]], differing: Sequence[bool], device: str) -> list[Leaf]:
    """The leaves of several sets: those that differ in one tensor, and those of the first set. Raises OutOfMemory."""
    first = sets[0]
    try:
        with tf.device(device):
            return [
                tf.raw_ops.Pack(values=[leaves[index] for leaves in sets], axis=0) if differs else first[index]
                for index, differs in enumerate(differing)
            ]
    except tf.errors.ResourceExhaustedError:
        raise errors.OutOfMemory() from None


class Stacked:
    """One variant of predict_on_batch: see `calls.model.StackedPredictions`."""

    def __init__(self, concrete: Any, differing: Sequence[bool], device: str) -> None:
        self.difference = 0.0
        self._differing = tuple(differing)
        self._device = device
        self._call = caller(RuntimeFunction(concrete), concrete, device)

    def stack(self, sets: Sequence[Sequence[Leaf]]) -> Sequence[Leaf]:
        """See `calls.model.StackedPredictions.stack`."""
        return stack(sets, self._differing, self._device)

    def run(self, weights: Sequence[Leaf], x: Sequence[Array]) -> list[Array]:
        """See `calls.model.StackedPredictions.run`."""
        try:
            return [placement.array_of(result) for result in self._call([*weights, *x])]
        except CAUSED_BY_ARGUMENTS as error:
            raise explained(error) from None


@dataclasses.dataclass(frozen=True)
class Probed:
    """What the variants of a model are compared with, and on what.

    execution: runs single calls. found: example batches. weights: the initial weights. trial: None for no trials.
    """

    execution: Runs
    found: Examples
    weights: Sequence[Array]
    trial: Trial | None
    device: str


class Variants(Generic[VariantT]):
    """The variants of one function, each made at its first use. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The variants, or why there is none. Not the exception itself: it would keep what its frames hold.
        self._made: dict[tuple[bool, ...], VariantT | str] = {}

    def get(self, key: tuple[bool, ...], make: Callable[[], VariantT]) -> VariantT:
        """The variant of a key. make: makes it, or raises CannotVectorize, which each later call of the key raises too.

        It is not kept: a method of the owner would be a cycle of references, and keep an unloaded model in memory.
        """
        with self._lock:
            found = self._made.get(key)
            if found is None:
                if len(self._made) >= _MAX_VARIANTS:
                    raise CannotVectorize(f"{_MAX_VARIANTS} other combinations of leaves differ already")
                try:
                    found = make()
                except CannotVectorize as error:
                    found = str(error)
                self._made[key] = found
        if isinstance(found, str):
            raise CannotVectorize(found)
        return found


class WeightStacks:
    """The variants of one model's predict_on_batch. Thread-safe.

    A variant is tried in the child process, and compared with single calls, before it is used.
    """

    def __init__(self, source: GraphSource | None, probed: Probed, reason: str = "") -> None:
        """source: of predict_on_batch for inference. reason: why there are no variants; source is None then."""
        self._source = source
        self._probed = probed
        self._reason = reason
        self._variants: Variants[Stacked] = Variants()

    def get(self, differing: Sequence[bool]) -> Stacked:
        """See `calls.model.LoadedModel.stack`."""
        key = tuple(differing)
        return self._variants.get(key, lambda: self._variant(key))

    def judged(self, *, allows_rounding: bool) -> Vectorization:
        """What a description says of sets that differ in all leaves. Makes that variant."""
        try:
            variant = self.get([True] * len(self._probed.weights))
        except CannotVectorize as error:
            return Vectorization(str(error))
        return Vectorization("", variant.difference, allows_rounding)

    def _variant(self, differing: tuple[bool, ...]) -> Stacked:
        if self._source is None:
            raise CannotVectorize(self._reason)
        if not any(differing):
            raise CannotVectorize("the model has no weights")
        probed = self._probed
        concrete = vectorized(self._source, [*differing, *[True] * len(probed.found.spec.x.leaves)])
        shapes = [dataclasses.replace(probed.found.shape, rows=rows) for rows in (probed.found.shape.rows, 1, 0)]
        batches = [probed.found.x(None, shape) for shape in shapes]
        check_in_child(
            probed, concrete, differing, [[np.stack([leaf] * CHILD_SETS) for leaf in batch] for batch in batches]
        )
        variant = Stacked(concrete, differing, probed.device)
        variant.difference = _difference(probed, variant, differing)
        return variant


def check_in_child(
    probed: Probed, concrete: Any, differing: Sequence[bool], batches: Sequence[Sequence[Array]]
) -> None:
    """Runs a variant in the child process. Raises CannotVectorize where it ends the process.

    batches: what follows the weights of CHILD_SETS sets in each call.
    """
    if probed.trial is None:
        return
    weights = [
        ((CHILD_SETS, *weight.shape) if differs else weight.shape, weight.dtype.name)
        for weight, differs in zip(probed.weights, differing, strict=True)
    ]
    if reason := probed.trial.reason_against(concrete, weights, batches):
        raise CannotVectorize(reason)


def probed_sets(probed: Probed, differing: Sequence[bool], count: int) -> int:
    """How many sets a probe may make, at most `count`. Raises CannotVectorize where two take too much memory."""
    set_bytes = sum(weight.nbytes for weight, differs in zip(probed.weights, differing, strict=True) if differs)
    sets = min(count, _MAX_PROBED_BYTES // max(set_bytes, 1))
    if sets < 2:
        raise CannotVectorize(f"a set of weights has {set_bytes} bytes in the leaves that differ")
    return sets


def _difference(probed: Probed, variant: Stacked, differing: Sequence[bool]) -> float:
    """The largest difference of a variant from single calls. Raises CannotVectorize where it exceeds rounding."""
    spec, rng = probed.found.spec, np.random.default_rng(0)
    leaves = [*spec.predictions.leaves, *spec.prediction_mask.leaves]
    largest, is_probed = 0.0, False
    for count, rows in _PROBED:
        several = [varied(probed.weights, differing, rng) for _ in range(probed_sets(probed, differing, count))]
        shape = dataclasses.replace(probed.found.shape, rows=rows)
        batches = [probed.found.x(rng, shape) for _ in several]
        try:
            single = [
                probed.execution.run(Function.PREDICT_ON_BATCH, False, [*weights, *x])
                for weights, x in zip(several, batches, strict=True)
            ]
        except errors.ForwardPassError:
            # The model refuses random inputs of this size.
            continue
        try:
            stacked = variant.run(variant.stack(several), [np.stack(leaf) for leaf in zip(*batches, strict=True)])
        except errors.ForwardPassError as error:
            raise CannotVectorize(f"it refuses what single calls accept: {error}") from None
        for index, leaf in enumerate(leaves):
            expected = np.stack([results[index] for results in single])
            largest = max(largest, relative(stacked[index], expected, leaf))
        is_probed = True
    if not is_probed:
        raise CannotVectorize("the model refused the inputs of the probe")
    return largest


def varied(weights: Sequence[Array], differing: Sequence[bool], rng: np.random.Generator) -> list[Array]:
    """Another set of weights. Adds positive numbers only: the variance of a batch normalisation must stay positive."""
    return [
        np.asarray(weight + (rng.random(weight.shape, np.float32) / 8).astype(weight.dtype))
        if differs and weight.dtype.kind in "fVc"
        else weight
        for weight, differs in zip(weights, differing, strict=True)
    ]


def relative(found: Array, expected: Array, spec: TensorSpec) -> float:
    """The difference of two arrays relative to the largest number. Raises CannotVectorize where it exceeds rounding."""
    if found.shape == expected.shape and np.array_equal(found, expected, equal_nan=expected.dtype.kind in "fc"):
        return 0.0
    if not probing.agree(found, expected, spec):
        raise CannotVectorize("its results differ from those of single calls by more than rounding")
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    numbers, others = expected.astype(wide), found.astype(wide)
    # Random inputs may give NaN or infinity.
    finite = np.isfinite(numbers) & np.isfinite(others)
    scale = max(float(np.abs(numbers[finite]).max(initial=0)), 1e-30)
    return float(np.abs(numbers[finite] - others[finite]).max(initial=0)) / scale
