"""What an update begins with."""

from __future__ import annotations

import dataclasses

import pytest

from forwardpass.wire import errors
from forwardpass_server.training import starts
from forwardpass_server.training.starts import Start

START = Start(
    name="digits",
    version=0,
    label="",
    weights_id=bytes(32),
    optimizer="sgd",
    learning_rate=0.1,
    proximal=0.0,
    trainable=(),
    optimizer_state_id=b"",
    weighted=False,
    checkpoint_steps=0,
    keep_optimizer_state=False,
    checkpoint_sequence=0,
    start_weights_id=b"",
)

SCHEDULE = (
    '{"class_name":"SGD","config":{"learning_rate":{"class_name":"ExponentialDecay",'
    '"config":{"decay_rate":0.9,"decay_steps":10,"initial_learning_rate":0.1}},"momentum":0.9}}'
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learning_rate": None},
        {"learning_rate": 0.0, "proximal": 3e38},
        {"checkpoint_sequence": 5, "optimizer_state_id": bytes(32), "start_weights_id": bytes(32)},
    ],
)
def test_a_start_that_can_be_is_accepted(changes):
    dataclasses.replace(START, **changes).check()


@pytest.mark.parametrize(
    "changes, place",
    [
        ({"weights_id": b"short"}, "start.weights_id"),
        ({"optimizer_state_id": b"short"}, "start.optimizer_state_id"),
        ({"start_weights_id": b"short"}, "start.start_weights_id"),
        ({"checkpoint_steps": -1}, "start.checkpoint_steps"),
        ({"checkpoint_steps": 2**60}, "start.checkpoint_steps"),
        ({"checkpoint_sequence": -1}, "start.checkpoint_sequence"),
        ({"checkpoint_sequence": 1}, "start.optimizer_state_id"),
        ({"learning_rate": float("nan")}, "start.learning_rate"),
        ({"learning_rate": 1e39}, "start.learning_rate"),
        ({"proximal": float("inf")}, "start.proximal"),
        ({"proximal": -1e-9}, "start.proximal"),
    ],
)
def test_a_start_that_cannot_be_is_refused_by_its_place(changes, place):
    with pytest.raises(errors.InvalidRequest) as caught:
        dataclasses.replace(START, **changes).check()
    assert caught.value.place == place


def test_a_learning_rate_replaces_that_of_the_optimizer():
    own = '{"class_name":"SGD","config":{"learning_rate":0.5,"momentum":0.9}}'
    plain = '{"class_name":"SGD","config":{"momentum":0.9}}'
    assert starts.optimizer(own, None) == (starts.Optimizer(plain, 0.5))
    assert starts.optimizer(own, 0.1) == starts.Optimizer(plain, 0.1)
    assert starts.optimizer(SCHEDULE, 0.1) == starts.Optimizer(plain, 0.1)
    assert starts.optimizer(SCHEDULE, None) == starts.Optimizer(SCHEDULE, 0.0)
    with pytest.raises(errors.InvalidRequest, match=r"start\.learning_rate: expected a number"):
        starts.optimizer(plain, None)
    with pytest.raises(errors.InvalidRequest, match=r"start\.learning_rate: expected a number from 0"):
        starts.optimizer('{"class_name":"SGD","config":{"learning_rate":1e200}}', None)


def test_a_mask_names_each_leaf_or_none():
    assert starts.mask((), 3) == starts.mask((True,) * 3, 3) == ()
    assert starts.mask((True, False, True), 3) == (True, False, True)
    for mask in ((True,), (True,) * 4, (False,) * 3):
        with pytest.raises(errors.InvalidRequest, match=r"start\.trainable: expected"):
            starts.mask(mask, 3)
