"""One small model for each public Keras layer, with a batch that it takes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

layers = keras.layers

Batch = Callable[[np.random.Generator], Any]

EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """model: makes the model. x: draws its inputs for `EXAMPLES` examples."""

    model: Callable[[], keras.Model]
    x: Batch


def _normal(*shape: int) -> Batch:
    return lambda rng: rng.standard_normal((EXAMPLES, *shape), np.float32)


def _image(*shape: int) -> Batch:
    return lambda rng: rng.uniform(0, 255, (EXAMPLES, *shape)).astype(np.float32)


def _integers(bound: int, *shape: int) -> Batch:
    return lambda rng: rng.integers(0, bound, (EXAMPLES, *shape))


def _words(*shape: int) -> Batch:
    return lambda rng: rng.choice(np.array(["a", "b", "c", "d e"], object), (EXAMPLES, *shape))


def _case(layer: Callable[[], Any], shape: tuple[int | None, ...], x: Batch, dtype: str = "float32") -> Case:
    """A model of one layer over one input."""

    def model() -> keras.Model:
        given = keras.Input(shape, dtype=dtype)
        return keras.Model(given, layer()(given))

    return Case(model, x)


def _on(shape: tuple[int, ...], layer: Callable[[], Any], x: Callable[..., Batch] = _normal) -> Case:
    return _case(layer, shape, x(*shape))


def _sequence(layer: Callable[[], Any], features: int = 4) -> Case:
    """A layer over sequences of any length."""
    return _case(layer, (None, features), _normal(6, features))


def _pair(layer: Callable[[], Any], *shape: int) -> Case:
    """A layer that takes a list of two inputs."""

    def model() -> keras.Model:
        given = [keras.Input(shape), keras.Input(shape)]
        return keras.Model(given, layer()(given))

    return Case(model, lambda rng: [_normal(*shape)(rng), _normal(*shape)(rng)])


def _attention(layer: Callable[[], Any]) -> Case:
    def model() -> keras.Model:
        query, value = keras.Input((5, 8)), keras.Input((6, 8))
        return keras.Model([query, value], layer()(query, value))

    return Case(model, lambda rng: [_normal(5, 8)(rng), _normal(6, 8)(rng)])


def _cell(layer: Callable[[], Any], states: int) -> Case:
    def model() -> keras.Model:
        x, given = keras.Input((4,)), [keras.Input((3,)) for _ in range(states)]
        output, _ = layer()(x, given)
        return keras.Model([x, *given], output)

    return Case(model, lambda rng: [_normal(4)(rng), *(_normal(3)(rng) for _ in range(states))])


def _stacked_cells() -> keras.Model:
    x, first, second = keras.Input((4,)), keras.Input((3,)), keras.Input((2,))
    cell = layers.StackedRNNCells([layers.GRUCell(3), layers.SimpleRNNCell(2)])
    output, _ = cell(x, [first, second])
    return keras.Model([x, first, second], output)


def _adapted(layer: Any, *data: Any) -> Any:
    layer.adapt(np.array(*data))
    return layer


_AUGMENTATIONS: dict[str, Callable[[], Any]] = {
    "AugMix": lambda: layers.AugMix(seed=1),
    "AutoContrast": layers.AutoContrast,
    "CenterCrop": lambda: layers.CenterCrop(4, 5),
    "ContrastLimitedAdaptiveHistogramEqualization": lambda: layers.ContrastLimitedAdaptiveHistogramEqualization(
        tile_grid_size=(2, 2)
    ),
    "RandAugment": lambda: layers.RandAugment(seed=1),
    "RandomBrightness": lambda: layers.RandomBrightness(0.3, seed=1),
    "RandomColorDegeneration": lambda: layers.RandomColorDegeneration(0.5, seed=1),
    "RandomColorJitter": lambda: layers.RandomColorJitter(brightness_factor=0.2, contrast_factor=0.2, seed=1),
    "RandomContrast": lambda: layers.RandomContrast(0.3, seed=1),
    "RandomCrop": lambda: layers.RandomCrop(8, 8, seed=1),
    "RandomElasticTransform": lambda: layers.RandomElasticTransform(seed=1),
    "RandomErasing": lambda: layers.RandomErasing(seed=1),
    "RandomFlip": lambda: layers.RandomFlip(seed=1),
    "RandomGaussianBlur": lambda: layers.RandomGaussianBlur(seed=1),
    "RandomGrayscale": lambda: layers.RandomGrayscale(0.5, seed=1),
    "RandomHue": lambda: layers.RandomHue(0.3, seed=1),
    "RandomInvert": lambda: layers.RandomInvert(0.5, seed=1),
    "RandomPerspective": lambda: layers.RandomPerspective(seed=1),
    "RandomPosterization": lambda: layers.RandomPosterization(4, seed=1),
    "RandomRotation": lambda: layers.RandomRotation(0.2, seed=1),
    "RandomSaturation": lambda: layers.RandomSaturation(0.3, seed=1),
    "RandomSharpness": lambda: layers.RandomSharpness(0.5, seed=1),
    "RandomShear": lambda: layers.RandomShear((0.0, 0.2), (0.0, 0.2), seed=1),
    "RandomTranslation": lambda: layers.RandomTranslation(0.2, 0.2, seed=1),
    "RandomZoom": lambda: layers.RandomZoom(0.2, seed=1),
    "Rescaling": lambda: layers.Rescaling(1 / 255),
    "Resizing": lambda: layers.Resizing(5, 4),
    "Solarization": lambda: layers.Solarization(seed=1),
    "Pipeline": lambda: layers.Pipeline([layers.Rescaling(1 / 255), layers.RandomFlip(seed=1)]),
}

CASES: dict[str, Case] = {
    # Of vectors.
    "Activation": _on((4,), lambda: layers.Activation("gelu")),
    "ActivityRegularization": _on((4,), lambda: layers.ActivityRegularization(0.1, 0.2)),
    "AlphaDropout": _on((4,), lambda: layers.AlphaDropout(0.3, seed=1)),
    "BatchNormalization": _on((4,), layers.BatchNormalization),
    "Dense": _on((4,), lambda: layers.Dense(3, "relu")),
    "Dropout": _on((4,), lambda: layers.Dropout(0.3, seed=1)),
    "ELU": _on((4,), layers.ELU),
    "EinsumDense": _on((5, 4), lambda: layers.EinsumDense("abc,cd->abd", (None, 3), bias_axes="d")),
    "Flatten": _on((5, 4), layers.Flatten),
    "GaussianDropout": _on((4,), lambda: layers.GaussianDropout(0.3, seed=1)),
    "GaussianNoise": _on((4,), lambda: layers.GaussianNoise(0.3, seed=1)),
    "GroupNormalization": _on((5, 4), lambda: layers.GroupNormalization(2)),
    "Identity": _on((4,), layers.Identity),
    "LayerNormalization": _on((4,), layers.LayerNormalization),
    "LeakyReLU": _on((4,), layers.LeakyReLU),
    "Normalization": _on((4,), lambda: layers.Normalization(mean=[0.0, 1.0, 2.0, 3.0], variance=[1.0, 2.0, 3.0, 4.0])),
    "PReLU": _on((4,), layers.PReLU),
    "RMSNormalization": _on((4,), layers.RMSNormalization),
    "ReLU": _on((4,), lambda: layers.ReLU(negative_slope=0.1)),
    "RepeatVector": _on((4,), lambda: layers.RepeatVector(3)),
    "Reshape": _on((4, 6), lambda: layers.Reshape((-1, 8))),
    "Softmax": _on((4,), layers.Softmax),
    "SpectralNormalization": _on((4,), lambda: layers.SpectralNormalization(layers.Dense(3))),
    "UnitNormalization": _on((4,), layers.UnitNormalization),
    "Permute": _on((4, 6), lambda: layers.Permute((2, 1))),
    # Of several inputs.
    **{
        name: _pair(getattr(layers, name), 4)
        for name in ("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract")
    },
    "Dot": _pair(lambda: layers.Dot(1), 4),
    "AdditiveAttention": _pair(layers.AdditiveAttention, 5, 4),
    "Attention": _pair(layers.Attention, 5, 4),
    "GroupQueryAttention": _attention(lambda: layers.GroupQueryAttention(4, 4, 2)),
    "MultiHeadAttention": _attention(lambda: layers.MultiHeadAttention(2, 4)),
    # Of sequences.
    "AdaptiveAveragePooling1D": _on((6, 4), lambda: layers.AdaptiveAveragePooling1D(3)),
    "AdaptiveMaxPooling1D": _on((6, 4), lambda: layers.AdaptiveMaxPooling1D(3)),
    "AveragePooling1D": _sequence(lambda: layers.AveragePooling1D(2)),
    "Bidirectional": _sequence(lambda: layers.Bidirectional(layers.LSTM(3))),
    "Conv1D": _sequence(lambda: layers.Conv1D(3, 2)),
    "Conv1DTranspose": _sequence(lambda: layers.Conv1DTranspose(3, 2, strides=2)),
    "Cropping1D": _sequence(lambda: layers.Cropping1D((1, 2))),
    "DepthwiseConv1D": _sequence(lambda: layers.DepthwiseConv1D(2)),
    "GRU": _sequence(lambda: layers.GRU(3, return_sequences=True)),
    "GlobalAveragePooling1D": _sequence(layers.GlobalAveragePooling1D),
    "GlobalMaxPool1D": _sequence(layers.GlobalMaxPool1D),
    "LSTM": _sequence(lambda: layers.LSTM(3)),
    "Masking": _sequence(layers.Masking),
    "MaxPool1D": _sequence(lambda: layers.MaxPool1D(2)),
    "RNN": _sequence(lambda: layers.RNN(layers.LSTMCell(3))),
    "SeparableConv1D": _sequence(lambda: layers.SeparableConv1D(3, 2)),
    "SimpleRNN": _sequence(lambda: layers.SimpleRNN(3)),
    "SpatialDropout1D": _on((6, 4), lambda: layers.SpatialDropout1D(0.3, seed=1)),
    "TimeDistributed": _on((6, 4), lambda: layers.TimeDistributed(layers.Dense(3))),
    "UpSampling1D": _sequence(lambda: layers.UpSampling1D(2)),
    "ZeroPadding1D": _sequence(lambda: layers.ZeroPadding1D(2)),
    "GRUCell": _cell(lambda: layers.GRUCell(3), 1),
    "LSTMCell": _cell(lambda: layers.LSTMCell(3), 2),
    "SimpleRNNCell": _cell(lambda: layers.SimpleRNNCell(3), 1),
    "StackedRNNCells": Case(_stacked_cells, lambda rng: [_normal(4)(rng), _normal(3)(rng), _normal(2)(rng)]),
    # Of images and volumes.
    "AdaptiveAveragePooling2D": _on((6, 6, 2), lambda: layers.AdaptiveAveragePooling2D(3)),
    "AdaptiveMaxPooling2D": _on((6, 6, 2), lambda: layers.AdaptiveMaxPooling2D(3)),
    "AveragePooling2D": _on((6, 6, 2), lambda: layers.AveragePooling2D(2)),
    "Conv2D": _case(lambda: layers.Conv2D(3, 3), (None, None, 2), _normal(6, 7, 2)),
    "Conv2DTranspose": _on((4, 4, 2), lambda: layers.Conv2DTranspose(3, 3, strides=2)),
    "ConvLSTM1D": _on((3, 6, 2), lambda: layers.ConvLSTM1D(2, 3)),
    "ConvLSTM2D": _on((3, 5, 5, 2), lambda: layers.ConvLSTM2D(2, 3)),
    "ConvLSTM3D": _on((2, 4, 4, 4, 1), lambda: layers.ConvLSTM3D(2, 2)),
    "Cropping2D": _on((6, 6, 2), lambda: layers.Cropping2D(1)),
    "DepthwiseConv2D": _on((6, 6, 2), lambda: layers.DepthwiseConv2D(3)),
    "GlobalAveragePooling2D": _on((6, 6, 2), layers.GlobalAveragePooling2D),
    "GlobalMaxPool2D": _on((6, 6, 2), layers.GlobalMaxPool2D),
    "MaxPool2D": _on((6, 6, 2), lambda: layers.MaxPool2D(2)),
    "SeparableConv2D": _on((6, 6, 2), lambda: layers.SeparableConv2D(3, 3)),
    "SpatialDropout2D": _on((6, 6, 2), lambda: layers.SpatialDropout2D(0.3, seed=1)),
    "UpSampling2D": _on((3, 3, 2), lambda: layers.UpSampling2D(2, interpolation="bilinear")),
    "ZeroPadding2D": _on((3, 3, 2), lambda: layers.ZeroPadding2D(1)),
    "AdaptiveAveragePooling3D": _on((4, 4, 4, 2), lambda: layers.AdaptiveAveragePooling3D(2)),
    "AdaptiveMaxPooling3D": _on((4, 4, 4, 2), lambda: layers.AdaptiveMaxPooling3D(2)),
    "AveragePooling3D": _on((4, 4, 4, 2), lambda: layers.AveragePooling3D(2)),
    "Conv3D": _on((4, 4, 4, 2), lambda: layers.Conv3D(3, 2)),
    "Conv3DTranspose": _on((3, 3, 3, 2), lambda: layers.Conv3DTranspose(3, 2)),
    "Cropping3D": _on((4, 4, 4, 2), lambda: layers.Cropping3D(1)),
    "GlobalAveragePooling3D": _on((4, 4, 4, 2), layers.GlobalAveragePooling3D),
    "GlobalMaxPool3D": _on((4, 4, 4, 2), layers.GlobalMaxPool3D),
    "MaxPool3D": _on((4, 4, 4, 2), lambda: layers.MaxPool3D(2)),
    "SpatialDropout3D": _on((3, 3, 3, 2), lambda: layers.SpatialDropout3D(0.3, seed=1)),
    "UpSampling3D": _on((2, 2, 2, 2), lambda: layers.UpSampling3D(2)),
    "ZeroPadding3D": _on((2, 2, 2, 2), lambda: layers.ZeroPadding3D(1)),
    **{name: _on((8, 8, 3), layer, _image) for name, layer in _AUGMENTATIONS.items()},
    # Of sound.
    "MelSpectrogram": _on((256,), lambda: layers.MelSpectrogram(fft_length=64, num_mel_bins=8, sampling_rate=1000)),
    "STFTSpectrogram": _on((64, 2), lambda: layers.STFTSpectrogram(frame_length=16, frame_step=8, fft_length=16)),
    # Of categories and words.
    "CategoryEncoding": _case(lambda: layers.CategoryEncoding(5, "multi_hot"), (4,), _integers(5, 4), "int64"),
    "Discretization": _on((4,), lambda: layers.Discretization([-1.0, 0.0, 1.0])),
    "Embedding": _case(lambda: layers.Embedding(7, 3), (None,), _integers(7, 5), "int64"),
    "ReversibleEmbedding": _case(lambda: layers.ReversibleEmbedding(7, 3), (None,), _integers(7, 5), "int64"),
    "HashedCrossing": Case(
        lambda: keras.Model(
            given := [keras.Input((1,), dtype="string"), keras.Input((1,), dtype="string")],
            layers.HashedCrossing(8)(given),
        ),
        lambda rng: [_words(1)(rng), _words(1)(rng)],
    ),
    "Hashing": _case(lambda: layers.Hashing(8), (4,), _words(4), "string"),
    "IntegerLookup": _case(lambda: layers.IntegerLookup(vocabulary=[10, 20, 30]), (4,), _integers(40, 4), "int64"),
    "StringLookup": _case(lambda: layers.StringLookup(vocabulary=["a", "b"]), (4,), _words(4), "string"),
    "TextVectorization": _case(
        lambda: layers.TextVectorization(vocabulary=["a", "b", "d"], output_sequence_length=4),
        (1,),
        _words(1),
        "string",
    ),
}

NOT_SERVED: dict[str, str] = {
    "CutMix": "mixes images and labels of a training set, and takes a dict with both",
    "Equalization": "Keras cannot read a file with it: its symbolic result is its own input",
    "FlaxLayer": "needs JAX and Flax",
    "InputLayer": "every model has one: it computes nothing",
    "JaxLayer": "needs JAX",
    "Lambda": "holds Python code in the file, which Keras's safe mode refuses to read",
    "Layer": "the base class",
    "MaxNumBoundingBoxes": "pads the boxes of a training set, and takes a dict with boxes and labels",
    "MixUp": "mixes images and labels of a training set, and takes a dict with both",
    "TFSMLayer": "captures the variables of another SavedModel, which no caller could give as weights",
    "TorchModuleWrapper": "needs PyTorch",
    "Wrapper": "the base class of layers that wrap another",
}


UNSEEDED: dict[str, str] = {
    "AugMix": "two calls of local Keras in training differ: it draws numbers without its seed",
}
"""Layers whose numbers in training are not those of another call."""

TRACED_OTHERWISE: dict[str, str] = {
    "RandomElasticTransform": "Keras traces it for one image, and repeats the result for each image of a batch",
}
"""Layers whose graph in training gives other numbers than a direct call. The server loads them with a warning."""


def public_layers() -> set[str]:
    """The name of each public layer class; one name where a class has several."""
    by_class: dict[Any, str] = {}
    for name in sorted(dir(layers)):
        found = getattr(layers, name)
        if inspect.isclass(found) and issubclass(found, layers.Layer):
            by_class.setdefault(found, name)
    return set(by_class.values())
