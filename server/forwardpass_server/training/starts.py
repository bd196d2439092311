"""What a client update begins with: its options, checked."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from forwardpass.wire import errors, manifests, optimizers

_LARGEST = float(np.finfo(np.float32).max)

# A number of batches: far beyond what a stream can carry.
_MAX_SEQUENCE = 2**48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """A client update as its caller asks for it: see `TrainingStart` of training.proto.

    learning_rate: None for the optimizer's own. trainable: () if every leaf changes.
    optimizer_state_id, start_weights_id: b"" for none.
    """

    name: str
    version: int
    label: str
    weights_id: bytes
    optimizer: str
    learning_rate: float | None
    proximal: float
    trainable: tuple[bool, ...]
    optimizer_state_id: bytes
    weighted: bool
    checkpoint_steps: int
    keep_optimizer_state: bool
    checkpoint_sequence: int
    start_weights_id: bytes

    def check(self) -> None:
        """Raises InvalidRequest for a value that no update can have."""
        manifests.check_digest(self.weights_id, "start.weights_id")
        for name in ("optimizer_state_id", "start_weights_id"):
            value: bytes = getattr(self, name)
            if value:
                manifests.check_digest(value, f"start.{name}")
        for name in ("checkpoint_steps", "checkpoint_sequence"):
            number: int = getattr(self, name)
            if not 0 <= number <= _MAX_SEQUENCE:
                raise errors.InvalidRequest(place=f"start.{name}", expected=f"0 to {_MAX_SEQUENCE}", found=f"{number}")
        if self.checkpoint_sequence and not self.optimizer_state_id:
            raise errors.InvalidRequest(
                place="start.optimizer_state_id", expected="that of the checkpoint", found="none"
            )
        if self.learning_rate is not None:
            _check_factor(self.learning_rate, "start.learning_rate")
        _check_factor(self.proximal, "start.proximal")


def _check_factor(value: Any, place: str) -> None:
    """Raises InvalidRequest for a factor that float32 cannot hold, and for a negative one."""
    if not 0 <= value <= _LARGEST:
        raise errors.InvalidRequest(place=place, expected=f"a number from 0 to {_LARGEST:g}", found=f"{value}")


@dataclasses.dataclass(frozen=True, slots=True)
class Optimizer:
    """An optimizer. text: as canonical JSON, see `TrainingOptions.optimizer`. learning_rate: 0.0 with a schedule."""

    text: str
    learning_rate: float


def optimizer(text: str, learning_rate: float | None) -> Optimizer:
    """Parses an optimizer. learning_rate: replaces the optimizer's own; None to use that one.

    Raises OptimizerNotSupported for anything else than a Keras optimizer as JSON, and InvalidRequest without a learning
    rate.
    """
    found = optimizers.canonical(text, "start.optimizer")
    if learning_rate is None and found.has_schedule:
        return Optimizer(found.text, 0.0)
    rate = found.learning_rate if learning_rate is None else learning_rate
    if rate is None:
        raise errors.InvalidRequest(
            place="start.learning_rate", expected="a number, because the optimizer's config has none", found="none"
        )
    _check_factor(rate, "start.learning_rate")
    if found.has_schedule:
        # The number replaces it.
        value = json.loads(found.text)
        del value["config"]["learning_rate"]
        found = optimizers.canonical(value, "start.optimizer")
    return Optimizer(found.text, rate)


def mask(trainable: tuple[bool, ...], leaves: int) -> tuple[bool, ...]:
    """The mask of `TrainingOptions` for a model with so many leaves of trainable weights: () if all of them change.

    Raises InvalidRequest for a mask of another length, and for one under which no leaf changes.
    """
    if not trainable or (len(trainable) == leaves and all(trainable)):
        return ()
    if len(trainable) != leaves:
        raise errors.InvalidRequest(
            place="start.trainable", expected=f"{leaves}, one for each leaf, or none", found=f"{len(trainable)}"
        )
    if not any(trainable):
        raise errors.InvalidRequest(place="start.trainable", expected="a leaf that changes", found="none")
    return trainable
