"""Keras models as people train them: compiled, with what `Model.compile` takes, and data for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model.

    build: makes it, uncompiled, its weights drawn from a fixed seed.
    compile: what `Model.compile` is given. input_spec: (x, y).
    batch: draws (x, y) with so many examples.
    has_tables: it holds lookup tables, which no export can.
    weight_rank: how many dimensions of y a sample weight has.
    tolerance: of its numbers, as a share of the largest.
    """

    build: Callable[[], keras.Model]
    compile: Callable[[], Mapping[str, Any]]
    input_spec: tuple[Any, Any]
    batch: Callable[[np.random.Generator, int], tuple[Any, Any]]
    has_tables: bool = False
    weight_rank: int = 1
    tolerance: float = 1e-5

    @property
    def sample_weight_spec(self) -> Any:
        return tf.TensorSpec([None] * self.weight_rank, tf.float32)

    def model(self) -> keras.Model:
        """The compiled model."""
        keras.utils.set_random_seed(0)
        model = self.build()
        model.compile(**self.compile())
        return model


def _classes(count: int) -> dict[str, Any]:
    return {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": [keras.metrics.SparseCategoricalAccuracy(), keras.metrics.SparseTopKCategoricalAccuracy(2)],
    }


def _bag_of_words() -> keras.Model:
    words = keras.Input((None,), dtype="int64")
    hidden = layers.GlobalAveragePooling1D()(layers.Embedding(20, 8, mask_zero=True)(words))
    return keras.Model(words, layers.Dense(3)(hidden))


def _padded(rng: np.random.Generator, examples: int, words: int, vocabulary: int) -> Any:
    """Sequences of different lengths, padded with zeros."""
    x = rng.integers(1, vocabulary, (examples, words))
    x[np.arange(words) >= rng.integers(1, words + 1, (examples, 1))] = 0
    return x


def _tagger() -> keras.Model:
    words = keras.Input((None,), dtype="int64")
    hidden = layers.Embedding(12, 8, mask_zero=True)(words)
    hidden = layers.Bidirectional(layers.LSTM(6, return_sequences=True))(hidden)
    return keras.Model(words, layers.Dense(5, kernel_regularizer="l2")(hidden))


def _sensors() -> keras.Model:
    """Of series of seven steps: with steps of any number Keras itself traces a TimeDistributed layer wrongly."""
    series = keras.Input((7, 3))
    hidden = layers.GRU(6, return_sequences=True)(layers.Masking()(series))
    return keras.Model(series, layers.TimeDistributed(layers.Dense(2))(hidden))


def _sensors_batch(rng: np.random.Generator, examples: int) -> Any:
    x = rng.standard_normal((examples, 7, 3), np.float32)
    x[np.arange(7) >= rng.integers(1, 8, (examples, 1))] = 0
    return x, rng.standard_normal((examples, 7, 2), np.float32)


def _tagger_batch(rng: np.random.Generator, examples: int) -> Any:
    x = _padded(rng, examples, 7, 12)
    return x, np.where(x > 0, 1 + x % 4, 0)


def _transformer() -> keras.Model:
    words = keras.Input((None,), dtype="int64")
    hidden = layers.Embedding(30, 16, mask_zero=True)(words)
    attended = layers.MultiHeadAttention(2, 8, dropout=0.1, seed=1)(hidden, hidden, use_causal_mask=True)
    hidden = layers.LayerNormalization()(layers.Add()([hidden, attended]))
    further = layers.Dense(16)(layers.Dense(32, "gelu")(hidden))
    hidden = layers.LayerNormalization()(layers.Add()([hidden, layers.Dropout(0.1, seed=2)(further)]))
    return keras.Model(words, layers.Dense(30)(hidden))


def _transformer_batch(rng: np.random.Generator, examples: int) -> Any:
    x = _padded(rng, examples, 9, 30)
    return x, np.roll(x, -1, 1)


def _two_tasks() -> keras.Model:
    given = keras.Input((6,))
    hidden = layers.Dense(8, "relu")(given)
    outputs = {
        "click": layers.Dense(1, "sigmoid", name="click")(hidden),
        "stars": layers.Dense(1, name="stars")(hidden),
    }
    return keras.Model(given, outputs)


def _two_tasks_batch(rng: np.random.Generator, examples: int) -> Any:
    x = rng.standard_normal((examples, 6), np.float32)
    return x, {
        "click": rng.integers(0, 2, (examples, 1)).astype(np.float32),
        "stars": 5 * rng.random((examples, 1), np.float32),
    }


def _u_net() -> keras.Model:
    """Of images of any size that both poolings divide."""
    image = keras.Input((None, None, 3))
    first = layers.Conv2D(4, 3, padding="same", activation="relu")(image)
    second = layers.Conv2D(8, 3, padding="same", activation="relu")(layers.MaxPooling2D()(first))
    hidden = layers.Conv2D(8, 3, padding="same", activation="relu")(layers.MaxPooling2D()(second))
    hidden = layers.Concatenate()([layers.UpSampling2D()(hidden), second])
    hidden = layers.Conv2DTranspose(4, 3, strides=2, padding="same")(hidden)
    hidden = layers.BatchNormalization()(layers.Concatenate()([hidden, first]))
    return keras.Model(image, layers.Conv2D(3, 1, activation="softmax")(hidden))


def _u_net_batch(rng: np.random.Generator, examples: int) -> Any:
    return rng.random((examples, 8, 12, 3), np.float32), rng.integers(0, 3, (examples, 8, 12))


def _mobile_net() -> keras.Model:
    return keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10, classifier_activation=None)


def _two_towers() -> keras.Model:
    """Who would like what: a dot product of a user's and an item's embedding, both looked up by name."""
    user, item = keras.Input((), dtype="string", name="user"), keras.Input((), dtype="string", name="item")
    user_index = layers.StringLookup(vocabulary=["ann", "ben", "eve"])(user)
    item_index = layers.StringLookup(vocabulary=["pen", "cup"])(item)
    score = layers.Dot(1)([layers.Embedding(4, 5)(user_index), layers.Embedding(3, 5)(item_index)])
    return keras.Model({"user": user, "item": item}, score)


def _two_towers_batch(rng: np.random.Generator, examples: int) -> Any:
    x = {
        "user": rng.choice(np.array(["ann", "ben", "eve", "joe"], object), examples),
        "item": rng.choice(np.array(["pen", "cup", "hat"], object), examples),
    }
    return x, rng.random((examples, 1), np.float32)


def _mixed_precision() -> keras.Model:
    policy = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu", dtype=policy),
            layers.BatchNormalization(dtype=policy),
            layers.Flatten(dtype=policy),
            layers.Dense(3, dtype="float32"),
        ]
    )


def _quantized() -> keras.Model:
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16, "relu"), layers.Dense(3)])
    for layer in model.layers:  # Model.quantize warns of the input layer.
        layer.quantize("int8")
    return model


def _vectors(*shape: int) -> Callable[[np.random.Generator, int], tuple[Any, Any]]:
    """Random numbers, and one of three classes."""
    return lambda rng, examples: (
        rng.standard_normal((examples, *shape), np.float32),
        rng.integers(0, 3, examples),
    )


def _spec(dtype: str, *shape: int | None) -> Any:
    return tf.TensorSpec(shape, dtype)


_WORDS = _spec("int64", None, None)
_CLASS = _spec("int64", None)
_NUMBER = _spec("float32", None, 1)

ENTRIES: dict[str, Entry] = {
    "bag_of_words": Entry(
        _bag_of_words,
        lambda: _classes(3),
        (_WORDS, _CLASS),
        lambda rng, examples: (_padded(rng, examples, 6, 20), rng.integers(0, 3, examples)),
    ),
    "tagger": Entry(_tagger, lambda: _classes(5), (_WORDS, _WORDS), _tagger_batch, weight_rank=2),
    "sensors": Entry(
        _sensors,
        lambda: {"loss": "mse", "metrics": ["mae"]},
        (_spec("float32", None, 7, 3), _spec("float32", None, 7, 2)),
        _sensors_batch,
        weight_rank=2,
    ),
    "transformer": Entry(_transformer, lambda: _classes(30), (_WORDS, _WORDS), _transformer_batch, weight_rank=2),
    "two_tasks": Entry(
        _two_tasks,
        lambda: {
            "loss": {"click": "binary_crossentropy", "stars": "mse"},
            "loss_weights": {"click": 1.0, "stars": 0.2},
            "metrics": {"click": [keras.metrics.AUC(name="auc"), "accuracy"], "stars": ["mae"]},
        },
        (_spec("float32", None, 6), {"click": _NUMBER, "stars": _NUMBER}),
        _two_tasks_batch,
    ),
    "u_net": Entry(
        _u_net,
        lambda: {
            "loss": "sparse_categorical_crossentropy",
            "metrics": [keras.metrics.MeanIoU(3, sparse_y_pred=False, name="mean_iou"), "accuracy"],
        },
        (_spec("float32", None, None, None, 3), _spec("int64", None, None, None)),
        _u_net_batch,
        weight_rank=3,
    ),
    "mobile_net": Entry(
        _mobile_net,
        lambda: _classes(10),
        (_spec("float32", None, 32, 32, 3), _CLASS),
        lambda rng, examples: (rng.random((examples, 32, 32, 3), np.float32), rng.integers(0, 10, examples)),
        # 50 layers with batch normalisation add the rounding up.
        tolerance=1e-4,
    ),
    "two_towers": Entry(
        _two_towers,
        lambda: {"loss": "mse", "metrics": ["mae"]},
        ({"user": _spec("string", None), "item": _spec("string", None)}, _NUMBER),
        _two_towers_batch,
        has_tables=True,
    ),
    "mixed_precision": Entry(
        _mixed_precision,
        lambda: _classes(3),
        (_spec("float32", None, 8, 8, 1), _CLASS),
        _vectors(8, 8, 1),
        # bfloat16 keeps 8 bits: another order of sums is another last bit.
        tolerance=2e-2,
    ),
    "quantized": Entry(
        _quantized,
        lambda: _classes(3),
        (_spec("float32", None, 8), _CLASS),
        _vectors(8),
    ),
}
