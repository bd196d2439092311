"""Functional models as graphs of flat tensors."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire import errors
from forwardpass.wire.description import Function
from forwardpass_server import FunctionalModel
from forwardpass_server.models import graphs, tracing
from support import zoo

X = tf.TensorSpec([None, 2], tf.float32)
Y = tf.TensorSpec([None], tf.float32)


def model(predict=None, loss=None, **changes) -> FunctionalModel:
    @tf.function
    def plain(model_weights, x, training):
        return tf.linalg.matvec(x, model_weights[0][0])

    arguments = {
        "initial_weights": ((np.float32([1, 2]),), ()),
        "predict_on_batch_fn": predict or plain,
        "loss_fn": loss or (lambda output, label, sample_weight=None: tf.reduce_mean((output - label) ** 2)),
        "input_spec": (X, Y),
    }
    return FunctionalModel(**{**arguments, **changes})


def test_every_function_is_traced_once():
    traces = []
    traced = tracing.trace(zoo.structures(), lambda: traces.append(1))
    # A forward pass of its own takes no sample weights.
    assert set(traced.spec.unavailable) == {Function.WEIGHTED_FORWARD_BACKWARD}
    available = [function for function in Function if function not in traced.spec.unavailable]
    assert len(traced.functions) == sum(2 if function.has_training else 1 for function in available)
    # One attempt for each that is not available.
    assert len(traces) == len(traced.functions) + len(traced.updates) + len(traced.spec.unavailable)


def test_flat_results_are_those_of_the_model():
    structured = zoo.structures()
    traced = tracing.trace(structured)
    spec = traced.spec
    x, y = zoo.structures_batch(3)
    leaves = [*traced.initial_weights, x["b"], *x["a"], y["label"]]
    found = traced.functions[Function.FORWARD_PASS, True](*map(tf.constant, leaves))
    expected = structured.forward_pass(structured.initial_weights, {"x": x, "y": y}, True)
    for leaf, value in zip(
        found, [expected.loss, expected.predictions["z"], expected.predictions["a"], expected.num_examples], strict=True
    ):
        assert np.array_equal(leaf, value)
    assert [str(leaf) for leaf in spec.batch_output.leaves] == [
        "float32[]",
        "float32[None,3]",
        "int64[None]",
        "int32[]",
    ]


def test_containers_keep_kind_names_and_order():
    spec = tracing.trace(zoo.structures()).spec
    assert spec.predictions.tree.describe() == "{'scores': Scores(zeta=*, alpha=*), 'list': [*, None, (*,)]}"
    assert spec.weights.tree.describe() == "(({'w': *}, [*, *]), [*])"
    assert spec.input.tree.describe() == "OrderedDict({'y': {'label': *}, 'x': {'b': *, 'a': (*, *)}})"
    assert spec.metrics_state.tree.describe() == "OrderedDict({'total': [*], 'count': Scores(zeta=*, alpha=*)})"


def test_python_numbers_in_weights_are_converted_as_by_tensorflow():
    @tf.function
    def predict(model_weights, x, training):
        return x * model_weights[0][0] + tf.cast(model_weights[1][0], tf.float32)

    traced = tracing.trace(model(predict, initial_weights=((1.5,), (2,))))
    assert [str(leaf) for leaf in traced.spec.weights.leaves] == ["float32[]", "int32[]"]
    assert [(weight.dtype, weight.item()) for weight in traced.initial_weights] == [(np.float32, 1.5), (np.int32, 2)]


def test_results_for_training_and_inference_share_a_spec():
    @tf.function
    def predict(model_weights, x, training):
        return tf.ones([3 if training else 4]) * tf.reduce_sum(x)

    assert tracing.trace(model(predict, lambda *_: tf.constant(0.0))).spec.predictions.leaves[0].shape == (None,)


def test_results_of_other_containers_for_training_are_refused():
    @tf.function
    def predict(model_weights, x, training):
        return (x,) if training else x

    with pytest.raises(errors.StructureMismatch, match=r"predict_on_batch: expected \(\*,\), got \*"):
        tracing.trace(model(predict, lambda *_: tf.constant(0.0)))


def test_a_loss_without_sample_weights_does_not_affect_other_functions():
    def loss(output, label, sample_weight=None):
        if sample_weight is not None:
            raise ValueError("weights are beyond me")
        return tf.reduce_mean((output - label) ** 2)

    spec = tracing.trace(model(loss=loss)).spec
    reason = "the model's own code raised ValueError; see the server's log"
    assert spec.unavailable == {Function.WEIGHTED_LOSS: reason, Function.WEIGHTED_FORWARD_BACKWARD: reason}


def test_captured_variables_are_refused_because_callers_cannot_pass_them_as_weights():
    hidden = tf.Variable(2.0, name="hidden")

    @tf.function
    def predict(model_weights, x, training):
        return tf.linalg.matvec(x, model_weights[0][0]) * hidden

    with pytest.raises(errors.StructureMismatch, match=r"predict_on_batch: .*captured variables \['hidden:0'\]"):
        tracing.trace(model(predict))


def test_captured_tables_and_constants_are_kept():
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant(["a", "b"]), tf.constant([1.0, 2.0])), -1.0
    )

    @tf.function
    def predict(model_weights, x, training):
        return table.lookup(x) * model_weights[0][0][0]

    traced = tracing.trace(model(predict, input_spec=(tf.TensorSpec([None], tf.string), Y)))
    from forwardpass_server.models.execution import Execution

    execution = Execution(traced.functions, "/device:CPU:0")
    words = np.array([b"b", b"zz"], object)
    (found,) = execution.run(Function.PREDICT_ON_BATCH, False, [np.float32([3, 0]), words])
    assert found.tolist() == [6, -3]


@pytest.mark.parametrize(
    "spec", [tf.RaggedTensorSpec([None, None]), tf.SparseTensorSpec([None, 2])], ids=["ragged", "sparse"]
)
def test_inputs_that_are_no_dense_tensors_are_refused(spec):
    with pytest.raises(errors.StructureMismatch, match=r"input_spec.*: expected a dense tensor, got (Ragged|Sparse)"):
        tracing.trace(model(input_spec=(spec, Y)))


def test_a_ragged_result_is_refused():
    @tf.function
    def predict(model_weights, x, training):
        return tf.RaggedTensor.from_row_splits(x[:, 0], [0, 1])

    with pytest.raises(errors.StructureMismatch, match="predict_on_batch: expected a dense tensor, got RaggedTensor"):
        tracing.trace(model(predict))


def test_weights_that_are_not_a_pair_are_refused():
    with pytest.raises(errors.StructureMismatch, match=r"expected a pair \(trainable, non_trainable\)"):
        tracing.trace(model(initial_weights=(np.float32([1, 2]),)))


def metrics(initialize, update):
    return initialize, update, tf.function(lambda state: state)


def test_a_state_that_grows_gets_a_spec_that_admits_it():
    initialize = tf.function(lambda: collections.OrderedDict(seen=tf.zeros([0])))

    @tf.function
    def update(state, labels, batch_output, sample_weight=None):
        return collections.OrderedDict(seen=tf.concat([state["seen"], labels], 0))

    spec = tracing.trace(model(metrics_fns=metrics(initialize, update))).spec
    assert [str(leaf) for leaf in spec.metrics_state.leaves] == ["float32[None]"]


def test_a_state_returned_as_a_tuple_is_accepted_for_a_list():
    initialize = tf.function(lambda: [tf.constant(0.0)])
    update = tf.function(lambda state, labels, batch_output, sample_weight=None: (state[0] + 1,))
    assert tracing.trace(model(metrics_fns=metrics(initialize, update))).spec.metrics_state.tree.describe() == "[*]"


def test_a_state_returned_as_another_structure_is_refused():
    initialize = tf.function(lambda: [tf.constant(0.0)])
    update = tf.function(lambda state, labels, batch_output, sample_weight=None: {"a": state[0]})
    with pytest.raises(errors.StructureMismatch, match="update_metrics_state: expected a list of 1"):
        tracing.trace(model(metrics_fns=metrics(initialize, update)))


def test_fields_of_the_batch_output_that_an_update_reads_are_found():
    initialize = tf.function(lambda: tf.constant(0.0))

    @tf.function
    def inner(state, loss, predictions):
        return state + tf.identity(loss)

    @tf.function
    def update(state, labels, batch_output, sample_weight=None):
        return inner(state, batch_output.loss, batch_output.predictions)

    spec = tracing.trace(model(metrics_fns=metrics(initialize, update))).spec
    assert spec.unused_batch_output_fields == {"predictions", "num_examples"}


def test_unused_arguments_are_found_through_calls_and_returned_ones_are_used():
    @tf.function
    def inner(a, b):
        return a * 2.0

    @tf.function(autograph=False)
    def outer(a, b, c, d):
        return inner(a, b), tf.identity(c)

    concrete = outer.get_concrete_function(*[tf.TensorSpec([], tf.float32)] * 4)
    assert graphs.unused_arguments(concrete) == {1, 3}
