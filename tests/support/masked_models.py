"""Keras models whose predictions keep a mask, beside what Keras itself says of them."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from forwardpass_server import FunctionalModel, functional_model_from_keras

layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Task:
    """Batches, and the loss and metrics that go with them. Specs are written as in forwardpass.json."""

    x: Any
    y: Any
    sample_weight: Any
    loss: str
    metrics: list[str]
    batch: Callable[[int, int], tuple[Any, Any, Any]]

    @property
    def config(self) -> Any:
        return {
            "input_spec": {"x": self.x, "y": self.y},
            "loss": self.loss,
            "weighted_metrics": self.metrics,
            "sample_weight_spec": self.sample_weight,
        }


def _token_batch(examples: int, seed: int) -> tuple[Any, Any, Any]:
    """Sequences of tokens 1 to 11, at most 6 long, padded with 0. Labels and weights of padding are wild on purpose."""
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 12, (examples, 6))
    for row, length in enumerate(rng.integers(1, 6, examples)):
        x[row, length:] = 0
    return x, rng.integers(0, 5, x.shape), rng.random(x.shape).astype(np.float32)


def _sequence_batch(examples: int, seed: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, 6, 3)).astype(np.float32)
    for row, length in enumerate(rng.integers(1, 6, examples)):
        x[row, length:] = 0
    return x, rng.normal(size=(examples, 6, 2)).astype(np.float32), rng.random((examples, 6)).astype(np.float32)


def _row_batch(examples: int, seed: int) -> tuple[Any, Any, Any]:
    """Rows of which every third is masked as a whole."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, 4)).astype(np.float32)
    x[::3] = 0
    return x, rng.normal(size=(examples, 2)).astype(np.float32), rng.random(examples).astype(np.float32)


def _tensor(dtype: str, *shape: int | None) -> Any:
    return {"dtype": dtype, "shape": list(shape)}


TOKENS = Task(
    _tensor("int64", None, None),
    _tensor("int64", None, None),
    _tensor("float32", None, None),
    "sparse_categorical_crossentropy",
    ["SparseCategoricalAccuracy", "SparseCategoricalCrossentropy"],
    _token_batch,
)
SEQUENCES = Task(
    _tensor("float32", None, None, 3),
    _tensor("float32", None, None, 2),
    _tensor("float32", None, None),
    "mse",
    ["MeanAbsoluteError", "MeanSquaredError"],
    _sequence_batch,
)
ROWS = Task(
    _tensor("float32", None, 4),
    _tensor("float32", None, 2),
    _tensor("float32", None),
    "mse",
    ["MeanAbsoluteError"],
    _row_batch,
)


def _tagger(*middle: keras.Layer, length: int | None = None, **dense: Any) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((length,), dtype="int64"),
            layers.Embedding(12, 8, mask_zero=True),
            *middle,
            layers.Dense(5, "softmax", **dense),
        ]
    )


def _attention() -> keras.Model:
    x = keras.Input((None,), dtype="int64")
    embedded = layers.Embedding(12, 8, mask_zero=True)(x)
    attended = layers.MultiHeadAttention(2, 4)(embedded, embedded)
    return keras.Model(x, layers.Dense(5, "softmax")(layers.LayerNormalization()(attended)))


def _concatenation() -> keras.Model:
    x = keras.Input((None,), dtype="int64")
    embedded = layers.Embedding(12, 8, mask_zero=True)(x)
    hidden = layers.Concatenate()([embedded, layers.SimpleRNN(4, return_sequences=True)(embedded)])
    return keras.Model(x, layers.Dense(5, "softmax")(layers.Activation("tanh")(hidden)))


def _nested() -> keras.Model:
    encoder = keras.Sequential(
        [
            keras.Input((None,), dtype="int64"),
            layers.Embedding(12, 8, mask_zero=True),
            layers.GRU(4, return_sequences=True),
        ]
    )
    x = keras.Input((None,), dtype="int64")
    return keras.Model(x, layers.Dense(5, "softmax")(encoder(x)))


def _masked(width: Any, *rest: keras.Layer) -> keras.Model:
    return keras.Sequential([keras.Input(width), layers.Masking(), *rest])


MODELS: dict[str, tuple[Task, Callable[[], keras.Model]]] = {
    "embedding": (TOKENS, _tagger),
    "concatenation": (TOKENS, _concatenation),
    "lstm": (TOKENS, lambda: _tagger(layers.LSTM(4, return_sequences=True))),
    "lstm_with_regularizer": (
        TOKENS,
        lambda: _tagger(layers.LSTM(4, return_sequences=True), kernel_regularizer="l2"),
    ),
    "bidirectional": (TOKENS, lambda: _tagger(layers.Bidirectional(layers.LSTM(3, return_sequences=True)))),
    # Over sequences of any length, Keras's TimeDistributed gives results of a wrong shape in a graph.
    "time_distributed": (
        dataclasses.replace(TOKENS, x=_tensor("int64", None, 6), y=_tensor("int64", None, 6)),
        lambda: _tagger(layers.TimeDistributed(layers.Dense(4, "relu")), length=6),
    ),
    "batch_normalization": (TOKENS, lambda: _tagger(layers.BatchNormalization())),
    "attention": (TOKENS, _attention),
    "nested": (TOKENS, _nested),
    "gru_with_mse": (
        SEQUENCES,
        lambda: _masked((None, 3), layers.GRU(4, return_sequences=True), layers.Dense(2)),
    ),
    "masking_with_activity_regularizer": (
        SEQUENCES,
        lambda: _masked((None, 3), layers.Dense(2, activity_regularizer="l2")),
    ),
    "masked_rows": (ROWS, lambda: _masked((4,), layers.Dense(2))),
}


def build(name: str) -> keras.Model:
    """A model of the table, compiled as its task says; the same weights each time."""
    task, make = MODELS[name]
    keras.utils.set_random_seed(3)
    model = make()
    model.compile(loss=task.loss, weighted_metrics=task.metrics)
    return model


def write_repository(folder: pathlib.Path) -> None:
    for name, (task, _) in MODELS.items():
        (folder / name / "1").mkdir(parents=True)
        build(name).save(folder / name / "1" / "model.keras")
        (folder / name / "1" / "forwardpass.json").write_text(json.dumps(task.config))


def penalties(model: keras.Model) -> float:
    """The losses that layers added in the model's last call."""
    return float(sum(float(np.sum(loss)) for loss in model.losses))


def evaluate(model: keras.Model, batches: Sequence[Any]) -> dict[str, float]:
    """The model's metrics over batches (x, y) or (x, y, sample_weight), as Keras counts them. Without its losses."""
    metrics = model.evaluate((batch for batch in batches), steps=len(batches), verbose=0, return_dict=True)
    return {name: float(value) for name, value in metrics.items() if not name.endswith("loss")}


_TWO_LOSSES = dict.fromkeys(("tags", "topic"), "sparse_categorical_crossentropy")
_TWO_METRICS = {"tags": ["SparseCategoricalAccuracy"], "topic": ["SparseCategoricalAccuracy"]}


def two_outputs_in_keras() -> keras.Model:
    """Tags for each token, whose output has a mask, and a topic for the whole text, whose output has none."""
    keras.utils.set_random_seed(3)
    x = keras.Input((None,), dtype="int64")
    hidden = layers.LSTM(4, return_sequences=True)(layers.Embedding(12, 8, mask_zero=True)(x))
    outputs = {
        "topic": layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(hidden)),
        "tags": layers.Dense(5, "softmax")(hidden),
    }
    model = keras.Model(x, outputs)
    model.compile(loss=_TWO_LOSSES, metrics=_TWO_METRICS)
    return model


def two_outputs() -> FunctionalModel:
    """For `--factory`."""
    tokens, topics = tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None], tf.int64)
    spec = (tokens, collections.OrderedDict(tags=tokens, topic=topics))
    return functional_model_from_keras(two_outputs_in_keras(), _TWO_LOSSES, spec, _TWO_METRICS)


def two_outputs_batch(examples: int, seed: int) -> tuple[Any, Any]:
    x, tags, _ = _token_batch(examples, seed)
    return x, {"tags": tags, "topic": np.random.default_rng(seed).integers(0, 3, examples)}
