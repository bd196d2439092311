"""The interfaces of a loaded model, of its trainers, and of a model loader."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from forwardpass.wire.description import ModelDescription
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass.wire.specs import StructureSpec

Leaf = Any
"""An array, or a tensor that is on the device already."""


class LoadedModel(Protocol):
    """A model that is traced and warmed. Any number of threads may run it at once."""

    @property
    def description(self) -> ModelDescription:
        """Its identity, its specs and the functions that it has. It does not change."""

    @property
    def initial_weights(self) -> Sequence[Array]:
        """The leaves of `description.spec.weights`."""

    def has_loops(self, function: Function, training: bool) -> bool:
        """Whether a function has a loop whose length its arguments' values decide. False for a missing function."""

    def run(self, function: Function, training: bool, leaves: Sequence[Leaf]) -> list[Array]:
        """Runs one function.

        training: False for functions without `has_training`.
        leaves: those of `spec.arguments[function]`, in order. They fit their specs, and nobody changes them meanwhile.
        Returns the leaves of `spec.results[function]`, in order, as read-only arrays.
        Raises ModelRefusedInput, OutOfMemory, or what else the model's code raises.
        """

    def stack(self, differing: Sequence[bool]) -> StackedPredictions:
        """Prepares predict_on_batch for inference for several sets of weights at once.

        differing: for each leaf of the weights, whether the sets differ in it; at least one is True.
        Takes from tenths of a second to seconds, the first time. For a thread of its own. Raises CannotVectorize.
        """

    def trainer(self, options: TrainingOptions) -> Trainer | None:
        """The trainer for these options; None if it is not prepared. May miss another spelling of the optimizer."""

    def find_trainer(self, options: TrainingOptions) -> Trainer | None:
        """The trainer for these options, whatever the spelling of the optimizer; None if it is not prepared.

        Takes milliseconds, and traces no graph. Raises OptimizerNotSupported.
        """

    def prepare_trainer(self, options: TrainingOptions) -> Trainer:
        """Prepares a trainer, which takes from tenths of a second to seconds. For a thread of its own.

        Raises OptimizerNotSupported, and FunctionNotAvailable for a model without gradients.
        """

    def evaluator(self, weighted: bool) -> Evaluator | None:
        """The evaluator for inference; None if the model has none. weighted: whether batches have sample weights."""

    def evaluator_of_stacks(self, weighted: bool, differing: Sequence[bool]) -> StackedEvaluator:
        """Prepares the evaluator for several sets of weights at once. differing: see `stack`.

        Takes from tenths of a second to seconds, the first time. For a thread of its own. Raises CannotVectorize.
        """


class CannotVectorize(Exception):
    """A function cannot be computed for several sets of weights at once. The message is the reason."""


class StackedPredictions(Protocol):
    """Computes predict_on_batch for K sets of weights at once, at least two. Any number of threads may use it.

    A set is the flat list of the placed leaves of a model's weights.
    """

    @property
    def difference(self) -> float:
        """The largest difference from single calls that was found, relative to the largest number; 0 for equal bits."""

    def stack(self, sets: Sequence[Sequence[Leaf]]) -> Sequence[Leaf]:
        """The weights of several sets, for `run`. Copies the leaves that differ. Raises OutOfMemory."""

    def run(self, weights: Sequence[Leaf], x: Sequence[Array]) -> list[Array]:
        """The predictions for all sets.

        weights: of `stack`. x: leaves of shape [K, B, ...], one batch for each set, none without elements.
        Returns leaves of shape [K, B, ...]. Raises ModelRefusedInput, OutOfMemory, or what else the model raises.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What the graph of an optimizer step depends on.

    optimizer: a Keras optimizer as canonical JSON: {"class_name": ..., "config": {...}} with sorted keys and without
      whitespace. Its learning rate is left out, unless it is a schedule: it is an argument of each step.
    weighted: whether batches have sample weights. proximal: whether the loss has FedProx's proximal term.
    trainable: one for each leaf of the trainable weights, false for a leaf that does not change; () if all change.
    """

    optimizer: str
    weighted: bool = False
    proximal: bool = False
    trainable: tuple[bool, ...] = ()


class Totals(NamedTuple):
    """Sums over the steps of an update.

    loss: the sum of each batch's loss times its number of examples. num_examples, num_steps: counts.
    metrics: leaves of the model's metrics; empty for a model without metrics.
    """

    loss: float
    num_examples: int
    num_steps: int
    metrics: Sequence[Array]


class Trainer(Protocol):
    """Optimizer steps of one model, for one set of options. Any number of threads may use it at once.

    A state is a flat list of tensors on the device: the trainable and the non-trainable weights, the variables of the
    optimizer, the metrics state and the sums of `Totals`. It is never changed: each step returns another one.
    """

    @property
    def state_bytes(self) -> int:
        """The size of a state."""

    @property
    def has_schedule(self) -> bool:
        """Whether the optimizer has a schedule of learning rates, so that `step` takes none."""

    @property
    def state_spec(self) -> StructureSpec:
        """The spec of a saved state: a mapping with the keys "optimizer", "metrics" and "totals"."""

    def begin(self, weights: Sequence[Leaf]) -> Sequence[Leaf]:
        """The state before the first step. weights: the leaves of the model's weights."""

    def restored(self, weights: Sequence[Leaf], saved: Sequence[Leaf], *, with_totals: bool) -> Sequence[Leaf]:
        """The state that continues from the leaves of `state_spec`.

        with_totals: whether the sums and the metrics continue too, as after a checkpoint. They begin again otherwise.
        """

    def step(
        self,
        state: Sequence[Leaf],
        batch: Sequence[Array],
        learning_rate: float,
        proximal: float,
        start: Sequence[Leaf],
    ) -> Sequence[Leaf]:
        """The state after one batch. Does not wait for a GPU.

        batch: the leaves of x, y, and of the sample weights where the options say so.
        learning_rate: ignored with a schedule. proximal, start: the coefficient and the trainable weights of the
        proximal term; ignored without one.
        Raises ModelRefusedInput and OutOfMemory.
        """

    def weights(self, state: Sequence[Leaf]) -> Sequence[Leaf]:
        """The leaves of the model's weights in a state."""

    def saved(self, state: Sequence[Leaf]) -> Sequence[Leaf]:
        """The leaves of `state_spec` in a state."""

    def totals(self, state: Sequence[Leaf]) -> Totals:
        """The sums of a state. Waits for a GPU."""


class Evaluator(Protocol):
    """Steps of an evaluation of one model. Any number of threads may use it at once.

    A step gives the bits that forward_pass, and then update_metrics_state with its results, give. It has no results
    for batches without rows, whose shapes `LoadedModel.run` corrects.
    """

    @property
    def joined(self) -> int:
        """How many batches one call of TensorFlow takes; 1 where several would not be faster."""

    def step(self, weights: Sequence[Leaf], state: Sequence[Leaf], batches: Sequence[Sequence[Leaf]]) -> Sequence[Leaf]:
        """The metrics state after these batches, as tensors on the device. Does not wait for a GPU.

        weights: the leaves of the model's weights. state: those of the metrics state, arrays or tensors.
        batches: for each the leaves of x, y, and of the sample weights where it has some. Each has rows.
        Raises what `LoadedModel.run` raises, where any of the batches fails.
        """

    def arrays(self, state: Sequence[Leaf]) -> list[Array]:
        """A metrics state as read-only arrays. Waits for a GPU."""


class StackedEvaluator(Protocol):
    """Steps of evaluations of K sets of weights on the same batches. Any number of threads may use it at once.

    A set is the flat list of the placed leaves of a model's weights. A stack of states has a first dimension of K.
    """

    @property
    def difference(self) -> float:
        """The largest difference from `Evaluator` that was found, relative to the largest number; 0 for equal bits."""

    def stack(self, sets: Sequence[Sequence[Leaf]]) -> Sequence[Leaf]:
        """The weights of several sets, for `step`. Copies the leaves that differ. Raises OutOfMemory."""

    def join(self, states: Sequence[Sequence[Leaf]]) -> Sequence[Leaf]:
        """The stack of the metrics states of K sets, which have equal shapes. Raises OutOfMemory."""

    def step(
        self, weights: Sequence[Leaf], states: Sequence[Leaf], batches: Sequence[Sequence[Leaf]]
    ) -> Sequence[Leaf]:
        """The stack of states after these batches: see `Evaluator.step`. weights: of `stack`. states: of `join`."""

    def split(self, states: Sequence[Leaf]) -> list[list[Array]]:
        """For each set its state as read-only arrays. Waits for a GPU."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSource:
    """Where one version of a model comes from: a folder, or a Python factory as `module:function`."""

    name: str
    version: int
    folder: pathlib.Path | None = None
    factory: str | None = None

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


class ModelLoader(Protocol):
    """Loads models."""

    def load(self, source: ModelSource) -> LoadedModel:
        """Reads, traces and warms a model. If it raises anything, this version cannot be served."""
