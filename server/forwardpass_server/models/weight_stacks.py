"""Graphs that compute a function for several sets of weights at once.

Weights that differ between the sets are stacked: they have a first dimension of K, the number of sets. Weights that all
sets share, and inputs that all sets share, are not: what depends on them alone is computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from forwardpass_server.models import onednn_faults, private_pfor, private_tensorflow
from forwardpass_server.models.private_pfor import CannotVectorize


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
    """A concrete function that computes a function for K sets of arguments, for any K from 1 on.

    stacked: for each argument whether it has a first dimension of K; at least one has.
    Each result has a first dimension of K. Raises CannotVectorize.
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
