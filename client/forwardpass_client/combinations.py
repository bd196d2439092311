"""Linear combinations of weights that a server holds: requests from handles, handles from answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from forwardpass import v1
from forwardpass.wire import errors, fields
from forwardpass.wire.methods import METHODS
from forwardpass_client import retries
from forwardpass_client.calls import check_handle
from forwardpass_client.deadlines import Deadline
from forwardpass_client.held_weights import HeldWeights, SeveralHeldWeights
from forwardpass_client.transfers import Steps, Unary
from forwardpass_client.weights_handles import WeightsHandleApi

Term = tuple[WeightsHandleApi, float]
"""A handle and its coefficient."""


Integers = Literal["equal", "first"]
"""Where leaves of integers, booleans and strings come from: they are equal in all terms, or those of the first term."""


def combine(
    terms: Sequence[Term],
    float64: bool,
    integers: Integers,
    handle: Callable[[HeldWeights], WeightsHandleApi],
    deadline: Deadline,
) -> Steps:
    """The steps that sum weights, each multiplied by its coefficient: the handle of the result.

    terms: at least one. handle: makes the handle.
    Raises TypeError for a `float64` that is no bool, ValueError for other `integers`.
    """
    if not isinstance(float64, bool):
        raise TypeError(f"float64: expected True or False, got {float64!r}")
    if integers not in ("equal", "first"):
        raise ValueError(f"integers: expected 'equal' or 'first', got {integers!r}")
    held = [one.held for one, _ in terms]
    request = v1.CombineWeightsRequest(
        terms=[
            v1.WeightsTerm(weights_id=one.weights_id, coefficient=coefficient)
            for one, (_, coefficient) in zip(held, terms, strict=True)
        ],
        float64=float64,
        integers_of_first=integers == "first",
    )

    attempt = Unary(METHODS["CombineWeights"].path, request.SerializeToString())
    return _combine(retries.attempts(attempt, SeveralHeldWeights(held), deadline), handle)


def _combine(attempts: Steps, handle: Callable[[HeldWeights], WeightsHandleApi]) -> Steps:
    answer = yield from attempts
    return handle(HeldWeights(fields.parse(v1.CombineWeightsResponse, answer).weights_id))


def terms_of(terms: Iterable[Any]) -> list[Term]:
    """The terms of a sum, checked.

    Raises TypeError or ValueError for terms that are not pairs of a handle and a finite number, and for none.
    """
    found = []
    for index, term in enumerate(_each(terms, "terms")):
        place = f"terms[{index}]"
        one, number = _pair(term, f"{place}: expected a pair of a handle and a coefficient")
        found.append((_handle(one, place), _number(number, f"{place}: the coefficient")))
    if not found:
        raise ValueError("terms: expected at least one pair of a handle and a coefficient, got none")
    return found


def average_terms(results: Iterable[Any]) -> list[Term]:
    """The terms of an average that weights each result by its number of examples.

    results: objects with `weights` (a handle) and `num_examples`, or pairs of these.
    Raises TypeError for other results, ValueError for negative numbers and for no examples in total.
    """
    pairs = []
    for index, result in enumerate(_each(results, "results")):
        place = f"results[{index}]"
        one, number = (
            (result.weights, result.num_examples)
            if hasattr(result, "weights") and hasattr(result, "num_examples")
            else _pair(result, f"{place}: expected an object with weights and num_examples, or a pair of them")
        )
        examples = _number(number, f"{place}: num_examples")
        if examples < 0:
            raise ValueError(f"{place}: num_examples: expected a number >= 0, got {number!r}")
        pairs.append((_handle(one, place), examples))
    total = math.fsum(examples for _, examples in pairs)
    if not total:
        raise ValueError(f"results: expected at least one example in total, got 0 in {len(pairs)} results")
    # Results without examples have no influence.
    return [(one, examples / total) for one, examples in pairs if examples]


def _each(items: Iterable[Any], place: str) -> Iterable[Any]:
    if isinstance(items, (str, bytes, WeightsHandleApi)) or not isinstance(items, Iterable):
        raise TypeError(f"{place}: expected a list with one entry for each set of weights, got {type(items).__name__}")
    return items


def _pair(item: Any, expectation: str) -> tuple[Any, Any]:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(f"{expectation}, got {type(item).__name__}")
    return item[0], item[1]


def _handle(value: Any, place: str) -> WeightsHandleApi:
    try:
        return check_handle(value, place)
    except errors.StructureMismatch as error:
        raise TypeError(f"{place}: expected a handle, got {error.found.replace('model.', 'client.')}") from None


def _number(value: Any, what: str) -> float:
    """Raises TypeError for another type than a real number, ValueError for one that is not finite."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{what}: expected a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what}: expected a number, got {type(value).__name__}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what}: expected a finite number, got {value!r}")
    return number
