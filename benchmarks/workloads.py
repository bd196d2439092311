"""What is measured: three functional models, and a batch for each."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model of `benchmarks.models` by name, and the examples in one batch."""

    title: str
    model: str
    examples: int


WORKLOADS = {
    "small-1": Workload("MLP 784-128-10, batch 1", "mlp", 1),
    "small-32": Workload("MLP 784-128-10, batch 32", "mlp", 32),
    "medium": Workload("CNN of 1M parameters, batch 32", "cnn", 32),
    "tiny": Workload("x of 4 KB, returned scaled", "scale", 1),
    "large": Workload("x of 16 MB, returned scaled", "scale", 4096),
    "larger": Workload("x of 64 MB, returned scaled", "scale", 16384),
    "heavy": Workload("MLP of 100 MB of weights, batch 1", "mlp_100", 1),
    "named-1": Workload("1 MB of weights, a few of them read", "corner_1", 1),
    "named-100": Workload("100 MB of weights, a few of them read", "corner_100", 1),
}

# MLPs of 784-HIDDEN-10.
HIDDEN = {"mlp": 128, "mlp_100": 33_000}
ROWS = {"corner_1": 320, "corner_100": 32_000}

# What x of one example looks like.
_SHAPES = {"cnn": (28, 28, 1), "scale": (1024,)}


def weights(model: str) -> Any:
    """(trainable, non_trainable) as numpy arrays, the same in every process."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) / 10).astype(np.float32)

    if model in HIDDEN:
        hidden = HIDDEN[model]
        return (normal(784, hidden), normal(hidden), normal(hidden, 10), normal(10)), ()
    if model == "cnn":
        convolutions = (normal(3, 3, 1, 16), normal(16), normal(3, 3, 16, 32), normal(32))
        return (*convolutions, normal(1568, 600), normal(600), normal(600, 62), normal(62)), ()
    if model in ROWS:
        return (normal(ROWS[model], 784),), ()
    return (np.float32([2.0]),), ()


def batch(name: str) -> np.ndarray[Any, Any]:
    """x of a workload."""
    workload = WORKLOADS[name]
    shape = (workload.examples, *_SHAPES.get(workload.model, (784,)))
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def check(name: str, predictions: Any) -> None:
    """Ends the program where an MLP's predictions are wrong. Those of other models are not looked at."""
    if WORKLOADS[name].model not in HIDDEN:
        return
    (w1, b1, w2, b2), _ = weights(WORKLOADS[name].model)
    expected = np.maximum(batch(name) @ w1 + b1, 0) @ w2 + b2
    # Sums of as many float32 as there are hidden units, in whatever order.
    if not np.allclose(predictions, expected, rtol=1e-3, atol=1e-3):
        raise SystemExit(f"{name}: these are not the predictions")


def labels(name: str) -> np.ndarray[Any, Any]:
    """y of a workload that classifies."""
    return np.random.default_rng(2).integers(0, 10, WORKLOADS[name].examples)


def vector(seed: int, length: int) -> np.ndarray[Any, Any]:
    """Numbers of their own for each seed."""
    return np.random.default_rng(seed).standard_normal(length, np.float32)
