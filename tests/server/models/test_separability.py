"""Which models may be batched: those whose every operation keeps rows apart, as a probe confirms."""

from __future__ import annotations

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire.description import Function
from forwardpass_server import FunctionalModel, functional_model_from_keras
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.models import export, formats, row_kinds, separability, tracing
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.loading import TensorFlowLoader
from support import zoo
from support.golden import FOLDER, NAMES
from support.predictors import Predictor


def reason(model: FunctionalModel) -> str:
    traced = tracing.trace(model)
    execution = Execution(traced.functions, "/device:CPU:0")
    concrete = traced.functions[Function.PREDICT_ON_BATCH, False]
    return separability.reason_against(execution, concrete, traced.spec, traced.initial_weights)


def functional(predict, shape=(4,), weights=()) -> FunctionalModel:
    return FunctionalModel(
        initial_weights=(tuple(np.asarray(weight, np.float32) for weight in weights), ()),
        predict_on_batch_fn=tf.function(lambda model_weights, x, training: predict(x, *model_weights[0])),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(tf.cast(output, tf.float32)),
        input_spec=(tf.TensorSpec([None, *shape], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


SEPARABLE = {
    "dense": functional(lambda x, w, b: tf.nn.relu(x @ w + b), weights=(np.ones((4, 3)), np.ones(3))),
    "a weight with a dimension of 1 in the batch's place": functional(lambda x, b: x * b, weights=(np.ones((1, 4)),)),
    "softmax over features": functional(lambda x: tf.nn.softmax(x)),
    "normalised rows": functional(lambda x: (x - tf.reduce_mean(x, 1, keepdims=True)) / tf.norm(x, axis=-1)[:, None]),
    "flattened": functional(lambda x: tf.reshape(x, [-1, 6]), shape=(2, 3)),
    "flattened by its own shape": functional(lambda x: tf.reshape(x, [tf.shape(x)[0], 6]), shape=(2, 3)),
    "transposed features": functional(lambda x: tf.transpose(x, [0, 2, 1]), shape=(2, 3)),
    "joined features": functional(lambda x: tf.concat([x, x * 2, tf.zeros_like(x)], -1)),
    "stacked features": functional(lambda x: tf.stack([x, x], 1)),
    "a slice of features": functional(lambda x: x[:, 1:3]),
    "zeros of its own size": functional(lambda x: x[:, 0] + tf.zeros([tf.shape(x)[0]])),
    "table lookup": functional(
        lambda x, t: tf.gather(t, tf.cast(x * 0 + 8, tf.int32)[:, 0]), weights=(np.ones((9, 2)),)
    ),
    "best of each row": functional(lambda x: tf.argmax(x, 1)),
    "top two of each row": functional(lambda x: tf.math.top_k(x, 2).values),
    "batched product": functional(lambda x: tf.matmul(x, x, transpose_b=True), shape=(2, 3)),
    "einsum": functional(lambda x, w: tf.einsum("bij,jk->bik", x, w), shape=(2, 3), weights=(np.ones((3, 2)),)),
    "a free length": functional(lambda x: tf.reduce_mean(x, 1), shape=(None,)),
    "two free lengths": functional(lambda x: tf.matmul(x, x, transpose_b=True), shape=(None, None)),
    "padded features": functional(lambda x: tf.pad(x, [[0, 0], [1, 1]])),
}

INSEPARABLE = {
    "mean over the batch": (lambda x: x - tf.reduce_mean(x, 0), "Mean", "along the batch"),
    "softmax over the batch": (lambda x: tf.transpose(tf.nn.softmax(tf.transpose(x))), "Softmax", "along the batch"),
    "sum of everything, spread again": (lambda x: x + tf.reduce_sum(x), "Sum", "along the batch"),
    "cumulated over the batch": (lambda x: tf.cumsum(x, 0), "Cumsum", "along the batch"),
    "reversed": (lambda x: tf.reverse(x, [0]), "ReverseV2", "along the batch"),
    "rows joined": (lambda x: tf.reshape(x, [-1, 8]), "Reshape", "cuts rows in pieces, or joins them"),
    "rows cut": (lambda x: tf.reshape(x, [-1, 2]), "", "parts of rows"),
    "rows doubled": (lambda x: tf.concat([x, x], 0), "ConcatV2", "along the batch"),
    "rows of another": (lambda x: tf.gather(x, tf.cast(x[:, 0] * 0, tf.int32)), "GatherV2", "uses rows as parameters"),
    "first row for all": (lambda x: x + x[:1], "StridedSlice", "takes some rows"),
    "last row only": (lambda x: x[-1:], "StridedSlice", "takes some rows"),
    "number of rows in the result": (lambda x: x * tf.cast(tf.shape(x)[0], tf.float32), "Cast", "the number of rows"),
    "products of rows": (lambda x: x @ tf.transpose(x) @ x, "MatMul", "uses rows as parameters"),
    "products of rows without transposing": (lambda x: tf.matmul(x, x, transpose_b=True) @ x, "MatMul", "parameters"),
    "products summed over rows": (lambda x: x + tf.einsum("bi,bj->ij", x, x)[0], "Einsum", ""),
    "a number of rows that wraps around": (
        lambda x: tf.fill(tf.stack([tf.cast(tf.cast(tf.shape(x)[0], tf.uint8), tf.int32), 1]), 1.0),
        "Cast",
        "the number of rows",
    ),
    "noise": (lambda x: x + tf.random.normal([4]), "RandomStandardNormal", "has an effect or a state"),
    "unknown operation": (lambda x: tf.linalg.expm(tf.linalg.diag(x))[:, 0], "", ""),
    "a loop": (lambda x: tf.scan(lambda a, row: a + row, x), "While", "as often as the batch decides"),
}


raw = tf.raw_ops


def part_of_shape(x, begin, end, **masks):
    return raw.StridedSlice(input=tf.shape(x), begin=[begin], end=[end], strides=[1], **masks)


def lookup(index):
    return tf.gather(tf.reshape(tf.range(20.0), [10, 2]), index)


def not_inlined(w):
    noise = tf.function(lambda w: w + tf.random.normal([1, 4])).get_concrete_function(tf.TensorSpec(w.shape, w.dtype))
    return raw.PartitionedCall(args=[w], Tout=[tf.float32], f=noise)[0]


def statistics(x):
    ones = tf.ones([4])
    return raw.FusedBatchNormV3(
        x=x[:, None, None, :], scale=ones, offset=ones, mean=ones, variance=ones, is_training=False
    ).batch_mean


# Each is a graph that a rule would let pass that does not know all of its operation's definition: a function of x, the
# shape of x behind the batch, and what the reason says.
ATTACKS = {
    # Einsum: the batch on a diagonal of the result.
    "einsum repeats the batch label": (lambda x: raw.Einsum(inputs=[x], equation="ab->aab"), [4], "diagonal"),
    "einsum repeats it behind": (lambda x: raw.Einsum(inputs=[x], equation="ab->aba"), [4], "diagonal"),
    "einsum repeats it in an argument": (lambda x: raw.Einsum(inputs=[x], equation="aa->a"), [None], "ties"),
    "einsum with weights of the batch's label": (
        lambda x: raw.Einsum(inputs=[x, tf.ones([1, 4])], equation="ab,ab->ab"),
        [4],
        "ties the number of rows",
    ),
    "einsum sums over the batch": (lambda x: raw.Einsum(inputs=[x, x], equation="ab,ac->bc"), [None], "sums over"),
    "einsum with an ellipsis": (lambda x: raw.Einsum(inputs=[x], equation="...b->b..."), [None], "dimension 1"),
    "einsum with an ellipsis of several rows": (
        lambda x: raw.Einsum(inputs=[x, tf.ones([3, 4])], equation="...b,...b->...b"),
        [4],
        "ties the number of rows",
    ),
    "einsum with an ellipsis of two batches": (
        lambda x: raw.Einsum(inputs=[x[:, None], x[None]], equation="...b,...b->...b")[:, 0],
        [None],
        "ties the number of rows",
    ),
    # StridedSlice: a dimension that is dropped has no masks.
    "a dropped dimension of a shape with a begin mask": (
        lambda x: tf.fill(tf.stack([part_of_shape(x, 1, 2, begin_mask=1, shrink_axis_mask=1), 1]), 1.0),
        [None],
        "does not depend on the batch",
    ),
    "an empty slice of a shape": (
        lambda x: tf.fill(tf.concat([part_of_shape(x, 0, 0), tf.shape(x)[1:]], 0), 1.0),
        [None],
        "does not depend on the batch",
    ),
    "an empty slice of a shape by a negative end": (
        lambda x: tf.fill(tf.concat([part_of_shape(x, 0, -2), tf.shape(x)[1:]], 0), 1.0),
        [None],
        "does not depend on the batch",
    ),
    "the last size of a shape by a negative begin": (
        lambda x: tf.fill(part_of_shape(x, -1, 2), 1.0),
        [None],
        "does not depend on the batch",
    ),
    "a slice with a new first dimension": (lambda x: x[None] + tf.zeros([1, 1, 1]), [None], "dimension 1"),
    "a slice that begins with an ellipsis": (lambda x: tf.transpose(x)[..., 0], [4], "takes some rows"),
    "every second row": (lambda x: x[::2], [4], "takes some rows"),
    "rows backwards": (lambda x: x[::-1], [4], "takes some rows"),
    "a row by its number": (lambda x: x + x[0], [4], "takes some rows"),
    "a row from behind": (lambda x: x + x[-1], [4], "takes some rows"),
    # Operations that do not broadcast although others of their kind do.
    "AddN of rows and weights": (lambda x: raw.AddN(inputs=[x, tf.ones([1, 4])]), [4], "ties the number of rows"),
    "ApproximateEqual to weights": (
        lambda x: raw.ApproximateEqual(x=x, y=tf.ones([1, 4])),
        [4],
        "ties the number of rows",
    ),
    "ClipByValue by weights": (
        lambda x: raw.ClipByValue(t=x, clip_value_min=tf.zeros([1, 4]), clip_value_max=1.0),
        [4],
        "ties the number of rows",
    ),
    "BatchMatMul by weights": (lambda x: raw.BatchMatMul(x=x, y=tf.ones([1, 4, 3])), [2, 4], "ties the number of rows"),
    # Results beside the first.
    "statistics of a batch normalisation": (lambda x: x + statistics(x), [4], "statistics of the batch"),
    "statistics of a training batch normalisation": (
        lambda x: (
            raw.FusedBatchNormV3(
                x=x[:, None, None, :], scale=[1.0] * 4, offset=[0.0] * 4, mean=[], variance=[], is_training=True
            ).y
        ),
        [4],
        "statistics of the batch",
    ),
    # Shapes that are claimed, not computed.
    "a shape that set_shape makes up": (lambda x: made_up(x), [None], "cuts rows in pieces"),
    "rows of no number at all": (lambda x: tf.reshape(x[:, :0], [-1, 3, 0]), [4], "rows without numbers"),
    # Axes that are counted from the end.
    "a reduction by a negative axis": (lambda x: x + tf.reduce_max(x, -2, keepdims=True), [4], "along the batch"),
    "a reduction over all of several axes": (lambda x: x + tf.reduce_sum(x, [-1, -2], keepdims=True), [4], "along"),
    "an exclusive sum by a negative axis": (lambda x: tf.cumsum(x, -2, exclusive=True, reverse=True), [4], "along"),
    "the best row": (lambda x: x + tf.cast(tf.argmax(x, -2), tf.float32), [4], "along the batch"),
    "reversed by a negative axis": (lambda x: tf.reverse(x, [-2]), [4], "along the batch"),
    "a gather by a negative axis": (lambda x: raw.GatherV2(params=x, indices=[0], axis=-2), [4], "by their number"),
    "a gather with batch dimensions": (
        lambda x: tf.gather(tf.ones([1, 4]), tf.zeros_like(x, tf.int32), axis=1, batch_dims=1),
        [4],
        "not looked into",
    ),
    "a gather with negative batch dimensions": (
        lambda x: raw.GatherV2(params=x, indices=tf.zeros_like(x, tf.int32), axis=1, batch_dims=-1),
        [4],
        "not looked into",
    ),
    "a gather that puts the batch second": (
        lambda x: tf.gather(tf.ones([3, 5]), tf.cast(x[:, 0] * 0, tf.int32), axis=-1) + tf.zeros([1, 1]),
        [4],
        "dimension 1",
    ),
    "one-hot rows in front": (
        lambda x: tf.one_hot(tf.cast(x[:, 0], tf.int32), tf.size(tf.ones([3])), axis=0),
        [4],
        "dimension 1",
    ),
    "a split by a negative axis": (lambda x: raw.Split(axis=-2, value=x, num_split=2)[0], [4], "splits the batch"),
    "a split of given sizes": (
        lambda x: raw.SplitV(value=x, size_splits=[1, -1], axis=-2, num_split=2)[1],
        [4],
        "splits the batch",
    ),
    "a stack in front": (lambda x: raw.Pack(values=[x, x], axis=-3), [None], "dimension 1"),
    "rows taken apart": (lambda x: x + raw.Unpack(value=tf.ensure_shape(x, [2, 4]), num=2, axis=-2)[0], [4], "fixes"),
    "a new first dimension": (lambda x: tf.expand_dims(x, -3), [None], "dimension 1"),
    "squeezed everywhere": (lambda x: x + raw.Squeeze(input=x), [4], "may drop the batch"),
    "a batch of one squeezed": (lambda x: x + tf.squeeze(x, -2), [4], "may drop the batch"),
    "transposed by negative axes": (lambda x: tf.einsum("ab->ba", x), [None], "dimension 1"),
    # Along the last dimension of a vector, which is the batch.
    "softmax of a vector": (lambda x: x * tf.nn.softmax(x[:, 0])[:, None], [4], "along the batch"),
    "best of a vector": (lambda x: x + tf.math.top_k(x[:, 0], 1).values, [4], "along the batch"),
    # Lower ranks broadcast along other dimensions.
    "a selection by rows of lower rank": (lambda x: tf.where(x[:, 0] > 0, x, 0.0), [None], "along another dimension"),
    "a sum with rows of lower rank": (lambda x: x + x[:, 0], [None], "along another dimension"),
    "a product with rows of lower rank": (lambda x: tf.matmul(x[:, None], x), [4], "uses rows as parameters"),
    "a constant of several rows": (lambda x: x + tf.ones([3, 1]) * x[:, :1], [4], "ties the number of rows"),
    # Products that sum over rows.
    "a transposed product": (lambda x: raw.MatMul(a=x, b=tf.ones([3, 4]), transpose_a=True), [None], "sums over"),
    "an adjoint product": (lambda x: raw.BatchMatMulV2(x=x, y=tf.ones([3, 4]), adj_x=True), [None], "sums over"),
    "a product with a stack of weights": (lambda x: raw.BatchMatMulV2(x=x, y=tf.ones([3, 4, 2])), [4], "dimension 1"),
    # Numbers of rows.
    "the number of rows twice": (lambda x: tf.zeros(tf.stack([tf.shape(x)[0]] * 2)), [4], "number of rows twice"),
    "the number of rows doubled": (lambda x: tf.reshape(x, [tf.shape(x)[0] * 2, 2]), [4], "parts of rows"),
    "numbered rows": (lambda x: x + tf.cast(tf.range(tf.shape(x)[0]), tf.float32)[:, None], [4], "Range"),
    "a fixed number of rows": (lambda x: tf.broadcast_to(x[:, :1], [3, 4]) + x, [4], "fixes the number of rows"),
    "rows repeated": (lambda x: tf.tile(x, [2, 1]), [4], "repeats the batch"),
    "rows added": (lambda x: tf.pad(x, [[0, 1], [0, 0]]), [4], "adds rows"),
    # Not the same in each run.
    "noise in a function that is called": (lambda x: x + not_inlined(tf.ones([1, 4])), [4], ""),
    # Operations that nothing is known of.
    "the old selection": (lambda x: raw.Select(condition=x[:, 0] > 0, x=x, y=-x), [4], "Select"),
    "rows sorted": (lambda x: tf.sort(x, axis=0), [4], ""),
    "rows left out": (lambda x: tf.boolean_mask(x, x[:, 0] > 0), [4], ""),
    "rows in blocks": (
        lambda x: tf.space_to_batch(x[:, :, None, None], [2, 1], [[0, 0], [0, 0]])[..., 0],
        [4],
        "parts of rows",
    ),
    "a response normalised": (lambda x: tf.nn.lrn(x[:, None, None]), [4], "LRN"),
    "a sequence reversed": (
        lambda x: tf.reverse_sequence(x, [1, 1, 1, 1], seq_axis=0, batch_axis=1),
        [4],
        "ReverseSequence",
    ),
}


def made_up(x):
    rows = tf.one_hot(tf.cast(x[:, 0], tf.int32), tf.shape(x)[1])
    rows.set_shape([None, 6])
    return tf.reshape(rows, [-1, 6])


# A float that becomes an index: a function of x and whether rounding may change the index.
INDICES = {
    "an input": (lambda x: lookup(tf.cast(x[:, 0], tf.int32)), False),
    "an input, shifted and scaled": (lambda x: lookup(tf.cast(tf.round(x[:, 0] * 2.0 + 1.0), tf.int64)), False),
    "the largest input": (lambda x: lookup(tf.argmax(x, 1)), False),
    "a whole number summed": (lambda x: lookup(tf.reduce_sum(tf.cast(x, tf.int32), 1)), False),
    "an input, one-hot": (lambda x: tf.one_hot(tf.cast(x, tf.int32), 3), False),
    "an input above a bound": (lambda x: lookup(tf.cast(x[:, 0] > 0.5, tf.int32)), False),
    "a sum": (lambda x: lookup(tf.cast(tf.reduce_sum(x, 1), tf.int32)), True),
    "a product": (lambda x: lookup(tf.cast(x @ tf.ones([4, 1]), tf.int32)), True),
    "a sigmoid": (lambda x: lookup(tf.cast(tf.sigmoid(x) * 8, tf.int32)), True),
    "the largest of products": (lambda x: lookup(tf.argmax(x @ tf.ones([4, 3]), 1)), True),
    "the places of the largest": (lambda x: lookup(tf.math.top_k(tf.nn.softmax(x), 2).indices), True),
    "a comparison": (lambda x: lookup(tf.cast(tf.reduce_mean(x, 1) > 0, tf.int32)), True),
    "a rounded number": (lambda x: lookup(tf.cast(tf.round(tf.exp(x)), tf.int32)), True),
    "a selection": (lambda x: lookup(tf.where(tf.exp(x) > 1, 2, 3)), True),
    "a number's text": (lambda x: lookup(tf.strings.to_hash_bucket_fast(tf.strings.as_string(tf.exp(x)), 9)), True),
    "a one-hot class": (lambda x: tf.one_hot(tf.argmax(tf.nn.softmax(x), 1), 4), True),
}


def found_by_rules(predict, shape) -> str:
    """What the rules say against a graph; "" where they let it pass. The probe has no part in it."""
    graph = Predictor(lambda x, _: [predict(*x)], [tf.TensorSpec([None, *shape], tf.float32)])
    try:
        separability._check_graph(graph.concrete, 0, 1)
    except row_kinds.Inseparable as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ATTACKS)
def test_graphs_that_look_separable_and_are_not_are_refused_by_the_rules(name):
    predict, shape, why = ATTACKS[name]
    found = found_by_rules(predict, shape)
    assert found
    assert why in found


@pytest.mark.parametrize("name", INDICES)
def test_batching_is_refused_for_an_index_that_rounding_may_change(name):
    predict, is_rounded = INDICES[name]
    found = found_by_rules(predict, [4])
    assert ("picks entries by numbers that" in found) is is_rounded
    assert bool(found) is is_rounded


@pytest.mark.parametrize("name", SEPARABLE)
def test_operations_that_keep_rows_apart_are_known(name):
    assert reason(SEPARABLE[name]) == ""


@pytest.mark.parametrize("name", INSEPARABLE)
def test_operations_that_mix_rows_are_found_by_name(name):
    predict, operation, why = INSEPARABLE[name]
    found = reason(functional(predict))
    assert found
    assert operation in found
    assert why in found


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_models_have_the_expected_result(name):
    model, *_ = formats.read(FOLDER / name / "saved_model")
    assert reason(model) == ""


def keras_reason(*layers, shape=(8, 4)) -> str:
    model = keras.Sequential([keras.layers.Input(shape), *layers])
    spec = (tf.TensorSpec([None, *shape], tf.float32), tf.TensorSpec([None], tf.float32))
    return reason(functional_model_from_keras(model, "mse", spec))


def test_dropout_and_batch_normalisation_keep_rows_apart_in_inference():
    layers = keras.layers
    assert keras_reason(layers.Flatten(), layers.Dropout(0.5), layers.BatchNormalization(), layers.Dense(2)) == ""
    assert keras_reason(layers.Conv2D(2, 2), layers.MaxPooling2D(), layers.LayerNormalization(), shape=(6, 6, 1)) == ""


def test_normalisation_by_the_batch_itself_is_found():
    @keras.saving.register_keras_serializable()
    class ByTheBatch(keras.layers.Layer):
        def call(self, x):
            return (x - tf.reduce_mean(x, axis=0)) / tf.math.reduce_std(x, axis=0)

    assert "along the batch" in keras_reason(ByTheBatch())


def test_inputs_and_predictions_need_a_batch_dimension():
    fixed = functional(lambda x: tf.reduce_sum(x, 0)[:1])
    assert reason(fixed).startswith("predictions has no batch dimension")


def test_the_probe_detects_an_error_in_the_rules(monkeypatch):
    mixed = functional(lambda x: x - tf.reduce_mean(x, 0, keepdims=True) + tf.zeros_like(x))
    monkeypatch.setattr(separability, "_check_graph", lambda *arguments: None)
    assert reason(mixed) == "predictions of a row differ between a batch and a single call"


PROBED = {
    "weights that are all zeros": (lambda x, w: x @ w + tf.reduce_mean(x @ w, 0), (4,)),
    "a batch as long as a row": (lambda x, w: swapped(x), (4,)),
    "a batch as long as a free dimension": (lambda x, w: swapped(x), (None,)),
    "a batch of one row": (lambda x, w: x * tf.cast(1 + 1 // tf.shape(x)[0], tf.float32), (4,)),
    "rows in other places": (lambda x, w: x * tf.cast(tf.range(tf.shape(x)[0]) > 5, tf.float32)[:, None], (4,)),
    "no row more or less than the other batch": (lambda x, w: tf.reshape(x, [-1, 2]), (4,)),
}


def swapped(x):
    """The rows transposed where there are as many as each is long."""
    rows, size = tf.unstack(tf.shape(x))
    return tf.cond(rows == size, lambda: tf.transpose(x), lambda: x)


@pytest.mark.parametrize("name", PROBED)
def test_the_probe_finds_rows_that_depend_on_their_batch(name, monkeypatch):
    predict, shape = PROBED[name]
    monkeypatch.setattr(separability, "_check_graph", lambda *arguments: None)
    weights = (np.zeros((4, 3)),)
    assert (
        reason(functional(predict, shape, weights)) == "predictions of a row differ between a batch and a single call"
    )


def test_a_probe_that_fails_is_a_reason_and_not_an_error(monkeypatch):
    monkeypatch.setattr(separability, "_examples", lambda *arguments: 1 / 0)
    assert reason(SEPARABLE["dense"]) == "the probe failed: ZeroDivisionError"


def test_a_model_that_refuses_random_inputs_is_not_batched():
    def picky(x):
        with tf.control_dependencies([tf.debugging.assert_less(tf.abs(x), 1e-9)]):
            return tf.identity(x)

    assert "assert_less" in reason(functional(picky))


def test_the_operator_can_disable_batching_but_cannot_force_it(tmp_path):
    for name, batching in (("no_metrics", False), ("lstm_next_word", True)):
        shutil.copytree(FOLDER / name / "saved_model", tmp_path / name)
        (tmp_path / name / "forwardpass.json").write_text(json.dumps({"batching": batching}))
    export.save_functional_model(functional(INSEPARABLE["mean over the batch"][0]), tmp_path / "mean")
    (tmp_path / "mean" / "forwardpass.json").write_text(json.dumps({"batching": True}))
    loader = TensorFlowLoader("cpu")

    def why(name: str, loader: TensorFlowLoader = loader) -> str:
        return loader.load(ModelSource(name, 1, folder=tmp_path / name)).description.unbatchable_reason

    assert why("no_metrics") == "the operator forbids it"
    assert "along the batch" in why("mean")
    assert why("lstm_next_word") == ""
    assert why("lstm_next_word", TensorFlowLoader("cpu", batching=False)) == "the operator forbids it"


def test_a_small_separable_model_gives_equal_bits_alone_and_in_a_batch():
    traced = tracing.trace(
        functional_model_from_keras(
            zoo.keras_cnn(1),
            "sparse_categorical_crossentropy",
            (tf.TensorSpec([None, 6, 6, 1], tf.float32), tf.TensorSpec([None], tf.int64)),
        )
    )
    execution = Execution(traced.functions, "/device:CPU:0")
    x, _ = zoo.keras_batch(16)

    def predict(rows):
        return execution.run(Function.PREDICT_ON_BATCH, False, [*traced.initial_weights, rows])[0]

    alone = np.concatenate([predict(x[:8]), predict(x[8:])])
    # Kernels choose their order of summing by the number of rows: float32's last bits.
    assert np.allclose(predict(x), alone, rtol=0, atol=1e-6)
