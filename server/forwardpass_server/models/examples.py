"""Example batches of a model, which all probes of a load use.

The operator may give a batch. Otherwise the examples are zeros or random numbers, of sizes that the model accepts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from forwardpass.wire import specs
from forwardpass.wire.description import ModelSpec
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass.wire.specs import TensorSpec
from forwardpass_server.models import probing

ROWS = 3

# Sizes of free dimensions other than the first, in the order in which they are tried. Small sizes are fast. Deep
# networks need large sizes, networks that halve an image need powers of two, and a reshape needs multiples.
SIZES = (3, 8, 12, 32, 60, 64, 128, 240)

# Another size for a model that accepts a size: most models accept the next size, the others a multiple.
_OTHER_SIZES: Sequence[Callable[[int], int]] = (lambda size: size + 1, lambda size: 2 * size)


class Runs(Protocol):
    """Runs functions of a model, as `execution.Execution` does."""

    def run(self, function: Function, training: bool, leaves: Sequence[Array]) -> list[Array]:
        """See `calls.model.LoadedModel.run`."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the free dimensions of a batch.

    rows: of the first. other: of all others, apart from those in `axes`, by the number of the dimension.
    """

    rows: int = ROWS
    other: int = SIZES[0]
    axes: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def of(self, spec: TensorSpec) -> list[int]:
        """The shape of one array. An array of any rank gets one dimension."""
        dims = (None,) if spec.shape is None else spec.shape
        return [
            dim if dim is not None else self.axes.get(axis, self.other if axis else self.rows)
            for axis, dim in enumerate(dims)
        ]


@dataclasses.dataclass(frozen=True)
class Given:
    """A batch of the operator: the leaves of x, and those of y or None."""

    x: Sequence[Array]
    y: Sequence[Array] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Example batches of one model.

    shape: of a batch that the model accepts. second: another one, with as many rows; None where none was found.
    is_random: the model refused zeros of this shape, and accepts random numbers.
    given: what the batches are made of; None for zeros and random numbers.
    predicted: the shapes of the predictions of a batch of `shape`; empty where the model refused every batch.
    refusal: why the model refused the last batch that was tried; "" where it accepted one.
    """

    spec: ModelSpec
    shape: Shape = Shape()
    second: Shape | None = None
    is_random: bool = False
    given: Given | None = None
    predicted: Sequence[Sequence[int]] = ()
    refusal: str = ""

    @property
    def shapes(self) -> list[Shape]:
        """One or two shapes that the model accepts."""
        return [self.shape] if self.second is None else [self.shape, self.second]

    @property
    def has_labels(self) -> bool:
        """Whether an operator gave labels."""
        return self.given is not None and self.given.y is not None

    def x(self, rng: np.random.Generator | None = None, shape: Shape | None = None) -> list[Array]:
        """The leaves of x. rng: None for zeros, or for the first rows of what was given."""
        leaves = self.given.x if self.given is not None else None
        return _batch(self.spec.x.leaves, leaves, shape or self.shape, rng)

    def y(
        self,
        rng: np.random.Generator | None = None,
        shape: Shape | None = None,
        predicted: Sequence[Sequence[int]] | None = None,
    ) -> list[Array]:
        """The leaves of y. predicted: the shapes of the predictions that they go with; None for `self.predicted`."""
        predicted = self.predicted if predicted is None else predicted
        given = self.given.y if self.given is not None else None
        found = []
        for index, leaf in enumerate(self.spec.y.leaves):
            leaf_shape = _as_predicted(leaf, shape or self.shape, predicted)
            found += _batch([leaf], None if given is None else [given[index]], leaf_shape, rng)
        return found


def find(model: Runs, spec: ModelSpec, weights: Sequence[Array], given: Given | None = None) -> Examples:
    """Examples that predict_on_batch for inference accepts, found by trying.

    Where the model refuses all that is tried, the examples are of the first size, and `refusal` says why.
    """
    has_other = any(axis for leaf in spec.x.leaves for axis, dim in enumerate(leaf.shape or ()) if dim is None)
    sizes: Sequence[int] = SIZES if has_other else SIZES[:1]
    if given is not None:
        sizes = [_given_size(spec, given), *sizes] if has_other else sizes
    refused = ""
    for size, is_random in itertools.product(sizes, (False, True)):
        examples = Examples(spec=spec, shape=Shape(other=size), is_random=is_random, given=given)
        try:
            examples = dataclasses.replace(examples, predicted=_predict(model, examples, weights))
        except Exception as error:  # The model's code may raise anything.
            refused = refused or str(error) or type(error).__name__
            continue
        return dataclasses.replace(examples, second=_second(model, examples, weights) if has_other else None)
    return Examples(spec=spec, given=given, refusal=refused)


def _predict(model: Runs, examples: Examples, weights: Sequence[Array]) -> list[Sequence[int]]:
    rng = np.random.default_rng(0) if examples.is_random else None
    results = model.run(Function.PREDICT_ON_BATCH, False, [*weights, *examples.x(rng)])
    return [result.shape for result in results[: len(examples.spec.predictions.leaves)]]


def _second(model: Runs, examples: Examples, weights: Sequence[Array]) -> Shape | None:
    for other in _OTHER_SIZES:
        shape = dataclasses.replace(examples.shape, other=other(examples.shape.other))
        try:
            _predict(model, dataclasses.replace(examples, shape=shape), weights)
        except Exception:  # See `find`.
            continue
        return shape
    return None


def _given_size(spec: ModelSpec, given: Given) -> int:
    """The size of the first free dimension, beside the batch, of what was given."""
    return next(
        array.shape[axis]
        for leaf, array in zip(spec.x.leaves, given.x, strict=True)
        for axis, dim in enumerate(leaf.shape or ())
        if axis and dim is None
    )


def _as_predicted(leaf: TensorSpec, shape: Shape, predicted: Sequence[Sequence[int]]) -> Shape:
    """The shape for a leaf of y: its free dimensions are as large as those of predictions of the same or one more rank.

    Labels have the predictions' rank, or, where they are numbers of classes, one less.
    """
    rank = len(leaf.shape or ())
    for extra in (0, 1):
        for sizes in predicted:
            dims = sizes[: len(sizes) - extra]
            if len(dims) == rank and all(dim in (None, size) for dim, size in zip(leaf.shape or (), dims, strict=True)):
                return dataclasses.replace(shape, axes={axis: size for axis, size in enumerate(dims) if axis})
    return shape


def _batch(
    leaves: Sequence[TensorSpec], given: Sequence[Array] | None, shape: Shape, rng: np.random.Generator | None
) -> list[Array]:
    if given is not None:
        return [_taken(array, leaf, shape, rng) for array, leaf in zip(given, leaves, strict=True)]
    if rng is None:
        return [specs.zeros(dataclasses.replace(leaf, shape=tuple(shape.of(leaf)))) for leaf in leaves]
    return [probing.random(dataclasses.replace(leaf, shape=tuple(shape.of(leaf))), 1, rng) for leaf in leaves]


def _taken(array: Array, spec: TensorSpec, shape: Shape, rng: np.random.Generator | None) -> Array:
    """An array of this shape whose rows, and whatever else is free, are those of another one, again and again."""
    for axis, (dim, size) in enumerate(zip(spec.shape or (), shape.of(spec), strict=False)):
        if dim is None and array.shape[axis]:
            count = array.shape[axis]
            picked = rng.integers(count, size=size) if rng is not None and not axis else np.arange(size) % count
            array = np.take(array, picked, axis)
    return array
