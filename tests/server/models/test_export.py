"""Functional models written to a folder and read again."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire import trees
from forwardpass.wire.description import BatchOutput
from forwardpass_server import (
    FunctionalModel,
    functional_model_from_keras,
    load_functional_model,
    save_functional_model,
)
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import tracing
from forwardpass_server.models.export import SPEC_FILE_NAME
from support import zoo
from support.golden import FOLDER


def assert_same(found, expected):
    found_tree, found_leaves = trees.flatten(found)
    expected_tree, expected_leaves = trees.flatten(expected)
    assert found_tree == expected_tree
    for one, other in zip(found_leaves, expected_leaves, strict=True):
        # A graph in another function sums in another order: float32's last bit.
        assert np.allclose(np.asarray(one), np.asarray(other), rtol=1e-6, atol=1e-6)


def saved(model: FunctionalModel, folder) -> FunctionalModel:
    save_functional_model(model, folder / "model")
    return load_functional_model(folder / "model")


def test_everything_that_tffs_format_lacks_is_kept(tmp_path):
    original = zoo.structures()
    loaded = saved(original, tmp_path)
    x, y = zoo.structures_batch(4)
    weights = original.initial_weights
    assert_same(loaded.initial_weights, weights)
    sample_weight = np.float32([0, 1, 2, 3])
    for training in (True, False):
        predictions = original.predict_on_batch(weights, x, training)
        assert_same(loaded.predict_on_batch(weights, x, training), predictions)
        output = original.forward_pass(weights, {"x": x, "y": y}, training)
        assert_same(loaded.forward_pass(weights, {"x": x, "y": y}, training), output)
        assert_same(loaded.loss(predictions, y), original.loss(predictions, y))
        assert_same(loaded.loss(predictions, y, sample_weight), original.loss(predictions, y, sample_weight))
    state = original.initialize_metrics_state()
    assert_same(loaded.initialize_metrics_state(), state)
    for weight in (None, sample_weight):
        updated = original.update_metrics_state(state, y, output, weight)
        assert_same(loaded.update_metrics_state(state, y, output, weight), updated)
        assert_same(loaded.finalize_metrics(updated), original.finalize_metrics(updated))


def test_an_export_of_a_lookup_table_is_refused(tmp_path):
    initializer = tf.lookup.KeyValueTensorInitializer(tf.constant([1, 2]), tf.constant([10.0, 20.0]))
    table = tf.lookup.StaticHashTable(initializer, 0.0)
    model = FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=tf.function(lambda model_weights, x, training: table.lookup(x)),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output - label),
        input_spec=(tf.TensorSpec([None], tf.int32), tf.TensorSpec([None], tf.float32)),
    )
    with pytest.raises(ModelLoadError, match="predict_on_batch uses a lookup table"):
        save_functional_model(model, tmp_path / "model")


def test_an_export_of_a_model_that_calls_python_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"predict_on_batch calls Python \(tf.py_function"):
        save_functional_model(zoo.crashing(), tmp_path / "model")


def test_the_whole_spec_is_kept(tmp_path):
    original = zoo.structures()
    assert tracing.trace(saved(original, tmp_path)).spec == tracing.trace(original).spec


def test_a_model_can_be_saved_again(tmp_path):
    (tmp_path / "again").mkdir()
    twice = saved(saved(zoo.structures(), tmp_path), tmp_path / "again")
    assert tracing.trace(twice).spec == tracing.trace(zoo.structures()).spec


def test_a_keras_model_with_batch_normalisation_and_dropout_is_kept(tmp_path):
    model = zoo.keras_cnn(1)
    spec = (tf.TensorSpec([None, 6, 6, 1], tf.float32), tf.TensorSpec([None], tf.int64))
    original = functional_model_from_keras(
        model, "sparse_categorical_crossentropy", spec, ["SparseCategoricalAccuracy"]
    )
    loaded = saved(original, tmp_path)
    x, y = zoo.keras_batch(5)
    for training in (True, False):
        assert_same(
            loaded.forward_pass(original.initial_weights, (x, y), training),
            original.forward_pass(original.initial_weights, (x, y), training),
        )


def test_a_step_of_a_loaded_keras_model_changes_the_same_non_trainable_weights(tmp_path):
    spec = (tf.TensorSpec([None, 6, 6, 1], tf.float32), tf.TensorSpec([None], tf.int64))
    original = functional_model_from_keras(zoo.keras_cnn(3), "sparse_categorical_crossentropy", spec, ["accuracy"])
    loaded = saved(original, tmp_path)
    batch, weights = zoo.keras_batch(4), original.initial_weights
    for sample_weight in (None, np.float32([1, 0, 2, 1])):
        for training in (True, False):
            output, mask, non_trainable = original.update(weights, batch, sample_weight, training)
            found, found_mask, found_non_trainable = loaded.update(weights, batch, sample_weight, training)
            assert (mask, found_mask) == (None, None)
            assert_same(tuple(found), tuple(output))
            assert_same(tuple(found_non_trainable), tuple(non_trainable))
            changed = [not np.array_equal(*pair) for pair in zip(found_non_trainable, weights[1], strict=True)]
            assert any(changed) is training


def test_every_dtype_is_kept(tmp_path):
    loaded = saved(zoo.every_dtype(), tmp_path)
    assert [leaf.dtype.name for leaf in loaded.input_spec[0].values()] == zoo.DTYPES


def test_a_loaded_export_lacks_the_same_functions_as_its_model(tmp_path):
    original = load_functional_model(FOLDER / "linear_regression" / "saved_model")
    assert saved(original, tmp_path).unavailable == original.unavailable


def test_tffs_own_files_are_loaded():
    model = load_functional_model(FOLDER / "dict_inputs" / "saved_model")
    assert list(model.input_spec[0]) == ["dense", "cat"]


def test_a_folder_that_is_not_empty_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_functional_model(zoo.slow(), tmp_path)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"found no saved_model\.pb"):
        load_functional_model(tmp_path)


def test_a_saved_model_of_something_else_is_refused(tmp_path):
    module = tf.Module()
    module.f = tf.function(lambda: tf.constant(1)).get_concrete_function()
    tf.saved_model.save(module, str(tmp_path))
    with pytest.raises(ModelLoadError, match="is not a functional model"):
        load_functional_model(tmp_path)


def test_an_incomplete_export_is_not_loaded(tmp_path):
    save_functional_model(zoo.slow(), tmp_path / "model")
    (tmp_path / "model" / SPEC_FILE_NAME).unlink()
    with pytest.raises(ModelLoadError):
        load_functional_model(tmp_path / "model")


def test_a_batch_output_of_another_class_is_accepted(tmp_path):
    original = zoo.structures()
    loaded = saved(original, tmp_path)
    x, y = zoo.structures_batch(2)
    output = original.forward_pass(original.initial_weights, {"x": x, "y": y}, True)
    state = loaded.initialize_metrics_state()
    expected = loaded.update_metrics_state(state, y, output)
    assert_same(loaded.update_metrics_state(state, y, BatchOutput(*output)), expected)
