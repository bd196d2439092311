"""Which models' metrics states may be added: those that are sums over batches, as a probe finds."""

from __future__ import annotations

import keras
import pytest
import tensorflow as tf

from forwardpass_server import FunctionalModel, functional_model_from_keras
from forwardpass_server.models import formats, mergeability, tracing
from forwardpass_server.models.execution import Execution
from support import zoo
from support.golden import FOLDER, NAMES, golden


def reason(model: FunctionalModel) -> str:
    traced = tracing.trace(model)
    return mergeability.reason_against(Execution(traced.functions, "/device:CPU:0"), traced.spec)


def counting(update, initial=0.0, *, weighted=None) -> FunctionalModel:
    """A model with one number, or whatever `initial` is, for a metrics state. weighted: how it counts with weights."""

    @tf.function
    def initialize():
        return {"n": tf.constant(initial)}

    @tf.function
    def updated(state, labels, batch_output, sample_weight=None):
        if sample_weight is not None and weighted is not None:
            return {"n": weighted(state["n"], labels, sample_weight)}
        return {"n": update(state["n"], labels)}

    return FunctionalModel(
        initial_weights=((1.0,), ()),
        predict_on_batch_fn=tf.function(lambda model_weights, x, training: x * model_weights[0][0]),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        metrics_fns=(initialize, updated, lambda state: state),
        input_spec=(tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


SUMS = {
    "a sum": counting(lambda n, y: n + tf.reduce_sum(y)),
    "a count": counting(lambda n, y: n + tf.size(y), 0),
    "a sum of squares": counting(lambda n, y: n + tf.reduce_sum(y * y)),
    "a histogram": counting(lambda n, y: n + tf.histogram_fixed_width(y, [0.0, 1.0], 4), [0, 0, 0, 0]),
    "a sum in bfloat16": counting(
        lambda n, y: n + tf.cast(tf.reduce_sum(y), tf.bfloat16), tf.bfloat16.as_numpy_dtype(0)
    ),
}

NO_SUMS = {
    "a running mean": counting(lambda n, y: (n + tf.reduce_mean(y)) / 2),
    "the largest": counting(lambda n, y: tf.maximum(n, tf.reduce_max(y))),
    "the last": counting(lambda n, y: y[-1]),
    "a product": counting(lambda n, y: n * tf.reduce_prod(y), 1.0),
    "an initial state that is not zero": counting(lambda n, y: n + tf.reduce_sum(y), 1.0),
    "the number of batches that were full": counting(lambda n, y: tf.cast(tf.size(y), tf.float32)),
    "a sum, and with weights the largest": counting(
        lambda n, y: n + tf.reduce_sum(y), weighted=lambda n, y, w: tf.maximum(n, tf.reduce_max(y * w))
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_states_that_are_sums_may_be_added(name):
    assert reason(SUMS[name]) == ""


@pytest.mark.parametrize("name", NO_SUMS)
def test_a_state_that_is_not_a_sum_is_named(name):
    assert reason(NO_SUMS[name]) == "state['n'] is not a sum over batches"


def test_states_that_grow_cannot_be_added():
    assert reason(zoo.remembering()) == "state['labels'] is not a sum over batches"


def test_states_that_hold_no_numbers_are_refused():
    kept = counting(lambda n, y: n, "a")
    assert reason(kept) == "state['n'] holds no numbers: string[]"
    assert reason(counting(lambda n, y: n, False)) == "state['n'] holds no numbers: bool[]"


def test_states_of_a_model_that_refuses_the_probe_cannot_be_added():
    def update(n, y):
        with tf.control_dependencies([tf.debugging.assert_greater(y, 2.0)]):
            return n + tf.reduce_sum(y)

    assert reason(counting(update)) == "the model refused the batches of the probe: ModelRefusedInput"


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_models_have_the_expected_result(name):
    model, *_ = formats.read(FOLDER / name / "saved_model")
    expected = "" if golden(name).manifest["metrics_in_saved_model"] else "the model has no metrics"
    assert reason(model) == expected


def test_an_area_under_a_curve_with_200_thresholds_may_be_added():
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1, "sigmoid")])
    spec = (tf.TensorSpec([None, 3], tf.float32), tf.TensorSpec([None, 1], tf.float32))
    metrics = [{"class_name": "AUC", "config": {"num_thresholds": 200}}]
    assert reason(functional_model_from_keras(model, "binary_crossentropy", spec, metrics)) == ""
