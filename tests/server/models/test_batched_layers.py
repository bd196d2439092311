"""Every public Keras layer: batched where its rows are independent, or listed with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire.specs import TensorSpec
from forwardpass_server.models import probing
from support import keras_layers
from support.keras_layers import EXAMPLES, Case
from support.predictors import Predictor

layers = keras.layers

# Layers whose predictions for a row depend on the other rows of its batch.
DEPENDENT = {
    "MelSpectrogram": "cuts off what is quieter than the loudest sound of the batch",
    "TextVectorization to the longest text": "pads each text to the length of the longest one",
}

# Layers whose rows are independent, and which are not batched all the same.
REFUSED = {
    "ContrastLimitedAdaptiveHistogramEqualization": "looks up the tables of all rows in one list, by number of the row",
    "TextVectorization, counted": "counts words by the numbers of the rows that the words come from",
}


def _normal(*shape: int) -> Callable[[np.random.Generator], Any]:
    return lambda rng: rng.standard_normal((EXAMPLES, *shape)).astype(np.float32)


def _tokens(*shape: int) -> Callable[[np.random.Generator], Any]:
    """Token ids, of which 0 is padding."""
    return lambda rng: rng.integers(0, 6, (EXAMPLES, *shape))


def _words(*shape: int) -> Callable[[np.random.Generator], Any]:
    words = np.array(["a", "b a", "d c b a", "", "B, a b!"], object)
    return lambda rng: rng.choice(words, (EXAMPLES, *shape))


def _texts_of_one_length(rng: np.random.Generator) -> np.ndarray:
    """Texts of another length for each generator."""
    return np.full((EXAMPLES, 1), "a " * int(30 - rng.integers(1, 30)), object)


def _of(shape: Sequence[int | None], *stack: Callable[[], Any], x: Any = None, dtype: str = "float32") -> Case:
    """A sequential model. Free sizes are 5."""
    sizes = [5 if size is None else size for size in shape]

    def model() -> keras.Model:
        given = result = keras.Input(shape, dtype=dtype)
        for make in stack:
            result = make()(result)
        return keras.Model(given, result)

    return Case(model, x or _normal(*sizes))


def _transformer() -> keras.Model:
    tokens = keras.Input((None,), dtype="int64")
    embedded = layers.Embedding(6, 8, mask_zero=True)(tokens)
    attended = layers.MultiHeadAttention(2, 4)(embedded, embedded, use_causal_mask=True)
    normed = layers.LayerNormalization()(embedded + attended)
    result = layers.LayerNormalization()(normed + layers.Dense(8)(layers.Dense(16, "gelu")(normed)))
    return keras.Model(tokens, layers.Dense(6, "softmax")(layers.GlobalAveragePooling1D()(result)))


def _embedded(*stack: Callable[[], Any]) -> Case:
    """Layers over masked token ids."""
    embedding = lambda: layers.Embedding(6, 4, mask_zero=True)  # noqa: E731
    return _of((None,), embedding, *stack, x=_tokens(5), dtype="int64")


def _text(**options: Any) -> Callable[[], Any]:
    return lambda: layers.TextVectorization(vocabulary=["a", "b", "c"], **options)


VARIANTS: dict[str, Case] = {
    "Dense on three dimensions": _of((6, 4), lambda: layers.Dense(3)),
    "Dense on free lengths": _of((None, 4), lambda: layers.Dense(3), lambda: layers.Dense(2)),
    "Dense on four dimensions": _of((None, 3, 4), lambda: layers.Dense(3, "relu")),
    "EinsumDense with an ellipsis": _of((5, 4), lambda: layers.EinsumDense("...b,bc->...c", (5, 3))),
    "Softmax on a middle axis": _of((5, 4), lambda: layers.Softmax(axis=1)),
    "BatchNormalization of channels first": _of((3, 4), lambda: layers.BatchNormalization(axis=1)),
    "LayerNormalization of two axes": _of((3, 4), lambda: layers.LayerNormalization(axis=(1, 2))),
    "Flatten of a free length": _of((4, 3), layers.Flatten, lambda: layers.Reshape((-1, 2)), layers.Flatten),
    "Permute and Dense": _of((4, 3), lambda: layers.Permute((2, 1)), lambda: layers.Dense(2)),
    "causal Conv1D": _of((None, 3), lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2)),
    "dilated Conv2D": _of((8, 8, 2), lambda: layers.Conv2D(4, 3, dilation_rate=(2, 3))),
    "grouped Conv2D": _of((6, 6, 4), lambda: layers.Conv2D(4, 3, groups=2)),
    "dilated DepthwiseConv2D": _of((8, 8, 2), lambda: layers.DepthwiseConv2D(3, dilation_rate=2)),
    "dilated SeparableConv1D": _of((8, 2), lambda: layers.SeparableConv1D(3, 2, dilation_rate=2)),
    "Conv1DTranspose of a fixed length": _of((6, 2), lambda: layers.Conv1DTranspose(3, 3, strides=2, padding="same")),
    "Conv2DTranspose of free sizes": _of((None, None, 2), lambda: layers.Conv2DTranspose(3, 3, strides=2)),
    "UpSampling2D, nearest": _of((3, None, 2), lambda: layers.UpSampling2D((2, 3))),
    "an image classifier": _of(
        (8, 8, 3),
        lambda: layers.Conv2D(4, 3, padding="same"),
        layers.BatchNormalization,
        layers.ReLU,
        layers.MaxPooling2D,
        layers.Flatten,
        lambda: layers.Dense(3, "softmax"),
    ),
    "LSTM backwards": _of((None, 3), lambda: layers.LSTM(4, go_backwards=True, return_sequences=True)),
    "LSTM unrolled": _of((4, 3), lambda: layers.LSTM(4, unroll=True)),
    "two layers of LSTM": _of((None, 3), lambda: layers.LSTM(4, return_sequences=True), lambda: layers.LSTM(2)),
    "masked LSTM": _embedded(lambda: layers.LSTM(3)),
    "masked LSTM with sequences": _embedded(lambda: layers.LSTM(3, return_sequences=True), lambda: layers.Dense(2)),
    "masked GRU": _embedded(lambda: layers.GRU(3, reset_after=False)),
    "masked Bidirectional": _embedded(lambda: layers.Bidirectional(layers.GRU(3), merge_mode="sum")),
    "Masking and SimpleRNN": _of((None, 3), layers.Masking, lambda: layers.SimpleRNN(4)),
    "stacked cells": _of((None, 3), lambda: layers.RNN([layers.LSTMCell(4), layers.GRUCell(2)], return_sequences=True)),
    "ConvLSTM2D and Dense": _of((3, 4, 4, 1), lambda: layers.ConvLSTM2D(2, 3), layers.Flatten, lambda: layers.Dense(2)),
    "TimeDistributed Conv2D": _of((3, 5, 5, 2), lambda: layers.TimeDistributed(layers.Conv2D(2, 3))),
    "masked GlobalAveragePooling1D": _embedded(layers.GlobalAveragePooling1D),
    "a transformer": Case(_transformer, _tokens(5)),
    "CategoryEncoding, counts": _of((4,), lambda: layers.CategoryEncoding(6, "count"), x=_tokens(4), dtype="int64"),
    "CategoryEncoding, one class": _of(
        (1,), lambda: layers.CategoryEncoding(6, "one_hot"), x=_tokens(1), dtype="int64"
    ),
    "Discretization, one class": _of((1,), lambda: layers.Discretization([-0.5, 0.5], output_mode="one_hot")),
    "IntegerLookup, many classes": _of(
        (4,), lambda: layers.IntegerLookup(vocabulary=[1, 3], output_mode="multi_hot"), x=_tokens(4), dtype="int64"
    ),
    "StringLookup, many classes": _of(
        (4,), lambda: layers.StringLookup(vocabulary=["a", "b a"], output_mode="count"), x=_words(4), dtype="string"
    ),
    "StringLookup backwards": _of(
        (4,), lambda: layers.StringLookup(vocabulary=["a", "b"], invert=True), x=_tokens(4), dtype="int64"
    ),
    "a text classifier": _of(
        (1,),
        _text(output_sequence_length=6),
        lambda: layers.Embedding(5, 4, mask_zero=True),
        lambda: layers.LSTM(3),
        lambda: layers.Dense(2),
        x=_words(1),
        dtype="string",
    ),
    "TextVectorization to the longest text": _of((1,), _text(), x=_texts_of_one_length, dtype="string"),
    "TextVectorization, counted": _of((1,), _text(output_mode="count"), x=_words(1), dtype="string"),
}

CASES = {**keras_layers.CASES, **VARIANTS}


@dataclasses.dataclass
class Outcome:
    """What became of one model. reason: why it is not batched. differences: how its rows depend on others."""

    reason: str
    differences: list[str]


def _predictor(model: keras.Model) -> Predictor:
    trainable, others = ([np.asarray(item) for item in items] for items in _weights(model))

    def predict(x: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
        first, second = list(weights[: len(trainable)]), list(weights[len(trainable) :])
        result, _ = model.stateless_call(first, second, list(x) if len(x) > 1 else x[0], training=False)
        return tf.nest.flatten(result)

    specs = [tf.TensorSpec(one.shape, one.dtype) for one in model.inputs]
    return Predictor(predict, specs, [*trainable, *others])


def _weights(model: keras.Model) -> tuple[list[Any], list[Any]]:
    return model.trainable_variables, model.non_trainable_variables


def _leaves(case: Case, predictor: Predictor, seed: int) -> list[np.ndarray]:
    x = case.x(np.random.default_rng(seed))
    specs = predictor.spec.x.leaves
    return [
        np.asarray(leaf, object) if spec.data_type.name == "string" else np.asarray(leaf, spec.dtype)
        for leaf, spec in zip(x if isinstance(x, list) else [x], specs, strict=True)
    ]


def _differences(case: Case, predictor: Predictor) -> list[str]:
    """How the predictions of three rows change with the rows behind them, and from those of the three rows alone."""
    mine, others, more = (_leaves(case, predictor, seed) for seed in range(3))
    # Large neighbours: a layer may look at the largest number of its batch.
    more = [leaf * leaf.dtype.type(1e6) if leaf.dtype.kind == "f" else leaf for leaf in more]
    alone = predictor.run(mine)
    first, second = (
        predictor.run([np.concatenate(pair) for pair in zip(mine, behind, strict=True)]) for behind in (others, more)
    )
    found = []
    specs: Sequence[TensorSpec] = predictor.spec.predictions.leaves
    for one, other, single, spec in zip(first, second, alone, specs, strict=True):
        if one.shape[1:] != single.shape[1:] or other.shape[1:] != single.shape[1:]:
            found.append("the shape of a row")
        # The same rows in the same places of a batch of the same size run through the same kernels: the same bits.
        elif not _same_bits(one[:EXAMPLES], other[:EXAMPLES]):
            found.append("the bits of a row beside other neighbours")
        # Kernels sum in another order for another number of rows. See `probing.agree`.
        elif not probing.agree(one[:EXAMPLES], single, spec):
            found.append("the numbers of a row without neighbours")
    return found


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.array_equal(one, other)) if one.dtype.kind == "O" else one.tobytes() == other.tobytes()


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    found = {}
    for name, case in CASES.items():
        predictor = _predictor(case.model())
        found[name] = Outcome(predictor.reason(), _differences(case, predictor))
    return found


def test_the_rows_of_every_batched_layer_are_independent(outcomes):
    wrong = {name: one.differences for name, one in outcomes.items() if not one.reason and one.differences}
    assert wrong == {}


def test_every_layer_with_independent_rows_is_batched_or_listed(outcomes):
    refused = {name: one.reason for name, one in outcomes.items() if one.reason}
    assert refused.keys() == {*DEPENDENT, *REFUSED}, refused


def test_at_least_nine_of_ten_layers_with_independent_rows_are_batched(outcomes):
    independent = outcomes.keys() - DEPENDENT.keys()
    batched = [name for name in independent if not outcomes[name].reason]
    assert len(batched) >= 0.9 * len(independent)


def test_layers_that_are_listed_as_dependent_mix_rows(outcomes):
    assert [name for name in DEPENDENT if not outcomes[name].differences] == []


def test_layers_that_are_listed_as_refused_keep_rows_apart(outcomes):
    assert [name for name in REFUSED if outcomes[name].differences] == []
