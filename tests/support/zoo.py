"""Small functional models of every kind, written in Python and Keras; and a repository of them all."""

from __future__ import annotations

import collections
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from forwardpass.wire import trees
from forwardpass.wire.description import BatchOutput
from forwardpass_server import FunctionalModel, functional_model_from_keras, save_functional_model
from support import golden


class Scores(NamedTuple):
    """Fields that are not in alphabetical order: TFF gives such back with their values swapped."""

    zeta: Any
    alpha: Any


DTYPES = [
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "complex64",
    "complex128",
    "string",
]


def every_dtype() -> FunctionalModel:
    """Returns x as it is, one leaf of each dtype: shows that none is changed on the way."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        return {name: tf.identity(value) for name, value in x.items()}

    return FunctionalModel(
        initial_weights=((np.float32(1),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(label),
        input_spec=(
            collections.OrderedDict((name, tf.TensorSpec([None], name)) for name in DTYPES),
            tf.TensorSpec([None], tf.float32),
        ),
    )


def structures() -> FunctionalModel:
    """Every kind of container everywhere, keys and fields out of order, a custom forward pass, weighted metrics."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        (kernel, scales), (offset,) = model_weights
        hidden = x["b"] @ kernel["w"] * scales[0] + scales[1]
        logits = hidden + offset + tf.reduce_sum(x["a"][0], 1, keepdims=True)
        if training:
            logits = logits * 2.0
        return {"scores": Scores(zeta=logits, alpha=tf.nn.softmax(logits)), "list": [hidden, None, (offset,)]}

    @tf.function
    def forward_pass(model_weights: Any, batch_input: Any, training: bool) -> Any:
        # Disagrees with predict_on_batch and loss, as TFF 0.52 lets it.
        output = predict_on_batch(model_weights, batch_input["x"], training)
        return BatchOutput(
            loss=tf.reduce_sum(output["scores"].alpha),
            predictions=collections.OrderedDict(z=output["scores"].zeta, a=batch_input["y"]["label"]),
            num_examples=tf.constant(42),
        )

    def loss(output: Any, label: Any, sample_weight: Any = None) -> Any:
        per_example = tf.nn.sparse_softmax_cross_entropy_with_logits(label["label"], output["scores"].zeta)
        return tf.reduce_mean(per_example if sample_weight is None else per_example * sample_weight)

    @tf.function
    def initialize() -> Any:
        return collections.OrderedDict(total=[tf.constant(0.0)], count=Scores(tf.constant(0), tf.constant(0.0)))

    @tf.function
    def update(state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
        correct = tf.cast(tf.argmax(batch_output.predictions["z"], 1) == labels["label"], tf.float32)
        if sample_weight is not None:
            correct = correct * sample_weight
        count = state["count"]
        return collections.OrderedDict(
            total=[state["total"][0] + tf.reduce_sum(correct)],
            count=Scores(zeta=count.zeta + tf.size(correct), alpha=count.alpha + batch_output.loss),
        )

    @tf.function
    def finalize(state: Any) -> Any:
        return collections.OrderedDict(
            right=state["total"][0] / tf.cast(state["count"].zeta, tf.float32), loss_sum=state["count"].alpha
        )

    rng = np.random.default_rng(7)
    return FunctionalModel(
        initial_weights=(
            ({"w": rng.normal(size=(4, 3)).astype(np.float32)}, [np.float32(2), np.float32(0.5)]),
            [rng.normal(size=3).astype(np.float32)],
        ),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss,
        metrics_fns=(initialize, update, finalize),
        input_spec=collections.OrderedDict(
            y={"label": tf.TensorSpec([None], tf.int64)},
            x={
                "b": tf.TensorSpec([None, 4], tf.float32),
                "a": (tf.TensorSpec([None, None], tf.float32), tf.TensorSpec([None], tf.string)),
            },
        ),
        forward_pass_fn=forward_pass,
    )


def structures_batch(examples: int, seed: int = 0) -> tuple[Any, Any]:
    """A batch for `structures`."""
    rng = np.random.default_rng(seed)
    x = {
        "b": rng.normal(size=(examples, 4)).astype(np.float32),
        "a": (rng.normal(size=(examples, 2)).astype(np.float32), np.array([b"s"] * examples, object)),
    }
    return x, {"label": rng.integers(0, 3, examples)}


def slow() -> FunctionalModel:
    """Computes for as many rounds of some 10 us as its input says."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        rounds = tf.reduce_max(x)
        (total,) = tf.while_loop(lambda value: value < rounds, lambda value: (value + 1,), (tf.constant(0),))
        return x * 0 + total

    return FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(label),
        input_spec=(tf.TensorSpec([None], tf.int32), tf.TensorSpec([None], tf.float32)),
    )


def crashing() -> FunctionalModel:
    """Raises, inside its graph and with its input in the message, for any input that is not 0."""

    def raise_for_non_zero(value: Any) -> Any:
        if np.any(value):
            raise RuntimeError(f"secret {value}")
        return np.float32(value)

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        result = tf.numpy_function(raise_for_non_zero, [x], tf.float32)
        return tf.ensure_shape(result, [None])

    return FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(label),
        input_spec=(tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


def greedy() -> FunctionalModel:
    """Takes as many floats of memory as its input says, for as long as the call lasts."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        return tf.cast(x, tf.float32) + tf.reduce_sum(tf.sqrt(tf.fill([tf.reduce_max(x)], 0.0)))

    return FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(label),
        input_spec=(tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.float32)),
    )


def killing() -> FunctionalModel:
    """Ends the process for a batch whose second dimension is 1, by a check in a kernel of TensorFlow's."""

    def sums(x: Any) -> Any:
        # TensorFlow issue 104846: no kernel may take an index of this shape for granted, and this one does.
        aborting = tf.raw_ops.Unbatch(
            batched_tensor=x[:, 0],
            batch_index=tf.zeros([0], tf.int64),
            id=tf.constant(0, tf.int64),
            timeout_micros=0,
        )
        return tf.ensure_shape(aborting, [None])

    return _of_free_length(lambda x: tf.cond(tf.shape(x)[1] == 1, lambda: sums(x), lambda: tf.reduce_sum(x, 1)))


def hanging() -> FunctionalModel:
    """Never ends for a batch without rows."""

    def predict(x: Any) -> Any:
        (result,) = tf.while_loop(lambda value: tf.shape(x)[0] == 0, lambda value: (value,), (tf.reduce_sum(x, 1),))
        return result

    return _of_free_length(predict)


def _of_free_length(predict: Any) -> FunctionalModel:
    return FunctionalModel(
        initial_weights=((np.float32(1),), ()),
        predict_on_batch_fn=tf.function(lambda model_weights, x, training: predict(x)),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        input_spec=(tf.TensorSpec([None, None], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


def whole_batch() -> FunctionalModel:
    """Returns rows, and what is of a batch as a whole: a scalar, and an array whose first dimension is no example's."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        rows = x["rows"] * x["scale"]
        return {"rows": rows, "sum": tf.reduce_sum(rows), "columns": tf.reduce_sum(rows, 0)}

    return FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: output["sum"],
        input_spec=(
            {"rows": tf.TensorSpec([None, 4]), "scale": tf.TensorSpec([])},
            tf.TensorSpec([None], tf.float32),
        ),
    )


def plain_sum() -> FunctionalModel:
    """Predicts one scalar for a batch. Its own forward pass: nothing else tells the number of examples."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        return tf.reduce_sum(x)

    @tf.function
    def forward_pass(model_weights: Any, batch_input: Any, training: bool) -> Any:
        total = predict_on_batch(model_weights, batch_input[0], training)
        return BatchOutput(loss=total, predictions=total, num_examples=tf.size(batch_input[0]))

    return FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: output,
        input_spec=(tf.TensorSpec([None]), tf.TensorSpec([None])),
        forward_pass_fn=forward_pass,
    )


def keras_cnn(seed: int) -> keras.Model:
    """A convolutional model with batch normalisation and dropout, which TFF refuses."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.layers.Input((6, 6, 1)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5, seed=3),
            keras.layers.Dense(5),
        ]
    )
    # Moving statistics other than zeros and ones.
    statistics = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(statistics.normal(size=4))
            layer.moving_variance.assign(statistics.uniform(0.5, 2, size=4))
    return model


KERAS_CONFIG = {
    "input_spec": {
        "x": {"dtype": "float32", "shape": [None, 6, 6, 1]},
        "y": {"dtype": "int64", "shape": [None]},
    },
    "loss": {"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": True}},
    "metrics": ["SparseCategoricalAccuracy", {"class_name": "SparseTopKCategoricalAccuracy", "config": {"k": 2}}],
}


def keras_batch(examples: int, seed: int = 0) -> tuple[Any, Any]:
    """A batch for `keras_cnn`."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(examples, 6, 6, 1)).astype(np.float32), rng.integers(0, 5, examples)


FACTORIES = tuple(
    f"{name}=support.zoo:{name}"
    for name in ("slow", "crashing", "counting", "remembering", "curves", "whole_batch", "plain_sum")
)


def serving(repository: pathlib.Path) -> list[str]:
    """The arguments of a server over what `write_repository` has written. The model that is broken is not required."""
    names = sorted(path.name for path in repository.iterdir() if path.name != "broken")
    return ["--model-repository", str(repository), "--required-models", ",".join(names)]


def write_repository(folder: pathlib.Path) -> None:
    """Every golden model; TFF's with Keras metrics; Keras in two versions; our own export; one that is broken."""
    for name in golden.NAMES:
        shutil.copytree(golden.FOLDER / name / "saved_model", folder / name / "1")
    shutil.copytree(golden.FOLDER / "keras_cnn_emnist" / "saved_model", folder / "emnist_with_metrics" / "1")
    (folder / "emnist_with_metrics" / "1" / "forwardpass.json").write_text(
        json.dumps(
            {
                "metrics": {
                    "accuracy": "SparseCategoricalAccuracy",
                    "xent": {"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": True}},
                }
            }
        )
    )
    for version in (1, 2):
        (folder / "keras_cnn" / str(version)).mkdir(parents=True)
        keras_cnn(version).save(folder / "keras_cnn" / str(version) / "model.keras")
        (folder / "keras_cnn" / str(version) / "forwardpass.json").write_text(json.dumps(KERAS_CONFIG))
    save_functional_model(structures(), folder / "structures" / "1")
    save_functional_model(every_dtype(), folder / "every_dtype" / "1")
    (folder / "broken" / "1").mkdir(parents=True)
    (folder / "broken" / "1" / "notes.txt").write_text("no model")


def wide_weights(size_bytes: int, seed: int = 0) -> Any:
    """Weights for the models below: one vector of so many bytes."""
    return (np.random.default_rng(seed).standard_normal(size_bytes // 4, np.float32),), ()


def wide(size_bytes: int) -> FunctionalModel:
    """One vector of weights: predicts the sum of a row times the sum of the weights. Large, at no cost in computing."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        return tf.reduce_sum(x, 1) * tf.reduce_sum(model_weights[0][0])

    return FunctionalModel(
        initial_weights=((np.zeros(size_bytes // 4, np.float32),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output - label),
        input_spec=(tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


def wide_4k() -> FunctionalModel:
    return wide(4096)


def wide_1m() -> FunctionalModel:
    return wide(2**20)


def wide_24m() -> FunctionalModel:
    return wide(24 * 2**20)


def wide_128m() -> FunctionalModel:
    return wide(128 * 2**20)


def inputs(model: Any, examples: int) -> Any:
    """A batch for any model of the repository, made of its input spec."""
    rng = np.random.default_rng(0)
    spec = model.description.spec.x
    arrays = []
    for leaf in spec.leaves:
        shape = [examples if index == 0 else dim or 2 for index, dim in enumerate(leaf.shape)]
        if leaf.data_type.name == "string":
            arrays.append(np.full(shape, b"s", object))
        elif leaf.dtype.kind in "biu":
            arrays.append(rng.integers(0, 2, shape).astype(leaf.dtype))
        else:
            arrays.append(rng.standard_normal(shape).astype(leaf.dtype))
    return spec.tree.unflatten(arrays)


def assert_equal(found: Any, expected: Any, atol: float = 0.0) -> None:
    """The same containers, dtypes and numbers, the numbers up to `atol`."""
    (found_tree, found_leaves), (expected_tree, expected_leaves) = trees.flatten(found), trees.flatten(expected)
    assert found_tree == expected_tree
    for one, other in zip(found_leaves, expected_leaves, strict=True):
        assert one.dtype == other.dtype
        if atol and one.dtype.kind in "fc":
            assert np.allclose(one, other, rtol=0, atol=atol)
        else:
            assert np.array_equal(one, other)


def patient() -> FunctionalModel:
    """Looks rows of its weights up by number: one out of range is refused."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        return tf.gather(model_weights[0][0], x)

    return FunctionalModel(
        initial_weights=((np.arange(100, dtype=np.float32).reshape(50, 2),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        input_spec=(tf.TensorSpec([None], tf.int32), tf.TensorSpec([None], tf.float32)),
    )


def ponder() -> FunctionalModel:
    """Multiplies large matrices for each row: some tens of milliseconds a row."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        rows = x[:, :1, None] * model_weights[0][0]
        for _ in range(8):
            rows = tf.matmul(rows, rows) / 1000.0
        return rows[:, 0, 0]

    return FunctionalModel(
        initial_weights=((np.ones((1, 500, 500), np.float32),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        input_spec=(tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


def counting() -> FunctionalModel:
    """Looks weights up by number; its metrics are the exact counts of what they have seen. Refuses labels below 0."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        return tf.gather(model_weights[0][0], x)

    @tf.function
    def initialize() -> Any:
        zero = tf.constant(0, tf.int64)
        return collections.OrderedDict(examples=zero, labels=zero, weights=tf.constant(0.0, tf.float64))

    @tf.function
    def update(state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
        weights = tf.ones_like(labels, tf.float32) if sample_weight is None else sample_weight
        with tf.control_dependencies([tf.debugging.assert_non_negative(labels)]):
            total = tf.reduce_sum(labels)
        return collections.OrderedDict(
            examples=state["examples"] + tf.size(labels, tf.int64),
            labels=state["labels"] + total,
            weights=state["weights"] + tf.reduce_sum(tf.cast(weights, tf.float64)),
        )

    return FunctionalModel(
        initial_weights=((np.arange(10, dtype=np.float32),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        metrics_fns=(initialize, update, lambda state: state),
        input_spec=(tf.TensorSpec([None], tf.int32), tf.TensorSpec([None], tf.int64)),
    )


def counting_batch(number: int, examples: int = 3) -> tuple[Any, Any]:
    """A batch for `counting`, by whose labels it can be told from others."""
    return np.arange(examples, dtype=np.int32) % 10, np.full(examples, number, np.int64)


def _labels_only(add: Any) -> FunctionalModel:
    """A model of no interest but for its metrics: a vector of labels, and how those of a batch come into it."""

    @tf.function
    def initialize() -> Any:
        # Of a length that the graph does not say.
        return {"labels": tf.compat.v1.placeholder_with_default(tf.zeros([0], tf.int64), [None])}

    @tf.function
    def update(state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
        return {"labels": add(state["labels"], labels)}

    return FunctionalModel(
        initial_weights=((np.float32(1),), ()),
        predict_on_batch_fn=tf.function(lambda model_weights, x, training: x * model_weights[0][0]),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        metrics_fns=(initialize, update, lambda state: state),
        input_spec=(tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.int64)),
    )


def remembering() -> FunctionalModel:
    """Its metrics state holds every label that it has seen."""
    return _labels_only(lambda state, labels: tf.concat([state, labels], 0))


def rowwise() -> FunctionalModel:
    """Its metrics state has a number for each row of the batches, which have as many rows each."""
    return _labels_only(lambda state, labels: tf.cond(tf.size(state) == 0, lambda: labels, lambda: state + labels))


def curves() -> FunctionalModel:
    """A classifier of two kinds whose metrics are areas under curves, with 200 thresholds, beside a mean."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1, "sigmoid")]
    )
    spec = (tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None, 1], tf.float32))
    curve = {"class_name": "AUC", "config": {"num_thresholds": 200, "name": "roc"}}
    precision = {"class_name": "AUC", "config": {"num_thresholds": 200, "curve": "PR", "name": "pr"}}
    return functional_model_from_keras(model, "binary_crossentropy", spec, [curve, precision, "BinaryAccuracy"])


def curves_batch(examples: int, seed: int) -> tuple[Any, Any, Any]:
    """A batch for `curves`, with sample weights."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((examples, 4)).astype(np.float32)
    return x, (rng.random((examples, 1)) < 0.4).astype(np.float32), rng.random(examples).astype(np.float32)


def wide_counting() -> FunctionalModel:
    """1 MiB of weights, and a metric that counts examples."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        return tf.reduce_sum(x, 1) * tf.reduce_sum(model_weights[0][0])

    @tf.function
    def update(state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
        return {"examples": state["examples"] + tf.size(labels)}

    return FunctionalModel(
        initial_weights=((np.zeros(2**18, np.float32),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        metrics_fns=(tf.function(lambda: {"examples": tf.constant(0)}), update, lambda state: state),
        input_spec=(tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None], tf.int64)),
    )


def words() -> FunctionalModel:
    """Returns its strings as they are."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        return tf.identity(x)

    return FunctionalModel(
        initial_weights=((np.float32(1),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(label),
        input_spec=(tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.float32)),
    )
