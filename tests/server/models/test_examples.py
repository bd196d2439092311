"""Example batches: of sizes that a model accepts, or those that its operator gave."""

from __future__ import annotations

import json
import logging

import keras
import numpy as np
import pytest

from forwardpass.wire.description import Function
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models.loading import TensorFlowLoader

layers = keras.layers


@pytest.fixture(scope="module")
def loader():
    return TensorFlowLoader("cpu")


def spec(dtype, *shape):
    return {"dtype": dtype, "shape": list(shape)}


def sequential(shape, *stack, dtype="float32"):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *stack])


def u_net():
    image = keras.Input((None, None, 3))
    down = layers.Conv2D(4, 3, padding="same", activation="relu")(image)
    deep = layers.Conv2D(8, 3, padding="same")(layers.MaxPooling2D(2)(layers.MaxPooling2D(2)(down)))
    up = layers.Conv2DTranspose(4, 2, strides=2)(layers.Conv2DTranspose(4, 2, strides=2)(deep))
    return keras.Model(image, layers.Conv2D(1, 1)(layers.Concatenate()([down, up])))


MODELS = {
    # Models that no input of size 1 fits: (model, spec of x, spec of y, a batch's shape).
    "U-Net": (u_net, spec("float32", None, None, None, 3), spec("float32", None, None, None, 1), (2, 16, 24, 3)),
    "valid convolution": (
        lambda: sequential((None, 5), layers.Conv1D(4, 5), layers.GlobalMaxPooling1D(), layers.Dense(2)),
        spec("float32", None, None, 5),
        spec("float32", None, 2),
        (2, 9, 5),
    ),
    "valid convolution without pooling": (
        lambda: sequential((None, 5), layers.Conv1D(4, 5)),
        spec("float32", None, None, 5),
        spec("float32", None, None, 4),
        (2, 9, 5),
    ),
    "pooling network": (
        lambda: sequential(
            (None, None, 1),
            *[layer for _ in range(5) for layer in (layers.Conv2D(2, 3), layers.MaxPooling2D())],
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ),
        spec("float32", None, None, None, 1),
        spec("float32", None, 2),
        (2, 100, 97, 1),
    ),
    "reshape of a free length": (
        lambda: sequential((None,), layers.Reshape((-1, 8)), layers.Dense(2)),
        spec("float32", None, None),
        spec("float32", None, None, 2),
        (3, 24),
    ),
    # Models whose probe for batching made rows of different lengths.
    "bag of words": (
        lambda: sequential(
            (None,), layers.Embedding(20, 8), layers.GlobalAveragePooling1D(), layers.Dense(3), dtype="int64"
        ),
        spec("int64", None, None),
        spec("float32", None, 3),
        (4, 11),
    ),
}


def put(folder, model, x, y, **more):
    model.save(folder / "model.keras")
    config = {"input_spec": {"x": x, "y": y}, "loss": "mse", **more}
    (folder / "forwardpass.json").write_text(json.dumps(config))
    return ModelSource("m", 1, folder=folder)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_free_dimensions_is_loaded_warmed_and_right(name, loader, tmp_path, caplog):
    make, x_spec, y_spec, shape = MODELS[name]
    keras.utils.set_random_seed(1)
    model = make()
    with caplog.at_level(logging.WARNING):
        loaded = loader.load(put(tmp_path, model, x_spec, y_spec, metrics=["MeanAbsoluteError"]))
    # TensorFlow warns of what other tests of this process have left.
    assert [record.getMessage() for record in caplog.records if record.name.startswith("forwardpass")] == []
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype("float32") if x_spec["dtype"] == "float32" else rng.integers(0, 20, shape)
    (found,) = loaded.run(Function.PREDICT_ON_BATCH, False, [*loaded.initial_weights, x])
    # Float32 sums in another order: the last bits.
    np.testing.assert_allclose(found, model(x), rtol=1e-5, atol=1e-6)


def test_a_bag_of_words_model_is_batched(loader, tmp_path):
    make, x_spec, y_spec, _ = MODELS["bag of words"]
    reason = loader.load(put(tmp_path, make(), x_spec, y_spec)).description.unbatchable_reason
    assert "refused" not in reason
    assert "cannot be analysed" not in reason


def lookup_model():
    words = keras.Input((), dtype="string")
    ids = layers.StringLookup(vocabulary=["red", "green"], num_oov_indices=0)(words)
    return keras.Model(words, layers.Dense(2)(layers.Embedding(2, 3)(ids)))


def test_a_lookup_without_a_word_for_unknown_words_is_loaded_and_its_warning_says_how_to_warm_it(
    loader, tmp_path, caplog
):
    source = put(tmp_path, lookup_model(), spec("string", None), spec("float32", None, 2))
    with caplog.at_level(logging.WARNING):
        loaded = loader.load(source)
    assert '"example_input" in forwardpass.json names a batch that it accepts' in caplog.text
    words = np.array([b"red", b"green"], object)
    (found,) = loaded.run(Function.PREDICT_ON_BATCH, False, [*loaded.initial_weights, words])
    assert found.shape == (2, 2)


def test_a_model_is_warmed_and_probed_on_the_examples_of_its_operator(loader, tmp_path, caplog):
    np.savez(tmp_path / "words.npz", x=np.array(["red", "green", "red"]))
    source = put(tmp_path, lookup_model(), spec("string", None), spec("float32", None, 2), example_input="words.npz")
    with caplog.at_level(logging.WARNING):
        loaded = loader.load(source)
    assert "was not warmed" not in caplog.text
    assert "refused" not in loaded.description.unbatchable_reason


@pytest.mark.parametrize(
    "arrays, message",
    [
        (None, "example_input: the folder has no file 'words.npz'"),
        ({"z": np.array(["red"])}, r"words.npz: expected arrays \['x'\], found \['z'\]"),
        ({"x": np.zeros((2, 2), np.float32)}, r"words.npz: x: expected string\[None\]"),
        ({"x": np.array([], np.bytes_)}, "words.npz: x: expected a batch of at least one example"),
    ],
)
def test_examples_that_do_not_fit_are_refused_by_name(arrays, message, loader, tmp_path):
    if arrays is not None:
        np.savez(tmp_path / "words.npz", **arrays)
    source = put(tmp_path, lookup_model(), spec("string", None), spec("float32", None, 2), example_input="words.npz")
    with pytest.raises(ModelLoadError, match=message):
        loader.load(source)
