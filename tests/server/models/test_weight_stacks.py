"""Predictions for several sets of weights at once, against single calls."""

from __future__ import annotations

import signal
import threading
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire.errors import ModelRefusedInput
from forwardpass.wire.functions import Function
from forwardpass_server import FunctionalModel, functional_model_from_keras
from forwardpass_server.calls.model import CannotVectorize
from forwardpass_server.models import examples, formats, tracing, weight_stacks
from forwardpass_server.models.examples import Shape
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.placement import CPU, TensorFlowDevice
from forwardpass_server.models.trial import Trial
from forwardpass_server.models.trial_process import TrialProcess
from forwardpass_server.models.weight_stacks import GraphSource, Probed, WeightStacks
from support import golden

layers = keras.layers
DEVICE = TensorFlowDevice(CPU)

# Sums of float32 in another order, relative to the largest number.
TOLERANCE = 3e-6

SETS = (2, 7, 64)
ROWS = (1, 5, 33)


class Model:
    """A traced model, its variants, and several sets of weights for it."""

    def __init__(self, model: FunctionalModel, trial: Trial | None = None) -> None:
        traced = tracing.trace(model, without_gradients="not wanted")
        self.spec, self.weights = traced.spec, traced.initial_weights
        self.execution = Execution(traced.functions, CPU)
        self.found = examples.find(self.execution, self.spec, self.weights)
        source = GraphSource.of(traced.functions[Function.PREDICT_ON_BATCH, False])
        self.stacks = WeightStacks(source, Probed(self.execution, self.found, self.weights, trial, CPU))

    def sets(self, count: int, differing: list[bool]) -> list[list[Any]]:
        """Placed sets of weights that share the leaves which do not differ."""
        rng = np.random.default_rng(count)
        shared = [DEVICE.place(np.asarray(weight)) for weight in self.weights]
        return [
            [
                DEVICE.place(np.asarray(weight + (rng.random(weight.shape) / 4).astype(weight.dtype)))
                if differs and weight.dtype.kind in "fVc"
                else placed
                for weight, placed, differs in zip(self.weights, shared, differing, strict=True)
            ]
            for _ in range(count)
        ]

    def batches(self, count: int, rows: int) -> list[list[np.ndarray]]:
        rng = np.random.default_rng(rows)
        return [self.found.x(rng, Shape(rows, self.found.shape.other)) for _ in range(count)]

    def single(self, sets: list[list[Any]], batches: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        run = self.execution.run
        return [run(Function.PREDICT_ON_BATCH, False, [*weights, *x]) for weights, x in zip(sets, batches, strict=True)]


def check(model: Model, differing: list[bool]) -> None:
    """Compares every number of sets and rows with single calls."""
    variant = model.stacks.get(differing)
    for count in SETS:
        sets = model.sets(count, differing)
        weights = variant.stack(sets)
        for rows in ROWS:
            batches = model.batches(count, rows)
            found = variant.run(weights, [np.stack(leaves) for leaves in zip(*batches, strict=True)])
            for index, expected in enumerate(model.single(sets, batches)):
                for leaf, other in zip(found, expected, strict=True):
                    assert leaf.shape == (count, *other.shape)
                    assert leaf.dtype == other.dtype
                    if other.dtype.kind in "fVc":
                        scale = np.abs(other.astype(np.complex128)).max(initial=1e-6)
                        difference = np.abs(leaf[index].astype(np.complex128) - other.astype(np.complex128))
                        assert difference.max(initial=0) <= TOLERANCE * scale, (count, rows)
                    else:
                        np.testing.assert_array_equal(leaf[index], other)


def differing_of(model: Model, which: str) -> list[bool]:
    """All leaves, the first one, the last trainable ones, or each second one."""
    count = len(model.weights)
    trainable = len(model.spec.weights.child(0).leaves)
    return {
        "all": [True] * count,
        "first": [index == 0 for index in range(count)],
        "last": [trainable - 2 <= index < trainable for index in range(count)],
        "alternating": [index % 2 == 0 for index in range(count)],
    }[which]


@pytest.mark.parametrize("which", ["all", "first", "last", "alternating"])
@pytest.mark.parametrize("name", golden.NAMES)
def test_models_saved_by_tff(name, which):
    model = Model(formats.read(golden.Golden(name).saved_model, {})[0])
    differing = differing_of(model, which)
    if not any(differing):
        pytest.fail("every fixture has weights")
    check(model, differing)


def _lstm() -> keras.Model:
    return keras.Sequential(
        [keras.Input((None,), dtype="int32"), layers.Embedding(20, 8, mask_zero=True), layers.LSTM(8), layers.Dense(3)]
    )


def _transformer() -> keras.Model:
    words = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(20, 8)(words)
    hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(2, 4)(hidden, hidden))
    hidden = layers.LayerNormalization()(hidden + layers.Dense(8)(layers.Dense(16, "relu")(hidden)))
    return keras.Model(words, layers.Dense(3)(hidden))


def _convolutions() -> keras.Model:
    image = keras.Input((8, 8, 3))
    hidden = layers.BatchNormalization()(layers.Conv2D(4, 3, strides=2)(image))
    hidden = layers.DepthwiseConv2D(3, padding="same", activation="relu")(hidden)
    hidden = layers.SeparableConv2D(4, 3, padding="same")(hidden)
    return keras.Model(image, layers.Dense(2)(layers.GlobalMaxPooling2D()(hidden)))


def _several_outputs() -> keras.Model:
    one, other = keras.Input((4,), name="one"), keras.Input((2,), name="other")
    hidden = layers.Dense(5, "gelu")(layers.Concatenate()([one, other]))
    return keras.Model({"one": one, "other": other}, {"a": layers.Dense(2)(hidden), "b": layers.Softmax()(hidden)})


KERAS = {
    "LSTM with masks": _lstm,
    "transformer": _transformer,
    "convolutions": _convolutions,
    "several outputs": _several_outputs,
}


def of_keras(network: keras.Model) -> FunctionalModel:
    inputs = network.input if len(network.inputs) > 1 else network.inputs[0]
    x = tf.nest.map_structure(lambda one: tf.TensorSpec([None, *one.shape[1:]], one.dtype), inputs)
    outputs = network.output if len(network.outputs) > 1 else network.outputs[0]
    y = tf.nest.map_structure(lambda one: tf.TensorSpec([None, *one.shape[1:]], one.dtype), outputs)
    return functional_model_from_keras(network, keras.losses.MeanSquaredError(), (x, y))


@pytest.fixture(scope="module")
def keras_models():
    keras.utils.set_random_seed(0)
    return {name: Model(of_keras(build())) for name, build in KERAS.items()}


@pytest.mark.parametrize("which", ["all", "first", "last", "alternating"])
@pytest.mark.parametrize("name", KERAS)
def test_keras_models(keras_models, name, which):
    check(keras_models[name], differing_of(keras_models[name], which))


def test_the_probe_finds_equal_bits_and_rounding(keras_models):
    for name, model in keras_models.items():
        variant = model.stacks.get([True] * len(model.weights))
        assert 0 <= variant.difference <= TOLERANCE, name
    # One product of small integers has no rounding.
    exact = Model(of_function(lambda weights, x: tf.round(weights) + x))
    assert exact.stacks.get([True]).difference == 0
    assert str(exact.stacks.judged(allows_rounding=False)) == "yes, with equal bits"


def of_function(predict: Any, weight: Any = (1, 2, 3), loss: Any = None) -> FunctionalModel:
    """A model with one weight, whose predictions are computed by a function."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        return predict(model_weights[0][0], x)

    return FunctionalModel(
        initial_weights=((np.float32(weight),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss or (lambda output, label, sample_weight=None: tf.reduce_mean(output)),
        input_spec=(tf.TensorSpec([None, 3]), tf.TensorSpec([None])),
    )


def test_what_depends_on_shared_weights_only_is_computed_once():
    """The product with the shared matrix has no dimension of sets in the graph."""
    network = keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False), layers.Dense(2, use_bias=False)])
    traced = tracing.trace(of_keras(network), without_gradients="not wanted")
    source = GraphSource.of(traced.functions[Function.PREDICT_ON_BATCH, False])
    concrete = weight_stacks.vectorized(source, [False, True, False])
    ranks = [
        operation.outputs[0].shape.rank
        for operation in concrete.graph.get_operations()
        if operation.type in ("MatMul", "BatchMatMulV2")
    ]
    assert ranks == [2, 3]


def _random(weights: Any, x: Any) -> Any:
    return x + weights * tf.random.normal(tf.shape(x))


def _numpy(weights: Any, x: Any) -> Any:
    return tf.ensure_shape(tf.numpy_function(lambda a, b: a + b, [weights, x], tf.float32), x.shape)


def _batch_size_by_weights(weights: Any, x: Any) -> Any:
    """Each set would have predictions of another shape."""
    return tf.boolean_mask(tf.tile(x[:, :1], [1, 3]), tf.ensure_shape(weights, [3]) > 1.5, axis=1)


@pytest.mark.parametrize(
    "predict, reason",
    [(_random, "RandomStandardNormal"), (_numpy, "PyFunc"), (_batch_size_by_weights, "refuses what")],
    ids=["random", "python", "shapes"],
)
def test_models_that_cannot_be_vectorized(predict, reason):
    model = Model(of_function(predict, (1.3, 1.4, 1.45)))
    with pytest.raises(CannotVectorize, match=reason):
        model.stacks.get([True])
    with pytest.raises(CannotVectorize, match=reason):  # The reason is remembered.
        model.stacks.get([True])
    described = str(model.stacks.judged(allows_rounding=True))
    assert described.startswith("no: ")
    assert reason in described


def test_a_model_without_differing_leaves_is_refused():
    with pytest.raises(CannotVectorize, match="no weights"):
        Model(of_function(lambda weights, x: x)).stacks.get([False])


def test_there_is_a_limit_of_variants(monkeypatch, keras_models):
    monkeypatch.setattr(weight_stacks, "_MAX_VARIANTS", 1)
    model = Model(of_keras(keras.Sequential([keras.Input((4,)), layers.Dense(2)])))
    model.stacks.get([True, True])
    with pytest.raises(CannotVectorize, match="other combinations"):
        model.stacks.get([True, False])
    model.stacks.get([True, True])


def test_a_variant_is_tried_in_the_child_process():
    process = TrialProcess(1)
    try:
        model = Model(of_keras(keras.Sequential([keras.Input((4,)), layers.Dense(2)])), Trial(process))
        check(model, [True, True])
        assert process.ask(60, "run", "variant", True, [np.zeros((2, 5, 4), np.float32)])[0] == "results"
    finally:
        process.close()


def test_a_variant_that_ends_the_child_process_is_refused():
    class Crashing(TrialProcess):
        """A child process that gets a fatal signal before it runs its first call."""

        def ask(self, timeout_s: float, *message: Any, may_restart: bool = False) -> Any:
            if message[0] == "run":
                assert self._process is not None
                self._process.send_signal(signal.SIGSTOP)
                threading.Timer(0.2, self._process.send_signal, [signal.SIGSEGV]).start()
                threading.Timer(0.4, self._process.send_signal, [signal.SIGCONT]).start()
            return super().ask(timeout_s, *message, may_restart=may_restart)

    process = Crashing(1)
    try:
        model = Model(of_keras(keras.Sequential([keras.Input((4,)), layers.Dense(2)])), Trial(process))
        with pytest.raises(CannotVectorize, match="SIGSEGV"):
            model.stacks.get([True, True])
    finally:
        process.close()


def test_bad_rows_are_refused_as_by_single_calls(keras_models):
    model = keras_models["transformer"]
    differing = [True] * len(model.weights)
    variant = model.stacks.get(differing)
    sets = model.sets(2, differing)
    with pytest.raises(ModelRefusedInput):
        variant.run(variant.stack(sets), [np.full((2, 1, 6), 99, np.int32)])
