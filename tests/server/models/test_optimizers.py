"""Keras's optimizers on tensors: equal to Keras on variables, or refused by name."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire import optimizers as wire
from forwardpass.wire.errors import OptimizerNotSupported
from forwardpass_server.models.optimizers import GraphOptimizer, Probes, resolved

COSINE = {"class_name": "CosineDecay", "config": {"initial_learning_rate": 0.1, "decay_steps": 3}}

OPTIONS: list[dict[str, object]] = [
    {},
    {"weight_decay": 0.01},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5},
    {"clipvalue": 0.3},
    {"learning_rate": COSINE},
]

SPECIAL: dict[str, list[dict[str, object]]] = {
    "SGD": [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
    "Adam": [{"amsgrad": True}],
    "RMSprop": [{"momentum": 0.9, "centered": True}],
}

# The optimizers whose steps on tensors are not those of Keras on variables.
WRONG = {"ScheduleFreeAdamW"}

REQUIRED = {"Muon": {"exclude_embeddings": False}}


def text_of(class_name: str, **config: object) -> str:
    return resolved(wire.canonical({"class_name": class_name, "config": config}).text)


def test_the_table_of_the_wire_has_the_optimizers_and_schedules_of_keras():
    wrapping = {"LossScaleOptimizer", "MultiOptimizer", "OptimizerMap", "Optimizer"}
    found = {name for name, value in vars(keras.optimizers).items() if isinstance(value, type)}
    assert found - wrapping == set(wire.OPTIMIZERS)
    schedules = {name for name, value in vars(keras.optimizers.schedules).items() if isinstance(value, type)}
    assert schedules - {"LearningRateSchedule"} == set(wire.SCHEDULES)


@pytest.mark.parametrize("class_name", [name for name in wire.OPTIMIZERS if name not in WRONG])
def test_each_optimizer_takes_the_steps_of_keras(class_name):
    # Equal bits, or 4 units in the last place of the largest number: see `optimizers._PROBED_ULPS`.
    probes = Probes(lambda: None)
    for options in OPTIONS + SPECIAL.get(class_name, []):
        probes.check(text_of(class_name, **REQUIRED.get(class_name, {}), **options))


@pytest.mark.parametrize("class_name", sorted(WRONG))
def test_an_optimizer_that_comes_out_wrong_is_refused_by_name(class_name):
    with pytest.raises(OptimizerNotSupported, match=f"^optimizer: {class_name} is not supported: .* differ from those"):
        Probes(lambda: None).check(text_of(class_name))


def test_an_optimizer_is_compared_once():
    traces: list[None] = []
    probes = Probes(lambda: traces.append(None))
    for _ in range(2):
        probes.check(text_of("SGD"))
    assert len(traces) == 2


@pytest.mark.parametrize("schedule", wire.SCHEDULES)
def test_each_schedule_takes_the_steps_of_keras(schedule):
    needed = {
        "CosineDecay": {"initial_learning_rate": 0.1, "decay_steps": 3},
        "CosineDecayRestarts": {"initial_learning_rate": 0.1, "first_decay_steps": 2},
        "ExponentialDecay": {"initial_learning_rate": 0.1, "decay_steps": 3, "decay_rate": 0.5},
        "InverseTimeDecay": {"initial_learning_rate": 0.1, "decay_steps": 3, "decay_rate": 0.5},
        "PiecewiseConstantDecay": {"boundaries": [1, 2], "values": [0.1, 0.2, 0.3]},
        "PolynomialDecay": {"initial_learning_rate": 0.1, "decay_steps": 3},
    }[schedule]
    text = text_of("SGD", learning_rate={"class_name": schedule, "config": needed})
    Probes(lambda: None).check(text)
    assert GraphOptimizer(text, []).has_schedule


@pytest.mark.parametrize(
    "class_name, config, message",
    [
        ("SGD", {"typo": 1}, "optimizer.config: expected keys among learning_rate, momentum, "),
        ("SGD", {"momentum": 7.0}, "optimizer.config: `momentum` must be a float between"),
        ("SGD", {"nesterov": 1}, "optimizer.config.nesterov: expected a boolean, got 1"),
        ("SGD", {"momentum": True}, "optimizer.config.momentum: expected a number, got true"),
        ("SGD", {"momentum": [0.5]}, "optimizer.config.momentum: expected a number, got [0.5]"),
        ("Adam", {"beta_1": None}, "optimizer.config.beta_1: expected a number, got null"),
        ("SGD", {"clipnorm": 1.0, "clipvalue": 1.0}, "optimizer.config: Only one of"),
        ("SGD", {"use_ema": True}, "optimizer.config.use_ema: is not supported: "),
        ("SGD", {"gradient_accumulation_steps": 2}, "optimizer.config.gradient_accumulation_steps: is not supported: "),
        ("SGD", {"loss_scale_factor": 8.0}, "optimizer.config.loss_scale_factor: is not supported: "),
        ("Muon", {}, "optimizer.config.exclude_embeddings: is not supported: "),
        ("Muon", {"ns_steps": 10**9}, "optimizer.config.ns_steps: expected an integer from 0 to 20, got 1000000000"),
        ("SGD", {"learning_rate": {"class_name": "CosineDecay"}}, "optimizer.config.learning_rate.config: "),
        (
            "SGD",
            {"learning_rate": {"class_name": "CosineDecay", "config": {"rate": 1}}},
            "optimizer.config.learning_rate.config: expected keys among initial_learning_rate, ",
        ),
    ],
)
def test_an_option_that_keras_or_the_server_does_not_take_is_refused_by_its_place(class_name, config, message):
    with pytest.raises(OptimizerNotSupported) as caught:
        text_of(class_name, **config)
    assert str(caught.value).startswith(message)


def test_spellings_with_and_without_defaults_resolve_to_one_text():
    serialized = keras.optimizers.serialize(keras.optimizers.Adam(0.5))
    assert resolved(wire.canonical(serialized).text) == text_of("Adam") == text_of("Adam", beta_1=0.9)
    assert text_of("Adam", beta_1=0.8) != text_of("Adam")


@pytest.mark.parametrize("class_name", ["Adam", "Adafactor"])
def test_an_optimizer_takes_no_memory_for_large_weights(class_name):
    # 2**40 numbers: a variable of this size could not be allocated.
    large = tf.TensorSpec([2**20, 2**20], tf.float32, "large")
    made = GraphOptimizer(text_of(class_name), [large])
    assert made.variables[0].name == "iteration"


def test_variables_have_names_of_their_own():
    weights = [tf.TensorSpec([3, 2], tf.float32, "first"), tf.TensorSpec([2], tf.float32, "second")]
    for class_name in ("Adam", "Adafactor"):
        names = [spec.name for spec in GraphOptimizer(text_of(class_name), weights).variables]
        assert len(set(names)) == len(names) > 2
        assert "first" in " ".join(names)


def test_weights_of_other_types_keep_them():
    for dtype in ("bfloat16", "float16", "float64"):
        # Not Adam: its beta_2 of 0.999 is 1 in bfloat16, in Keras too.
        made = GraphOptimizer(text_of("SGD", momentum=0.5), [tf.TensorSpec([2], dtype, "weight")])
        ones = tf.ones([2], dtype)
        (weight,), variables = made.step(made.initial(), [ones], [ones], tf.constant(0.25))
        assert weight.dtype == dtype
        assert np.asarray(weight, np.float64).tolist() == [0.75, 0.75]
        assert [one.dtype.name for one in variables] == ["int64", dtype]
