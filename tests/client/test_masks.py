"""Predictions that carry their Keras mask."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from forwardpass_client import MaskedPredictions
from forwardpass_client.masks import masked


@pytest.fixture
def predictions() -> MaskedPredictions:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    array.flags.writeable = False
    return masked(array, np.array([True, False]))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, *(lambda a, p=p: pickle.loads(pickle.dumps(a, p)) for p in (2, 5))]
)
def test_copies_keep_the_mask(predictions, copied):
    again = copied(predictions)
    assert isinstance(again, MaskedPredictions)
    assert np.array_equal(again, predictions)
    assert np.array_equal(again.mask, [True, False])


def test_the_array_stays_read_only(predictions):
    with pytest.raises(ValueError, match="read-only"):
        predictions[0, 0] = 1


@pytest.mark.parametrize("compute", [lambda a: a * 2, np.exp, lambda a: a.mean(0), lambda a: a + a, lambda a: -a])
def test_an_array_computed_from_predictions_is_a_plain_array(predictions, compute):
    assert type(compute(predictions)) is np.ndarray


@pytest.mark.parametrize("compute", [np.sum, lambda a: a.sum(), lambda a: a.max(), lambda a: a[0, 0]])
def test_a_number_computed_from_predictions_is_a_plain_number(predictions, compute):
    assert type(compute(predictions)) is np.float32


@pytest.mark.parametrize("make", [lambda a: a[1:], lambda a: a.T, lambda a: a.reshape(3, 2), lambda a: a.copy()])
def test_a_view_has_no_mask(predictions, make):
    assert make(predictions).mask is None
    assert predictions.mask is not None
