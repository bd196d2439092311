"""The arguments of combinations and averages: what is wrong is refused before anything is sent."""

from __future__ import annotations

import types
from fractions import Fraction

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import combinations

ID = "ab" * 32


@pytest.fixture(scope="module")
def client():
    with forwardpass_client.connect("localhost:1") as client:
        yield client


@pytest.fixture(scope="module")
def handle(client):
    return client.weights_handle(ID)


def test_terms_are_pairs_of_a_handle_and_any_real_number(handle):
    numbers = [1, 0.5, np.float32(2), np.array(3), Fraction(1, 4), -0.0]
    found = combinations.terms_of([(handle, number) for number in numbers])
    assert [number for _, number in found] == [1, 0.5, 2, 3, 0.25, 0]
    assert all(one is handle for one, _ in found)
    assert combinations.terms_of(iter([[handle, 1]])) == [(handle, 1.0)]


@pytest.mark.parametrize(
    "terms, error, sentence",
    [
        (lambda h: [], ValueError, "terms: expected at least one pair of a handle and a coefficient, got none"),
        (lambda h: h, TypeError, "terms: expected a list with one entry for each set of weights, got WeightsHandle"),
        (lambda h: [h], TypeError, "terms[0]: expected a pair of a handle and a coefficient, got WeightsHandle"),
        (lambda h: [(h, 1), (h,)], TypeError, "terms[1]: expected a pair of a handle and a coefficient, got tuple"),
        (
            lambda h: [(ID, 1)],
            TypeError,
            "terms[0]: expected a handle, got str: for the id of weights, pass client.weights_handle(id)",
        ),
        (lambda h: [(h, "1")], TypeError, "terms[0]: the coefficient: expected a number, got '1'"),
        (lambda h: [(h, True)], TypeError, "terms[0]: the coefficient: expected a number, got True"),
        (lambda h: [(h, 1j)], TypeError, "terms[0]: the coefficient: expected a number, got complex"),
        (lambda h: [(h, float("nan"))], ValueError, "terms[0]: the coefficient: expected a finite number, got nan"),
        (lambda h: [(h, 10**400)], ValueError, "terms[0]: the coefficient: expected a finite number, got 1"),
    ],
)
def test_other_terms_are_refused(client, handle, terms, error, sentence):
    with pytest.raises(error) as raised:
        client.combine(terms(handle))
    assert str(raised.value).startswith(sentence)


def test_float64_must_be_a_bool(client, handle):
    with pytest.raises(TypeError, match="float64: expected True or False, got 'yes'"):
        client.combine([(handle, 1)], float64="yes")


@pytest.mark.parametrize("integers", ["last", None, True])
def test_integers_are_equal_or_of_the_first(client, handle, integers):
    with pytest.raises(ValueError, match="integers: expected 'equal' or 'first', got "):
        client.combine([(handle, 1)], integers=integers)


def test_an_average_takes_results_and_pairs_and_leaves_out_those_without_examples(handle):
    result = types.SimpleNamespace(weights=handle, num_examples=np.int64(3))
    found = combinations.average_terms([result, (handle, 1), (handle, 0)])
    assert found == [(handle, 0.75), (handle, 0.25)]


@pytest.mark.parametrize(
    "results, error, sentence",
    [
        (lambda h: [], ValueError, "results: expected at least one example in total, got 0 in 0 results"),
        (lambda h: [(h, 0)], ValueError, "results: expected at least one example in total, got 0 in 1 results"),
        (lambda h: [(h, 1), (h, -1)], ValueError, "results[1]: num_examples: expected a number >= 0, got -1"),
        (
            lambda h: [h],
            TypeError,
            "results[0]: expected an object with weights and num_examples, or a pair of them, got WeightsHandle",
        ),
        (lambda h: [(h, None)], TypeError, "results[0]: num_examples: expected a number, got NoneType"),
        (lambda h: [((1, 2), 3)], TypeError, "results[0]: expected a handle of put_weights or weights_handle, got"),
    ],
)
def test_other_results_are_refused(handle, results, error, sentence):
    with pytest.raises(error) as raised:
        combinations.average_terms(results(handle))
    assert str(raised.value).startswith(sentence)
