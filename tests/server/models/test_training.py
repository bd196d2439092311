"""Optimizer steps as graphs, against Keras's train_on_batch on the same weights and batches."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire import errors
from forwardpass.wire import optimizers as wire
from forwardpass.wire.functions import Function
from forwardpass_server import FunctionalModel, functional_model_from_keras
from forwardpass_server.calls.model import TrainingOptions
from forwardpass_server.models import formats, probing, tracing
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.optimizers import resolved
from forwardpass_server.models.training import GraphTrainer, TrainableModel
from support import golden

DEVICE = "/device:CPU:0"
RATE = 0.125
STEPS = 5


def mlp() -> keras.Model:
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, "relu", kernel_regularizer="l2"), keras.layers.Dense(3)]
    )


def cnn() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Reshape((3, 2, 1)),
            keras.layers.Conv2D(4, 2, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=3),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def functional(model: keras.Model, metrics: Any = None, **options: Any) -> FunctionalModel:
    return functional_model_from_keras(
        model, LOSS, (tf.TensorSpec([None, 6]), tf.TensorSpec([None], tf.int64)), metrics, **options
    )


def trainable(model: FunctionalModel) -> tuple[TrainableModel, Sequence[Any]]:
    traced = tracing.trace(model)
    return TrainableModel.of(traced, Execution(traced.functions, DEVICE), DEVICE), traced.initial_weights


def trainer_of(model: TrainableModel, optimizer: Any = "sgd", **options: Any) -> GraphTrainer:
    text = resolved(wire.canonical(optimizer).text)
    return GraphTrainer(model, text, TrainingOptions(optimizer=text, **options), lambda: None)


def batches(count: int = STEPS, rows: int = 4) -> list[list[Any]]:
    rng = np.random.default_rng(1)
    return [[rng.normal(size=(rows, 6)).astype(np.float32), rng.integers(0, 3, rows)] for _ in range(count)]


def weighted_batches() -> list[list[Any]]:
    rng = np.random.default_rng(2)
    return [[*batch, rng.uniform(0, 2, 4).astype(np.float32)] for batch in batches()]


def trained(
    trainer: GraphTrainer, weights: Sequence[Any], given: list[list[Any]], rate: float = RATE, proximal: float = 0.0
) -> Any:
    state = trainer.begin(weights)
    start = list(state)
    for batch in given:
        state = trainer.step(state, batch, rate, proximal, start)
    return state


def arrays(leaves: Sequence[Any]) -> list[Any]:
    return [np.array(leaf) for leaf in leaves]


def assert_close(found: Sequence[Any], expected: Sequence[Any], tolerance: float = 2e-6) -> None:
    """tolerance: relative to the largest number.

    The bits are equal where this was written. On another CPU, TensorFlow may fuse other operations in Keras's graph
    than in ours.
    """
    assert len(found) == len(expected)
    for one, other in zip(arrays(found), arrays(expected), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        largest = np.max(np.abs(other.astype(np.float64)), initial=1e-3)
        assert np.max(np.abs(one.astype(np.float64) - other.astype(np.float64)), initial=0) <= tolerance * largest


def by_keras(
    model: keras.Model, optimizer: Any, weights: Sequence[Any], given: list[list[Any]]
) -> tuple[list[Any], float]:
    """The weights, trainable ones first, and the mean loss of the batches, by train_on_batch."""
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    for variable, weight in zip(variables, weights, strict=True):
        variable.assign(weight)
    model.compile(loss=LOSS, optimizer=optimizer)
    losses = [float(model.train_on_batch(x, y)) for x, y in given]
    return [np.array(variable) for variable in variables], float(np.mean(losses))


COSINE = keras.optimizers.schedules.serialize(keras.optimizers.schedules.CosineDecay(RATE, 4))


def sgd(**config: Any) -> dict[str, Any]:
    return {"class_name": "SGD", "config": config}


@pytest.fixture(scope="module", params=[mlp, cnn], ids=["mlp", "cnn"])
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], keras.Model], TrainableModel, Sequence[Any]]:
    """How to make a Keras model, the model on the server, and its initial weights."""
    keras.utils.set_random_seed(7)
    return (request.param, *trainable(functional(request.param())))


@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd",
        sgd(momentum=0.9, nesterov=True),
        sgd(momentum=0.9, weight_decay=0.01, global_clipnorm=0.5),
        sgd(clipvalue=0.05),
        sgd(learning_rate=COSINE, clipnorm=0.3),
        "adam",
    ],
    ids=str,
)
def test_steps_are_those_of_train_on_batch(case, optimizer):
    make, model, weights = case
    state = trained(trainer := trainer_of(model, optimizer), weights, batches())
    local = keras.optimizers.get(copy.deepcopy(optimizer))
    if not trainer.has_schedule:
        local.learning_rate = RATE
    expected, loss = by_keras(make(), local, weights, batches())
    assert_close(trainer.weights(state), expected)
    totals = trainer.totals(state)
    assert (totals.num_examples, totals.num_steps, totals.metrics) == (4 * STEPS, STEPS, ())
    # Keras sums in float32.
    assert totals.loss / totals.num_examples == pytest.approx(loss, rel=1e-5)


def test_sample_weights_count_in_the_loss_and_the_metrics():
    keras.utils.set_random_seed(7)
    model, weights = trainable(functional(mlp(), lambda: keras.metrics.SparseCategoricalAccuracy(name="accuracy")))
    trainer = trainer_of(model, weighted=True)
    state = trained(trainer, weights, weighted_batches())
    local = mlp()
    variables = [*local.trainable_variables, *local.non_trainable_variables]
    for variable, weight in zip(variables, weights, strict=True):
        variable.assign(weight)
    local.compile(
        loss=LOSS,
        optimizer=keras.optimizers.SGD(RATE),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    x, y, sample_weight = (np.concatenate(parts) for parts in zip(*weighted_batches(), strict=True))
    logs = local.fit(x, y, 4, sample_weight=sample_weight, shuffle=False, verbose=0).history
    assert_close(trainer.weights(state), variables)
    totals = trainer.totals(state)
    assert float(totals.metrics[0]) == pytest.approx(logs["accuracy"][0], rel=1e-6)
    # Keras sums in float32.
    assert totals.loss / totals.num_examples == pytest.approx(logs["loss"][0], rel=1e-5)


def test_frozen_leaves_are_those_of_a_layer_that_is_not_trainable():
    keras.utils.set_random_seed(7)
    model, weights = trainable(functional(mlp()))
    optimizer = sgd(momentum=0.9, weight_decay=0.1, global_clipnorm=0.1)
    trainer = trainer_of(model, optimizer, trainable=(False, False, True, True))
    state = trained(trainer, weights, batches())
    local = mlp()
    variables = list(local.trainable_variables)
    for variable, weight in zip(variables, weights, strict=True):
        variable.assign(weight)
    local.layers[0].trainable = False
    keras_optimizer = keras.optimizers.get(copy.deepcopy(optimizer))
    keras_optimizer.learning_rate = RATE
    local.compile(loss=LOSS, optimizer=keras_optimizer)
    for x, y in batches():
        local.train_on_batch(x, y)
    assert_close(trainer.weights(state), variables)
    for one, other in zip(trainer.weights(state)[:2], weights[:2], strict=True):
        assert np.array_equal(one, other)
    assert [name for name in trainer.state_spec.named_child("optimizer").tree.names if "trainable_0" in name] == []


def test_a_model_with_all_leaves_frozen_keeps_them():
    model, weights = trainable(functional(mlp()))
    trainer = trainer_of(model, trainable=(False,) * 4)
    state = trained(trainer, weights, batches())
    assert all(map(np.array_equal, trainer.weights(state), weights))
    assert trainer.totals(state).num_steps == STEPS


def test_the_proximal_term_is_added_to_the_gradients_before_they_are_clipped():
    model, weights = trainable(linear())
    trainer = trainer_of(model, sgd(clipvalue=0.5), proximal=True)
    state = trained(trainer, weights, LINEAR, proximal=0.75)
    weight = start = np.float64(weights[0])
    for x, y in LINEAR:
        gradient = np.mean(2 * (x * weight - y) * x) + 0.75 * (weight - start)
        weight = weight - RATE * np.clip(gradient, -0.5, 0.5)
    # The server computes in float32.
    assert np.asarray(trainer.weights(state)[0]) == pytest.approx(weight, rel=1e-5)
    without = trained(trainer, weights, LINEAR, proximal=0.0)
    plain = trained(trainer_of(model, sgd(clipvalue=0.5)), weights, LINEAR)
    assert np.array_equal(without[0], plain[0])
    assert not np.array_equal(without[0], state[0])


LINEAR = [[np.float32([1, 2, -1]) / scale, np.float32([3, 1, 2])] for scale in (1, 2, 4, 8)]


def linear(dtype: str = "float32", extra: Sequence[Any] = (), shape: tuple[int, ...] = ()) -> FunctionalModel:
    """Predicts x times a weight. extra: trainable leaves that it does not use."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool = True) -> Any:
        return tf.cast(x, dtype) * model_weights[0][0]

    numpy_dtype = tf.as_dtype(dtype).as_numpy_dtype
    return FunctionalModel(
        initial_weights=((np.full(shape, 0.5, numpy_dtype), *extra), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(tf.square(output - tf.cast(label, dtype))),
        input_spec=(tf.TensorSpec([None]), tf.TensorSpec([None])),
    )


def test_leaves_without_gradients_do_not_change():
    extra = (np.int32(3), np.array([b"text"], object), np.float32([1, 2]))
    model, weights = trainable(linear(extra=extra))
    trainer = trainer_of(model, {"class_name": "AdamW", "config": {"weight_decay": 0.5}})
    state = trained(trainer, weights, LINEAR)
    found = arrays(trainer.weights(state))
    assert [leaf.tolist() for leaf in found[1:]] == [3, [b"text"], [1, 2]]
    assert found[0] != weights[0]


def test_keras_skips_a_weight_that_the_loss_does_not_reach_too():
    class Unused(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.unused = self.add_weight(shape=(2,), initializer="ones")
            super().build(shape)

        def call(self, x: Any) -> Any:
            return x

    def make() -> keras.Model:
        return keras.Sequential([keras.Input((6,)), Unused(), keras.layers.Dense(3)])

    keras.utils.set_random_seed(7)
    model, weights = trainable(functional(make()))
    trainer = trainer_of(model, sgd(momentum=0.9, weight_decay=0.5))
    local = keras.optimizers.SGD(RATE, momentum=0.9, weight_decay=0.5)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        expected, _ = by_keras(make(), local, weights, batches())
    state = trained(trainer, weights, batches())
    assert_close(trainer.weights(state), expected)
    assert np.asarray(trainer.weights(state)[0]).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_of_other_types_keep_them(dtype):
    model, weights = trainable(linear(dtype, shape=(1,)))
    state = trained(trainer := trainer_of(model, sgd(momentum=0.5)), weights, LINEAR)
    (weight,) = arrays(trainer.weights(state))
    assert weight.dtype.name == dtype
    assert float(weight[0]) != 0.5


def test_complex_weights_are_refused_by_their_place():
    model, _ = trainable(linear(extra=(np.complex64(1),)))
    # The loss does not depend on it: it stays as it is.
    trainer_of(model)

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool = True) -> Any:
        return x * tf.math.real(model_weights[0][0])

    complex_model = FunctionalModel(
        initial_weights=((np.complex64(1),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(tf.square(output - label)),
        input_spec=(tf.TensorSpec([None]), tf.TensorSpec([None])),
    )
    with pytest.raises(errors.OptimizerNotSupported, match=r"^model_weights.trainable\[0\]: expected real weights"):
        trainer_of(trainable(complex_model)[0])


def test_a_mask_of_another_length_is_refused():
    model, _ = trainable(linear())
    with pytest.raises(errors.StructureMismatch, match=r"^trainable: expected 1 booleans, got 2$"):
        trainer_of(model, trainable=(True, False))


def test_training_with_sample_weights_needs_a_weighted_loss():
    model, _ = trainable(functional(mlp()))
    without = TrainableModel(model.spec, model.execution, {False: model.updates[False]}, model.unreached, DEVICE)
    with pytest.raises(errors.FunctionNotAvailable, match="cannot be trained with sample weights"):
        trainer_of(without, weighted=True)


def test_a_saved_state_continues_as_if_there_had_been_no_break():
    keras.utils.set_random_seed(7)
    model, weights = trainable(functional(cnn(), lambda: keras.metrics.SparseCategoricalAccuracy()))
    trainer = trainer_of(model, "adam")
    whole = trained(trainer, weights, batches())
    half = trained(trainer, weights, batches()[:2])
    saved = arrays(trainer.saved(half))
    assert trainer.state_spec.tree.names == ("optimizer", "metrics", "totals")
    for leaf, spec in zip(saved, trainer.state_spec.leaves, strict=True):
        assert (leaf.shape, leaf.dtype) == (spec.shape, spec.dtype)
    state = trainer.restored(arrays(trainer.weights(half)), saved, with_totals=True)
    for batch in batches()[2:]:
        state = trainer.step(state, batch, RATE, 0.0, ())
    assert [leaf.tobytes() for leaf in arrays(state)] == [leaf.tobytes() for leaf in arrays(whole)]
    assert trainer.totals(state) == trainer.totals(whole)
    fresh = trainer.restored(arrays(trainer.weights(half)), saved, with_totals=False)
    assert trainer.totals(fresh)[:3] == (0, 0, 0)
    count = len(trainer.state_spec.named_child("optimizer").leaves)
    for one, other in zip(trainer.saved(fresh)[:count], saved[:count], strict=True):
        assert np.array_equal(one, other)


def test_the_same_inputs_give_the_same_bits_and_a_state_is_never_changed():
    keras.utils.set_random_seed(7)
    model, weights = trainable(functional(cnn()))
    trainer = trainer_of(model, "adam")
    first = trainer.begin(weights)
    before = [leaf.tobytes() for leaf in arrays(first)]
    one, other = trained(trainer, weights, batches()), trained(trainer, weights, batches())
    trainer.step(first, batches()[0], RATE, 0.0, ())
    assert [leaf.tobytes() for leaf in arrays(one)] == [leaf.tobytes() for leaf in arrays(other)]
    assert [leaf.tobytes() for leaf in arrays(first)] == before
    assert trainer.state_bytes == sum(leaf.nbytes for leaf in arrays(first))


def test_an_update_without_batches_has_the_weights_of_its_start():
    model, weights = trainable(functional(mlp(), lambda: keras.metrics.SparseCategoricalAccuracy()))
    trainer = trainer_of(model)
    state = trainer.begin(weights)
    assert all(map(np.array_equal, trainer.weights(state), weights))
    assert trainer.totals(state)[:3] == (0, 0, 0)


def test_a_batch_that_the_graph_refuses_leaves_the_state_as_it_was():
    model, weights = trainable(functional(mlp()))
    trainer = trainer_of(model)
    state = trainer.begin(weights)
    with pytest.raises(errors.ModelRefusedInput):
        trainer.step(state, [np.zeros((2, 6), np.float32), np.zeros(3, np.int64)], RATE, 0.0, ())
    assert trainer.totals(trainer.step(state, batches()[0], RATE, 0.0, ())).num_steps == 1


def test_other_structures_of_weights_and_batches_are_trained():
    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool = True) -> Any:
        return x["a"] * model_weights[0]["w"] + model_weights[1]["c"]

    model = FunctionalModel(
        initial_weights=({"w": np.float32(1)}, {"c": np.float32(2)}),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        input_spec=collections.OrderedDict(y=tf.TensorSpec([None]), x={"a": tf.TensorSpec([None])}),
    )
    built, weights = trainable(model)
    trainer = trainer_of(built)
    state = trained(trainer, weights, [[np.float32([1, 2]), np.float32([0, 0])]], rate=1.0)
    # The gradient of the sum of x * w is the sum of x.
    assert [float(leaf) for leaf in trainer.weights(state)] == [-2, 2]


@pytest.mark.parametrize("name", ["keras_cnn_emnist", "linear_regression_v052", "dict_inputs"])
def test_models_saved_by_tff_take_steps_along_their_gradients(name):
    # What forward_backward returns is compared with TFF's own gradients in test_gradients.
    model, _, _ = formats.read(golden.Golden(name).saved_model)
    built, weights = trainable(model)
    places = built.spec.weights_places
    num_trainable = len(places["model_weights.trainable"].leaves)
    rng = np.random.default_rng(0)
    batch = [probing.random(with_rows(leaf), 1, rng) for leaf in (*built.spec.x.leaves, *built.spec.y.leaves)]
    trainer = trainer_of(built, sgd(momentum=0.5))
    state, expected = trainer.begin(weights), arrays(weights)
    velocities = [np.zeros_like(leaf) for leaf in expected[:num_trainable]]
    rate = 2.0**-10
    for _ in range(3):
        found = built.execution.run(Function.FORWARD_BACKWARD, True, [*expected, *batch])
        gradients = found[len(found) - len(built.spec.gradients.leaves) :]
        for index, gradient in enumerate(gradients):
            velocities[index] = np.float32(0.5) * velocities[index] - np.float32(rate) * gradient
            expected[index] = expected[index] + velocities[index]
        state = trainer.step(state, batch, rate, 0.0, ())
    assert_close(trainer.weights(state), expected)
    assert trainer.totals(state).num_steps == 3


def with_rows(leaf: Any) -> Any:
    return dataclasses.replace(leaf, shape=tuple(4 if dim is None else dim for dim in leaf.shape))
