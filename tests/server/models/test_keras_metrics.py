"""Every metric of Keras, and what Model.compile takes as metrics, against Keras itself."""

from __future__ import annotations

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire.description import BatchOutput, Function
from forwardpass_server import FunctionalModel, functional_model_from_keras
from forwardpass_server.models import tracing
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.keras_losses import InvalidCompileArgument
from support.keras_outputs import CLICK, RNG, STARS, WEIGHT, X_SPEC, X, identity, labels, softmax, spec_of, two_outputs

# Graph and eager Keras may sum in another order, and some metrics subtract nearly equal sums: last bits of float32.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def one_hot() -> np.ndarray:
    return np.eye(4, dtype=np.float32)[RNG.integers(0, 4, 6)]


CATEGORICAL = [(one_hot(), softmax(6, 4)) for _ in range(2)]
CLASS_NUMBERS = [(RNG.integers(0, 4, 6), softmax(6, 4)) for _ in range(2)]
CLASSES = [(RNG.integers(0, 4, 6), RNG.integers(0, 4, 6).astype(np.float32)) for _ in range(2)]
BINARY = [(RNG.integers(0, 2, (6, 1)).astype(np.float32), RNG.random((6, 1), np.float32)) for _ in range(2)]

MADE = {
    # Of integers by default, which would truncate weights, with a warning of Keras.
    "BinaryIoU": ({"dtype": "float32"}, BINARY),
    "IoU": ({"dtype": "float32", "num_classes": 4, "target_class_ids": [0, 2]}, CLASSES),
    "MeanIoU": ({"dtype": "float32", "num_classes": 4}, CLASSES),
    "OneHotIoU": ({"dtype": "float32", "num_classes": 4, "target_class_ids": [0, 2]}, CATEGORICAL),
    "OneHotMeanIoU": ({"dtype": "float32", "num_classes": 4}, CATEGORICAL),
    "SparseCategoricalAccuracy": ({}, CLASS_NUMBERS),
    "SparseCategoricalCrossentropy": ({}, CLASS_NUMBERS),
    "SparseTopKCategoricalAccuracy": ({"k": 2}, CLASS_NUMBERS),
    "sparse_categorical_accuracy": ({}, CLASS_NUMBERS),
    "sparse_categorical_crossentropy": ({}, CLASS_NUMBERS),
    "sparse_top_k_categorical_accuracy": ({}, CLASS_NUMBERS),
    "TopKCategoricalAccuracy": ({"k": 2}, CATEGORICAL),
    "MeanRelativeError": ({"normalizer": [0.5] * 4}, CATEGORICAL),
    "PrecisionAtRecall": ({"recall": 0.5}, BINARY),
    "RecallAtPrecision": ({"precision": 0.5}, BINARY),
    "SensitivityAtSpecificity": ({"specificity": 0.5}, BINARY),
    "SpecificityAtSensitivity": ({"sensitivity": 0.5}, BINARY),
    "TruePositives": ({"thresholds": [0.2, 0.5, 0.8]}, BINARY),
    "TrueNegatives": ({"thresholds": [0.2, 0.5, 0.8]}, BINARY),
    "FalsePositives": ({"thresholds": [0.2, 0.5, 0.8]}, BINARY),
    "FalseNegatives": ({"thresholds": [0.2, 0.5, 0.8]}, BINARY),
    "AUC": ({}, BINARY),
    "Precision": ({}, BINARY),
    "Recall": ({}, BINARY),
    "R2Score": ({"num_regressors": 1}, CATEGORICAL),
    "MeanMetricWrapper": ({"fn": keras.metrics.mean_squared_error}, CATEGORICAL),
}
NOT_OF_LABELS = {
    "Metric": "the base class",
    "Mean": "takes values, not labels and predictions",
    "Sum": "takes values, not labels and predictions",
    "deserialize": "makes metrics",
    "get": "makes metrics",
    "serialize": "writes metrics",
}
NAMES = sorted(name for name, value in vars(keras.metrics).items() if callable(value) and name not in NOT_OF_LABELS)


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_of_keras_equals_kerass_result(name):
    arguments, batches = MADE.get(name, ({}, CATEGORICAL))
    metric = getattr(keras.metrics, name)
    is_class = inspect.isclass(metric)
    given = (lambda: metric(**arguments)) if is_class else metric
    y, predictions = batches[0]
    made = identity(
        predictions.shape[1:], loss_fn="mse", input_spec=(spec_of(predictions), spec_of(y)), metrics_constructor=[given]
    )
    execution = Execution(tracing.trace(made).functions, "/device:CPU:0")
    for update, weight in (
        (Function.UPDATE_METRICS_STATE, []),
        (Function.WEIGHTED_UPDATE_METRICS_STATE, [WEIGHT[:6]]),
    ):
        # compile() makes a metric of a function by this class.
        reference = metric(**arguments) if is_class else keras.metrics.MeanMetricWrapper(metric)
        state = execution.run(Function.INITIALIZE_METRICS_STATE, False, [])
        for y, predictions in batches:
            output = [np.float32(0), predictions, np.int32(6)]
            state = execution.run(update, False, [*state, y, *output, *weight])
            reference.update_state(y, predictions, *weight)
        (found,) = execution.run(Function.FINALIZE_METRICS, False, state)
        assert np.allclose(found, reference.result(), **TOLERANCE), update


def evaluated(made: FunctionalModel, y, weight=None) -> dict[str, np.ndarray]:
    state = made.initialize_metrics_state()
    for part in (slice(0, 8), slice(8, 16)):
        labels_of = tf.nest.map_structure(lambda leaf, part=part: leaf[part], y)
        output = made.forward_pass(made.initial_weights, (X[part], labels_of), training=False)
        state = made.update_metrics_state(state, labels_of, output, None if weight is None else weight[part])
    assert list(made.finalize_metrics(state)) == list(state)
    tracing.trace(made)
    return made.finalize_metrics(state)


COMPILED = [
    (True, {"click": ["AUC", "accuracy"], "stars": ["accuracy"]}, None),
    (True, {"click": "mae", "stars": ["SparseCategoricalAccuracy", "SparseCategoricalCrossentropy"]}, None),
    (True, {"stars": ["acc"]}, {"click": ["AUC"]}),
    (False, [["AUC"], ["accuracy"]], None),
    (False, ["accuracy", "accuracy"], ["mse", None]),
    (False, {"click": ["accuracy"]}, None),
    (False, [None, ["acc", "acc"]], [["acc"], ["acc"]]),
]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("named, metrics, weighted_metrics", COMPILED)
def test_metrics_of_several_outputs_have_the_names_and_numbers_of_model_evaluate(
    named, metrics, weighted_metrics, weighted
):
    model = two_outputs(named)
    loss = {"click": "binary_crossentropy", "stars": "sparse_categorical_crossentropy"}
    loss = loss if named else list(loss.values())
    y = labels(named)
    made = functional_model_from_keras(
        model, loss, (X_SPEC, tf.nest.map_structure(spec_of, y)), metrics, weighted_metrics=weighted_metrics
    )
    model.compile(loss=loss, metrics=metrics, weighted_metrics=weighted_metrics)
    weight = WEIGHT if weighted else None
    expected = model.evaluate(
        X, y if named else list(y), sample_weight=weight, batch_size=8, verbose=0, return_dict=True
    )
    expected = {name: value for name, value in expected.items() if not name.endswith("loss")}
    found = {name: float(value) for name, value in evaluated(made, y, weight).items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_one_list_of_names_counts_for_each_output():
    y = labels(False)
    made = functional_model_from_keras(
        two_outputs(False), "mse", (X_SPEC, tf.nest.map_structure(spec_of, y)), ["MeanSquaredError"]
    )
    assert list(evaluated(made, y)) == ["click_MeanSquaredError", "stars_MeanSquaredError"]


def single(metrics, weighted_metrics=None, y=STARS) -> FunctionalModel:
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, "softmax")])
    return functional_model_from_keras(model, "mse", (X_SPEC, spec_of(y)), metrics, weighted_metrics=weighted_metrics)


@pytest.mark.parametrize("name", ["accuracy", "acc", "Accuracy"])
def test_accuracy_is_resolved_as_in_keras(name):
    made = single([name])
    predicted = np.argmax(made.predict_on_batch(made.initial_weights, X, False), -1)
    expected = np.mean(predicted == STARS[:, 0])
    assert {name: float(value) for name, value in evaluated(made, STARS).items()} == {name: pytest.approx(expected)}


def test_only_weighted_metrics_use_sample_weights_as_in_keras():
    made = single(["acc"], ["acc"])
    found = evaluated(made, STARS, np.where(np.arange(16) < 2, 1, 0).astype(np.float32))
    plain = evaluated(made, STARS)
    assert list(found) == ["acc", "weighted_acc"]
    assert found["acc"] == plain["acc"]


class Unweighted(keras.metrics.Metric):
    """Counts examples, and knows no weights."""

    def __init__(self, name="unweighted"):
        super().__init__(name=name)
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, y_true, y_pred):
        self.count.assign_add(keras.ops.cast(keras.ops.shape(y_pred)[0], "float32"))

    def result(self):
        return self.count


def test_a_metric_that_ignores_weights_does_not_affect_other_metrics():
    made = single([Unweighted, "SparseCategoricalAccuracy"])
    weight = np.zeros(16, np.float32)
    weight[3] = 1
    found = evaluated(made, STARS, weight)
    assert found["unweighted"] == 16
    predicted = np.argmax(made.predict_on_batch(made.initial_weights, X, False), -1)
    assert found["sparse_categorical_accuracy"] == (predicted[3] == STARS[3, 0])


@pytest.mark.parametrize(
    "metrics",
    [["AUC"], [{"class_name": "AUC", "config": {}}], [keras.metrics.AUC], lambda: [keras.metrics.AUC()]],
    ids=["name", "configuration", "class", "constructor"],
)
def test_metric_names_have_no_counter_that_continues_from_model_to_model(metrics):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(1, "sigmoid")(inputs))
    mine = keras.metrics.AUC().name
    for _ in range(3):
        made = functional_model_from_keras(model, "mse", (X_SPEC, spec_of(CLICK)), metrics)
        assert list(made.initialize_metrics_state()) == ["auc"]
    # The caller's own names go on as they would have.
    count = int(mine.removeprefix("auc").removeprefix("_") or 0)
    assert keras.metrics.AUC().name == f"auc_{count + 1}"


@pytest.mark.parametrize(
    "metrics, message",
    [
        ({"clik": ["AUC"]}, "metrics: .*"),
        ([["nonsense"], None], "metrics: Could not interpret metric identifier: nonsense"),
        (3, "metrics: "),
    ],
)
def test_metrics_that_do_not_fit_are_refused(metrics, message):
    y = labels(False)
    with pytest.raises(InvalidCompileArgument, match=message):
        functional_model_from_keras(two_outputs(False), "mse", (X_SPEC, tf.nest.map_structure(spec_of, y)), metrics)


def test_a_metric_over_all_outputs_at_once_gets_them_as_in_tff():
    class Count(Unweighted):
        def update_state(self, y_true, y_pred):
            super().update_state(y_true["click"], y_pred["stars"])

    y = labels(True)
    made = functional_model_from_keras(
        two_outputs(True), "mse", (X_SPEC, tf.nest.map_structure(spec_of, y)), lambda: Count()
    )
    output = BatchOutput(0.0, {"click": CLICK, "stars": np.zeros((16, 3), np.float32)}, 16)
    state = made.update_metrics_state(made.initialize_metrics_state(), y, output)
    assert made.finalize_metrics(state) == 16


def test_weighted_metrics_work_without_metrics():
    made = single(None, ["mae"])
    assert list(made.finalize_metrics(made.initialize_metrics_state())) == ["mae"]
