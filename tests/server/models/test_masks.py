"""Keras masks in traces, exports and local functional models."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire import errors, specs
from forwardpass.wire.description import Function
from forwardpass_server import (
    FunctionalModel,
    functional_model_from_keras,
    load_functional_model,
    save_functional_model,
)
from forwardpass_server.models import masks, tf_specs, tracing
from support import masked_models, zoo
from support.masked_models import MODELS, TOKENS

TOKEN_SPEC = (tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None, None], tf.int64))


def functional(keras_model: keras.Model) -> FunctionalModel:
    return functional_model_from_keras(
        keras_model,
        TOKENS.loss,
        TOKEN_SPEC,
        TOKENS.metrics,
        sample_weight_spec=tf.TensorSpec([None, None], tf.float32),
    )


def close(found, expected) -> bool:
    # A graph fuses what Keras runs one by one: float32 keeps seven digits. Padding would change the second.
    return np.allclose(found, expected, rtol=1e-5, atol=1e-6)


def exported(model: FunctionalModel, folder) -> FunctionalModel:
    save_functional_model(model, folder / "model")
    return load_functional_model(folder / "model")


@pytest.fixture(scope="module", params=["local", "exported"])
def lstm(request, tmp_path_factory) -> FunctionalModel:
    model = functional(masked_models.build("lstm_with_regularizer"))
    return exported(model, tmp_path_factory.mktemp("export")) if request.param == "exported" else model


@pytest.mark.parametrize("training", [False, True])
def test_a_functional_model_counts_what_keras_counts(lstm, training):
    model = masked_models.build("lstm_with_regularizer")
    x, y, sample_weight = TOKENS.batch(5, 0)
    predictions = model(x, training=training)
    penalty = masked_models.penalties(model)
    loss = float(model.compute_loss(x=x, y=y, y_pred=predictions))
    weighted = float(model.compute_loss(x=x, y=y, y_pred=predictions, sample_weight=sample_weight))
    found = lstm.forward_pass(lstm.initial_weights, (x, y), training)
    assert close(found.loss, loss)
    assert np.array_equal(masks.of(found.predictions), x != 0)
    assert np.array_equal(masks.of(lstm.predict_on_batch(lstm.initial_weights, x, training)), x != 0)
    assert close(lstm.loss(found.predictions, y) + penalty, loss)
    assert close(lstm.loss(found.predictions, y, sample_weight) + penalty, weighted)
    assert close(lstm.loss(found.predictions.numpy(), y, mask=x != 0) + penalty, loss)


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_of_a_functional_model_are_those_of_keras(lstm, weighted):
    model = masked_models.build("lstm_with_regularizer")
    x, y, *weight = TOKENS.batch(5, 0)[: 3 if weighted else 2]
    expected = masked_models.evaluate(model, [(x, y, *weight)])
    output = lstm.forward_pass(lstm.initial_weights, (x, y), False)
    plain = output._replace(predictions=output.predictions.numpy())
    state = lstm.initialize_metrics_state()
    for updated in (
        lstm.update_metrics_state(state, y, output, *weight),
        lstm.update_metrics_state(state, y, plain, *weight, mask=x != 0),
    ):
        found = lstm.finalize_metrics(updated)
        assert close(list(found.values()), list(expected.values()))


def test_predictions_without_their_mask_count_completely(lstm):
    x, y, _ = TOKENS.batch(5, 0)
    plain = lstm.predict_on_batch(lstm.initial_weights, x, False).numpy()
    expected = -np.log(np.take_along_axis(plain, y[..., None], -1)).mean()
    assert close(lstm.loss(plain, y), expected)
    assert close(lstm.loss(plain, y, mask=np.ones_like(x, bool)), expected)


class SelfMasking(keras.Model):
    """A model that masks its outputs itself, where its input is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = keras.layers.Embedding(12, 5)
        self.supports_masking = True

    def call(self, inputs, training=None):
        return keras.ops.softmax(self.embedding(inputs))

    def compute_mask(self, inputs, previous_mask):
        return keras.ops.not_equal(inputs, 0)


def test_a_mask_that_the_model_itself_computes_counts():
    keras.utils.set_random_seed(0)
    model = SelfMasking()
    model.compile(loss=TOKENS.loss)
    made = functional(model)
    x, y, _ = TOKENS.batch(5, 0)
    expected = model.evaluate(x, y, batch_size=5, verbose=0)
    output = made.forward_pass(made.initial_weights, (x, y), False)
    assert close(output.loss, expected)
    assert close(made.loss(output.predictions, y), expected)


def test_an_export_keeps_the_spec_of_the_mask(tmp_path):
    model = functional(masked_models.build("lstm"))
    spec = tracing.trace(model).spec
    assert str(spec.prediction_mask) == "bool[None,None]"
    assert tracing.trace(exported(model, tmp_path)).spec == spec


def test_the_mask_is_the_last_argument_and_result_before_sample_weights():
    traced = tracing.trace(functional(masked_models.build("lstm")))
    x, y, sample_weight = TOKENS.batch(5, 0)
    predictions, mask = traced.functions[Function.PREDICT_ON_BATCH, False](*map(tf.constant, traced.initial_weights), x)
    assert np.array_equal(mask, x != 0)
    (loss,) = traced.functions[Function.LOSS, False](predictions, y, mask)
    *output, again = traced.functions[Function.FORWARD_PASS, False](*map(tf.constant, traced.initial_weights), x, y)
    assert close(loss, output[0])
    assert np.array_equal(mask, again)
    (weighted,) = traced.functions[Function.WEIGHTED_LOSS, False](predictions, y, mask, tf.constant(sample_weight))
    keras_model = masked_models.build("lstm")
    assert close(weighted, keras_model.compute_loss(y=y, y_pred=keras_model(x), sample_weight=sample_weight))


@pytest.mark.parametrize(
    "make",
    [lambda: functional_model_from_keras(zoo.keras_cnn(1), "mse", tf_specs.nested_to_tf(CNN), None), zoo.structures],
    ids=["keras", "python"],
)
def test_a_model_without_masks_is_traced_without_mask_arguments(make):
    spec = tracing.trace(make()).spec
    assert spec.prediction_mask == specs.EMPTY
    assert list(spec.arguments[Function.LOSS]) == ["output", "label"]
    assert list(spec.results[Function.PREDICT_ON_BATCH]) == ["predictions"]


CNN = tf_specs.to_wire((tf.TensorSpec([None, 6, 6, 1], tf.float32), tf.TensorSpec([None, 5], tf.float32)), "spec")


def test_metrics_that_read_no_mask_let_a_caller_leave_it_out():
    keras_model = MODELS["lstm"][1]()
    loss_only = functional_model_from_keras(keras_model, TOKENS.loss, TOKEN_SPEC, {"mean_iou": _iou()})
    assert "prediction_mask" in tracing.trace(loss_only).spec.unused_batch_output_fields
    assert "prediction_mask" not in tracing.trace(functional(keras_model)).spec.unused_batch_output_fields


def _iou() -> keras.metrics.Metric:
    return keras.metrics.MeanIoU(5, sparse_y_pred=False)


def test_masks_of_other_predictions_for_training_are_refused():
    @tf.function
    def predict(model_weights, x, training):
        return x, (x > 0 if training else None)

    model = FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=predict,
        loss_fn=lambda output, label, sample_weight=None, prediction_mask=None: tf.reduce_sum(output),
        input_spec=(tf.TensorSpec([None, 2], tf.float32), tf.TensorSpec([None], tf.float32)),
        has_prediction_masks=True,
    )
    with pytest.raises(errors.StructureMismatch, match=r"prediction_mask: expected \*, got None"):
        tracing.trace(model)


def test_a_mask_for_a_model_without_masks_is_refused():
    model = zoo.counting()
    with pytest.raises(ValueError, match="the predictions of this model have no Keras masks"):
        model.loss(tf.zeros([1]), tf.zeros([1]), mask=tf.constant([True]))


def test_masks_are_attached_to_copies():
    plain = {"a": tf.zeros([2, 3]), "b": [tf.zeros([2])]}
    mask = tf.constant([True, False])
    masked = masks.attached(plain, {"a": mask, "b": [None]})
    assert masks.of(plain) is None
    assert masks.of(masked) == {"a": mask, "b": [None]}
    assert masked["b"][0] is plain["b"][0]
    assert masks.attached(plain, None) is plain
