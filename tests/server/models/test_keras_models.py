"""Keras 3 models as functional models, against Keras itself."""

from __future__ import annotations

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire.description import BatchOutput
from forwardpass_server import FunctionalModel, functional_model_from_keras
from forwardpass_server.models import tracing
from support import zoo

SPEC = (tf.TensorSpec([None, 6, 6, 1], tf.float32), tf.TensorSpec([None], tf.int64))
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def functional(model: keras.Model, **changes) -> FunctionalModel:
    arguments = {"loss_fn": LOSS, "input_spec": SPEC, "metrics_constructor": None, **changes}
    return functional_model_from_keras(model, **arguments)


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisation_and_dropout_give_what_keras_gives(training):
    model = zoo.keras_cnn(1)
    x, y = zoo.keras_batch(7)
    made = functional(model)
    weights = made.initial_weights
    # Before Keras's own call, which moves its statistics and seeds.
    found = made.forward_pass(weights, (x, y), training)
    predictions = model(x, training=training)
    assert np.array_equal(found.predictions, predictions)
    assert np.array_equal(found.loss, LOSS(y, predictions))
    assert int(found.num_examples) == 7
    assert np.array_equal(made.predict_on_batch(weights, x, training), predictions)


def test_a_call_changes_neither_statistics_nor_seeds():
    model = zoo.keras_cnn(1)
    before = [np.array(variable) for variable in model.variables]
    made = functional(model)
    x, _ = zoo.keras_batch(7)
    first, second = (made.predict_on_batch(made.initial_weights, x, True) for _ in range(2))
    assert np.array_equal(first, second)
    assert all(np.array_equal(old, new) for old, new in zip(before, model.variables, strict=True))


def test_another_seed_in_the_weights_gives_another_mask():
    made = functional(zoo.keras_cnn(1))
    trainable, non_trainable = made.initial_weights
    (seed,) = [index for index, weight in enumerate(non_trainable) if weight.dtype == np.int64]
    other = tuple(weight + (index == seed) for index, weight in enumerate(non_trainable))
    x, _ = zoo.keras_batch(7)
    first, second = (made.predict_on_batch((trainable, states), x, True) for states in (non_trainable, other))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("dtype", ["float64", "mixed_float16"])
def test_losses_of_layers_of_another_precision_are_added(dtype):
    regularizer = keras.regularizers.L2(0.1)
    layer = keras.layers.Dense(5, dtype=dtype, kernel_regularizer=regularizer, activity_regularizer=regularizer)
    model = keras.Sequential([keras.layers.Input((6, 6, 1)), keras.layers.Flatten(), layer])
    made = functional(model)
    x, y = zoo.keras_batch(7)
    found = made.forward_pass(made.initial_weights, (x, y), False)
    plain = made.loss(found.predictions, y)
    assert found.loss.dtype == plain.dtype
    activity = 0.1 * np.square(np.float64(found.predictions)).sum() / 7
    kernel = 0.1 * np.square(np.float64(layer.kernel)).sum()
    # Half precision keeps three digits.
    assert np.allclose(np.float64(found.loss), np.float64(plain) + kernel + activity, rtol=5e-3)


def dict_model() -> keras.Model:
    """Inputs and outputs by name, in no alphabetical order."""
    keras.utils.set_random_seed(5)
    wide = keras.Input((3,), name="wide")
    category = keras.Input((), dtype="int32", name="category")
    embedded = keras.layers.Embedding(4, 2)(category)
    joined = keras.layers.Concatenate()([wide, embedded])
    return keras.Model(
        {"wide": wide, "category": category},
        {"y2": keras.layers.Dense(2, name="y2")(joined), "y1": keras.layers.Dense(1, name="y1")(joined)},
    )


def test_inputs_and_outputs_by_name_keep_their_names():
    model = dict_model()
    spec = (
        {"wide": tf.TensorSpec([None, 3], tf.float32), "category": tf.TensorSpec([None], tf.int32)},
        {"y1": tf.TensorSpec([None, 1], tf.float32), "y2": tf.TensorSpec([None, 2], tf.float32)},
    )

    def loss(y_true, y_pred):
        return tf.reduce_mean((y_true["y1"] - y_pred["y1"]) ** 2) + tf.reduce_mean((y_true["y2"] - y_pred["y2"]) ** 2)

    made = functional_model_from_keras(model, _CallableLoss(loss), spec)
    traced = tracing.trace(made)
    rng = np.random.default_rng(0)
    x = {"wide": rng.normal(size=(4, 3)).astype(np.float32), "category": np.int32([3, 1, 0, 2])}
    y = {"y1": np.ones((4, 1), np.float32), "y2": np.ones((4, 2), np.float32)}
    expected = model(x)
    found = made.forward_pass(made.initial_weights, (x, y), False)
    assert {name: np.array_equal(found.predictions[name], expected[name]) for name in expected} == {
        "y2": True,
        "y1": True,
    }
    # A graph sums in another order: float32's last bit.
    assert float(found.loss) == pytest.approx(float(loss(y, expected)), rel=1e-6)
    assert traced.spec.x.tree.names == ("wide", "category")


class _CallableLoss(keras.losses.Loss):
    """A loss over several outputs: Keras's own class would convert them to one tensor."""

    def __init__(self, function):
        super().__init__()
        self._function = function

    def __call__(self, y_true, y_pred, sample_weight=None):
        return self._function(y_true, y_pred)


def test_regularisation_counts_only_in_the_forward_pass():
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1), activity_regularizer="l1"),
        ]
    )
    spec = (tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None], tf.int64))
    made = functional(model, input_spec=spec)
    x, y = np.ones((2, 4), np.float32), np.int64([0, 1])
    found = made.forward_pass(made.initial_weights, (x, y), True)
    predictions = model(x, training=True)
    plain = made.loss(predictions, y)
    assert float(found.loss) == pytest.approx(float(plain + sum(model.losses)), rel=1e-6)
    assert float(found.loss) > float(plain)
    assert made.has_own_forward_pass


def test_a_model_that_is_not_built_yet_is_built_from_the_input_spec():
    model = keras.Sequential([keras.layers.Dense(3)])
    spec = (tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None], tf.int64))
    assert [weight.shape for weight in functional(model, input_spec=spec).initial_weights[0]] == [(4, 3), (3,)]


def test_a_callable_that_returns_a_keras_model_is_accepted():
    made = functional(lambda: zoo.keras_cnn(1))
    assert len(made.initial_weights[0]) == 6


@pytest.mark.parametrize(
    "layer", [keras.layers.LSTM(3), keras.layers.GRU(3), keras.layers.Bidirectional(keras.layers.SimpleRNN(2))]
)
def test_recurrent_layers_work(layer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((None, 2)), layer, keras.layers.Dense(3)])
    made = functional(model, input_spec=(tf.TensorSpec([None, None, 2], tf.float32), SPEC[1]))
    x = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    found = made.predict_on_batch(made.initial_weights, x, False)
    # The layer picks another kernel inside a graph than outside of one: float32's last bits.
    assert np.allclose(found, model(x), rtol=0, atol=1e-6)


def test_mixed_precision_keeps_its_dtypes():
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(3, dtype="mixed_bfloat16")
    made = functional(
        keras.Sequential([keras.layers.Input((4,)), dense]), input_spec=(tf.TensorSpec([None, 4], tf.float32), SPEC[1])
    )
    assert tracing.trace(made).spec.predictions.leaves[0].data_type.name == "bfloat16"


METRICS = [
    "SparseCategoricalAccuracy",
    "sparse_categorical_crossentropy",
    {"class_name": "SparseTopKCategoricalAccuracy", "config": {"k": 2, "name": "top2"}},
    keras.metrics.SparseCategoricalAccuracy(name="object"),
    lambda: keras.metrics.SparseCategoricalAccuracy(name="made"),
]


def run_metrics(made: FunctionalModel, model: keras.Model, reference: keras.metrics.Metric, weighted: bool):
    """The metric after two batches, functional and Keras's own."""
    state = made.initialize_metrics_state()
    for seed in (0, 1):
        x, y = zoo.keras_batch(6, seed)
        predictions = model(x)
        weight = np.float32([0, 1, 2, 3, 4, 5]) if weighted else None
        output = BatchOutput(predictions=predictions, loss=0.0, num_examples=6)
        state = made.update_metrics_state(state, y, output, weight)
        reference.update_state(y, predictions, sample_weight=weight)
    return made.finalize_metrics(state), reference.result()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("metric", METRICS, ids=["class", "function", "configuration", "object", "callable"])
def test_metrics_equal_keras_by_name_configuration_object_and_callable(metric, weighted):
    model = zoo.keras_cnn(1)
    reference = keras.metrics.get(
        metric() if callable(metric) and not isinstance(metric, keras.metrics.Metric) else metric
    )
    reference.reset_state()
    found, expected = run_metrics(functional(model, metrics_constructor=[metric]), model, reference, weighted)
    assert {name: np.array_equal(value, expected) for name, value in found.items()} == {reference.name: True}


def binary_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.layers.Input((6, 6, 1)), keras.layers.Flatten(), keras.layers.Dense(1, "sigmoid")])


@pytest.mark.parametrize(
    "metric",
    [
        keras.metrics.AUC(num_thresholds=200),
        keras.metrics.F1Score(threshold=0.5),
        keras.metrics.R2Score(),
        keras.metrics.PrecisionAtRecall(0.5),
    ],
    ids=lambda metric: metric.name,
)
def test_metrics_with_states_of_their_own_shape_equal_keras(metric):
    model = binary_model()
    made = functional(
        model,
        loss_fn="binary_crossentropy",
        input_spec=(SPEC[0], tf.TensorSpec([None, 1], tf.float32)),
        metrics_constructor=lambda: keras.metrics.get(keras.saving.serialize_keras_object(metric)),
    )
    state = made.initialize_metrics_state()
    metric.reset_state()
    for seed in (0, 1):
        x, _ = zoo.keras_batch(9, seed)
        y = np.random.default_rng(seed).integers(0, 2, (9, 1)).astype(np.float32)
        predictions = model(x)
        state = made.update_metrics_state(state, y, BatchOutput(0.0, predictions, 9))
        metric.update_state(y, predictions)
    # A graph may sum in another order than eager Keras: float32's last bits, as a share of terms near 1.
    assert np.allclose(made.finalize_metrics(state), metric.result(), rtol=0, atol=1e-6)


def test_metrics_by_name_are_in_the_order_given():
    metrics = collections.OrderedDict(z="SparseCategoricalAccuracy", a=keras.metrics.SparseCategoricalCrossentropy)
    made = functional(zoo.keras_cnn(1), metrics_constructor=metrics)
    assert list(made.initialize_metrics_state()) == ["z", "a"]
    assert list(made.finalize_metrics(made.initialize_metrics_state())) == ["z", "a"]


def test_a_single_metric_has_its_own_state_as_in_tff():
    made = functional(zoo.keras_cnn(1), metrics_constructor=keras.metrics.SparseCategoricalAccuracy)
    state = made.initialize_metrics_state()
    assert isinstance(state, tuple)
    assert len(state) == 2


@pytest.mark.parametrize(
    "loss, expected",
    [
        ("sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy()),
        ("SparseCategoricalCrossentropy", keras.losses.SparseCategoricalCrossentropy()),
        ({"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": True}}, LOSS),
        (LOSS, LOSS),
        (keras.losses.sparse_categorical_crossentropy, keras.losses.SparseCategoricalCrossentropy()),
    ],
    ids=["name", "class name", "configuration", "object", "function"],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_equal_keras_by_name_configuration_object_and_function(loss, expected, weighted):
    made = functional(zoo.keras_cnn(1), loss_fn=loss)
    rng = np.random.default_rng(0)
    output = np.array(keras.ops.softmax(rng.normal(size=(6, 5)).astype(np.float32)))
    label = rng.integers(0, 5, 6)
    weight = np.float32([0, 1, 2, 3, 4, 5]) if weighted else None
    assert np.array_equal(made.loss(output, label, weight), expected(label, output, sample_weight=weight))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_fn": "nonsense"}, "nonsense"),
        ({"loss_fn": 3}, "3"),
        ({"metrics_constructor": ["nonsense"]}, "nonsense"),
        ({"metrics_constructor": ["MeanSquaredError", "MeanSquaredError"]}, "expected different names"),
        ({"metrics_constructor": [lambda: 3]}, "expected a Keras metric"),
    ],
)
def test_arguments_that_keras_does_not_know_are_refused(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        functional(zoo.keras_cnn(1), **changes)


def test_a_callable_that_returns_no_keras_model_is_refused():
    with pytest.raises(ValueError, match=r"expected a keras\.Model or a callable for one, got int"):
        functional(lambda: 3)
