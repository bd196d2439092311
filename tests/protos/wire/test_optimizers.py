"""Optimizers as JSON: every spelling of one optimizer has one canonical text, and a hostile one is refused by place."""

from __future__ import annotations

import json

import pytest

from forwardpass.wire import optimizers
from forwardpass.wire.errors import OptimizerNotSupported


def test_names_and_configurations_of_one_optimizer_have_the_same_text():
    spellings = [
        "sgd",
        "SGD",
        '{"class_name": "sgd"}',
        {"class_name": "SGD", "config": {}},
        {"config": {"name": "mine"}, "class_name": "SGD"},
        {"module": "keras.optimizers", "class_name": "SGD", "config": {"learning_rate": 0.5}, "registered_name": None},
    ]
    assert {optimizers.canonical(spelling).text for spelling in spellings} == {'{"class_name":"SGD","config":{}}'}


def test_the_learning_rate_is_taken_out_of_the_text():
    adam = {"class_name": "Adam", "config": {"learning_rate": 0.25, "beta_1": 0.5}}
    assert optimizers.canonical(adam) == ('{"class_name":"Adam","config":{"beta_1":0.5}}', 0.25, False)
    assert optimizers.canonical("adam").learning_rate is None


def test_a_schedule_stays_in_the_text():
    schedule = {"class_name": "CosineDecay", "config": {"decay_steps": 4, "initial_learning_rate": 0.1, "name": "x"}}
    found = optimizers.canonical({"class_name": "SGD", "config": {"learning_rate": schedule}})
    assert found.has_schedule
    assert found.learning_rate is None
    assert json.loads(found.text)["config"]["learning_rate"] == {
        "class_name": "CosineDecay",
        "config": {"decay_steps": 4, "initial_learning_rate": 0.1},
    }


def test_a_canonical_text_is_its_own_canonical_text():
    schedule = {"class_name": "PiecewiseConstantDecay", "config": {"boundaries": [1, 2], "values": [3.0, 2.0, 1.0]}}
    text = optimizers.canonical({"class_name": "Lion", "config": {"learning_rate": schedule}}).text
    assert optimizers.canonical(text).text == text


def sgd(**config: object) -> dict[str, object]:
    return {"class_name": "SGD", "config": config}


REFUSED = [
    ("lambda", "optimizer.class_name: expected one of Adadelta, "),
    ("", "optimizer.class_name: expected one of"),
    ("{", "optimizer: expected JSON: "),
    ("{" * 10_000, "optimizer: expected JSON: "),
    ('{"class_name": ' + "[" * 10_000 + "]" * 10_000 + "}", "optimizer: expected at most 16384 characters"),
    ('{"class_name": ' + "[" * 7_000 + "]" * 7_000 + "}", "optimizer"),
    ({"class_name": ["SGD"]}, "optimizer.class_name: expected one of"),
    ({"class_name": "LossScaleOptimizer"}, "optimizer.class_name: expected one of"),
    ({"class_name": "MultiOptimizer"}, "optimizer.class_name: expected one of"),
    ({"class_name": "SGD", "extra": 1}, 'optimizer: expected an object {"class_name"'),
    ({"class_name": "SGD", "module": "os"}, 'optimizer.module: expected keras.optimizers, got "os"'),
    ({"class_name": "SGD", "registered_name": "mine>Sgd"}, "optimizer.registered_name: expected null"),
    ({"class_name": "SGD", "build_config": {"x": 1}}, "optimizer.build_config: expected null"),
    ({"class_name": "SGD", "config": [1]}, "optimizer.config: expected an object, got a list of 1 items"),
    (sgd(momentum="0.9"), 'optimizer.config.momentum: expected a finite number, got "0.9"'),
    (sgd(momentum=float("nan")), "optimizer: expected finite numbers, got NaN"),
    (sgd(learning_rate=float("inf")), "optimizer: expected finite numbers, got Infinity"),
    ('{"class_name": "SGD", "config": {"learning_rate": 1e999}}', "optimizer.config.learning_rate: expected a finite"),
    ('{"class_name": "SGD", "config": {"momentum": 1e999}}', "optimizer.config.momentum: expected a finite number"),
    ('{"class_name": "SGD", "config": {"momentum": ' + "9" * 5000 + "}}", "optimizer"),
    (sgd(momentum=2**60), "optimizer.config.momentum: expected a finite number, got a larger integer"),
    (sgd(learning_rate=-0.1), "optimizer.config.learning_rate: expected a finite number that is not negative"),
    (sgd(learning_rate=True), "optimizer.config.learning_rate: expected a finite number"),
    (sgd(momentum={"class_name": "CosineDecay"}), "optimizer.config.momentum: expected a finite number, got an object"),
    (sgd(momentum=[[1.0]]), "optimizer.config.momentum[0]: expected a finite number, got a list"),
    (sgd(momentum=[0.1] * 300), "optimizer.config.momentum: expected at most 256 numbers, got 300 items"),
    (
        sgd(learning_rate={"class_name": "__lambda__", "config": {"value": ["4wEA", None, None]}}),
        "optimizer.config.learning_rate.class_name: expected one of CosineDecay, CosineDecayRestarts, "
        'ExponentialDecay, InverseTimeDecay, PiecewiseConstantDecay, PolynomialDecay, got "__lambda__"',
    ),
    (
        sgd(learning_rate={"class_name": "CosineDecay", "config": {"decay_steps": {"class_name": "Adam"}}}),
        "optimizer.config.learning_rate.config.decay_steps: expected a finite number",
    ),
    (
        sgd(learning_rate={"class_name": "CosineDecay", "module": "builtins"}),
        'optimizer.config.learning_rate.module: expected keras.optimizers, got "builtins"',
    ),
    ({"class_name": "SGD", "config": {"momentum": object()}}, "optimizer: expected JSON values: "),
]


@pytest.mark.parametrize("optimizer, message", REFUSED)
def test_anything_but_a_plain_optimizer_of_keras_is_refused_by_its_place(optimizer, message):
    with pytest.raises(OptimizerNotSupported) as caught:
        optimizers.canonical(optimizer)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "0.1", None, True])
def test_a_learning_rate_that_is_no_rate_is_refused(value):
    with pytest.raises(OptimizerNotSupported, match=r"^learning_rate: expected a finite number"):
        optimizers.check_learning_rate(value)
