"""The messages of a training: requests from arguments, results from responses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from forwardpass import v1
from forwardpass.wire import conform, errors, messages, optimizers
from forwardpass.wire.functions import Function
from forwardpass.wire.trees import Kind, TreeDef
from forwardpass_client.calls import Metrics, check_handle, nested, x_and_y
from forwardpass_client.session_calls import SessionCalls
from forwardpass_client.training_batches import split
from forwardpass_client.weights_handles import WeightsHandleApi


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The result of a training.

    weights: the handle of the trained weights, which stay on the server.
    loss: the mean over all examples, computed while the weights changed; 0.0 without examples.
    num_examples, num_steps: how many examples and batches it was trained on.
    metrics: by name, over all batches, computed while the weights changed; None for a model without metrics.
    optimizer_state: the handle of the optimizer's state, for a training that continues; None unless it was asked for.
    """

    weights: Any
    loss: float
    num_examples: int
    num_steps: int
    metrics: Metrics | None = None
    optimizer_state: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """The checked options of an update: see `FunctionalModelApi.train`.

    optimizer: canonical JSON. trainable: one for each leaf of the trainable weights; () if all change.
    """

    optimizer: str
    learning_rate: float | None
    proximal: float
    trainable: tuple[bool, ...]
    checkpoint_steps: int
    optimizer_state_id: bytes
    keep_optimizer_state: bool


class TrainingCalls(SessionCalls):
    """The calls of one version of a model, and the messages of its trainings."""

    def update_options(
        self,
        *,
        optimizer: Any,
        learning_rate: Any,
        proximal: Any,
        trainable: Any,
        checkpoint_steps: Any,
        optimizer_state: Any,
        keep_optimizer_state: Any,
    ) -> UpdateOptions:
        """Checks the options of a training.

        Raises FunctionNotAvailable for a model that cannot be trained, OptimizerNotSupported, StructureMismatch for
        `trainable`, and TypeError or ValueError for other arguments.
        """
        self._check_available(Function.FORWARD_BACKWARD)
        found = optimizers.canonical(_plain(optimizer))
        rate = found.learning_rate if learning_rate is None else _factor(learning_rate, "learning_rate")
        if rate is None and not found.has_schedule:
            raise ValueError(
                "learning_rate: expected a number, because the optimizer's config has none: pass learning_rate=0.01"
            )
        if checkpoint_steps is not None and (
            isinstance(checkpoint_steps, bool) or not isinstance(checkpoint_steps, (int, np.integer))
        ):
            raise TypeError(f"checkpoint_steps: expected an int, or None, got {checkpoint_steps!r}")
        if checkpoint_steps is not None and not 1 <= checkpoint_steps < 2**48:
            raise ValueError(f"checkpoint_steps: expected 1 or more, or None, got {checkpoint_steps}")
        if not isinstance(keep_optimizer_state, bool):
            raise TypeError(f"keep_optimizer_state: expected True or False, got {keep_optimizer_state!r}")
        state_id = b""
        if optimizer_state is not None:
            state_id = check_handle(optimizer_state, "optimizer_state").held.weights_id
        return UpdateOptions(
            optimizer=found.text,
            learning_rate=rate,
            proximal=_factor(proximal, "proximal"),
            trainable=self._mask_of(trainable),
            checkpoint_steps=int(checkpoint_steps or 0),
            optimizer_state_id=state_id,
            keep_optimizer_state=keep_optimizer_state,
        )

    def _mask_of(self, trainable: Any) -> tuple[bool, ...]:
        if trainable is None:
            return ()
        tree = self._spec.weights.tree.children[0]
        mask = tuple(_expanded(trainable, tree, "trainable"))
        if mask and not any(mask):
            raise ValueError("trainable: expected at least one leaf that changes, got none")
        return () if all(mask) else mask

    def training_start(self, options: UpdateOptions, weights_id: bytes, weighted: bool) -> v1.TrainingStart:
        """What an update begins with. weighted: whether its batches have sample weights."""
        return v1.TrainingStart(
            model=self._selector,
            weights_id=weights_id,
            optimizer=options.optimizer,
            learning_rate=options.learning_rate,
            proximal=options.proximal,
            trainable=options.trainable,
            optimizer_state_id=options.optimizer_state_id,
            weighted=weighted,
            checkpoint_steps=options.checkpoint_steps,
            keep_optimizer_state=options.keep_optimizer_state,
        )

    def training_batch(self, batch: Any, weighted: bool) -> bytes:
        """One batch as a serialized TrainingBatch.

        batch: (x, y), (x, y, sample_weight), or a mapping with these keys; leaves of shape [B, ...].
        weighted: whether it must have sample weights, as the first batch has, or have none.
        Raises StructureMismatch, DTypeMismatch, ShapeMismatch, FunctionNotAvailable, MessageTooLarge.
        """
        batch_input, sample_weight = split(batch)
        if (sample_weight is not None) != weighted:
            raise errors.StructureMismatch(
                place="sample_weight",
                expected="sample weights, as in the first batch" if weighted else "none, as in the first batch",
                found="none" if weighted else "some",
            )
        x, y = x_and_y(batch_input)
        values = {"batch_input.x": x, "batch_input.y": y, "sample_weight": sample_weight}
        function = Function.WEIGHTED_FORWARD_BACKWARD if weighted else Function.FORWARD_BACKWARD
        parts = self._conform(function, values)
        return messages.encode(v1.TrainingBatch(), parts, self._max_request_bytes)

    def read_training(self, message: bytes) -> tuple[v1.TrainResponse, Any]:
        """A response of a training, and its metrics. Raises ModelChanged where another model is trained."""
        response, parts = messages.decode(v1.TrainResponse, message)
        if response.HasField("position"):
            self._check_identity(response.position.model)
        return response, nested(parts, "metrics")


def is_weighted(batch: Any) -> bool:
    """Whether a batch has sample weights."""
    return split(batch)[1] is not None


def _plain(optimizer: Any) -> Any:
    """An optimizer without objects of Keras or numpy: a name, or a mapping of JSON values."""
    if not isinstance(optimizer, (str, Mapping)) and callable(getattr(optimizer, "get_config", None)):
        optimizer = {"class_name": type(optimizer).__name__, "config": optimizer.get_config()}
    if not isinstance(optimizer, (str, Mapping)):
        raise TypeError(
            "optimizer: expected a name such as 'adam', a mapping with class_name and config, or a Keras optimizer, "
            f"got {type(optimizer).__name__}"
        )
    return _json(optimizer)


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_json(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _factor(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a number >= 0, got {value}")
    return float(value)


def _expanded(value: Any, tree: TreeDef, place: str) -> list[bool]:
    """A boolean for each leaf of a tree. value: a prefix of the tree; a boolean stands for every leaf below it."""
    if isinstance(value, (bool, np.bool_)):
        return [bool(value)] * tree.num_leaves
    if tree.kind is Kind.LEAF or isinstance(value, (str, bytes, WeightsHandleApi)):
        raise errors.StructureMismatch(place=place, expected="True or False", found=conform.kind_of(value))
    items = conform.items(value, tree, place)
    return [
        leaf
        for index, (item, child) in enumerate(zip(items, tree.children, strict=True))
        for leaf in _expanded(item, child, tree.child_path(place, index))
    ]
