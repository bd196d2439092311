"""The table of functions agrees with the .proto files."""

from __future__ import annotations

import copy
import pickle

import pytest

from forwardpass import v1
from forwardpass.wire.description import BatchOutput
from forwardpass.wire.functions import MASKS_OF, METRICS_FUNCTIONS, Function
from forwardpass.wire.methods import METHODS, MODEL_SERVICE, SERVICES


def has(message, place: str) -> bool:
    """Whether a message has a structure at this place, such as `batch_input.x`."""
    descriptor = message.DESCRIPTOR
    for name in place.split("."):
        if descriptor is None or name not in descriptor.fields_by_name:
            return False
        descriptor = descriptor.fields_by_name[name].message_type
    # A state is a message of its own, which holds one structure.
    return descriptor in (v1.Structure.DESCRIPTOR, v1.MetricsState.DESCRIPTOR)


@pytest.mark.parametrize("function", Function, ids=lambda function: function.name)
def test_every_row_matches_the_messages_of_its_rpc(function):
    method = METHODS[function.signature.method]
    assert method.name in SERVICES[MODEL_SERVICE]
    assert all(has(method.request, place) for place in function.signature.arguments)
    assert all(has(method.response, place) for place in function.signature.results)
    assert function.has_training == ("training" in method.request.DESCRIPTOR.fields_by_name)


def test_every_function_of_the_protocol_has_a_row_and_a_name_of_its_own():
    assert {function.value for function in Function} == set(v1.Function.values()) - {0}
    assert [v1.Function.Name(function.value) for function in Function] == [f"FUNCTION_{one.name}" for one in Function]
    assert len({function.title for function in Function}) == len(Function)


def test_every_structure_of_a_request_is_an_argument_of_some_function():
    for name in {function.signature.method for function in Function}:
        named = {place for one in Function if one.signature.method == name for place in one.signature.arguments}
        for field in METHODS[name].request.DESCRIPTOR.fields:
            if field.message_type is v1.Structure.DESCRIPTOR:
                assert field.name in named


def test_functions_of_one_rpc_are_distinguished_by_sample_weights():
    assert Function.LOSS.variants == (Function.LOSS, Function.WEIGHTED_LOSS)
    assert Function.LOSS.with_sample_weight is Function.WEIGHTED_LOSS
    assert Function.WEIGHTED_LOSS.with_sample_weight is Function.WEIGHTED_LOSS
    assert Function.UPDATE_METRICS_STATE.with_sample_weight is Function.WEIGHTED_UPDATE_METRICS_STATE
    with pytest.raises(LookupError, match="forward_pass does not take sample weights"):
        _ = Function.FORWARD_PASS.with_sample_weight
    for function in Function:
        assert len({one.takes_sample_weight for one in function.variants}) == len(function.variants)


def test_metrics_functions_are_the_functions_of_the_metrics_state():
    assert [function.title for function in METRICS_FUNCTIONS] == [
        "initialize_metrics_state",
        "update_metrics_state",
        "update_metrics_state with sample_weight",
        "finalize_metrics",
    ]


def test_each_mask_is_in_the_same_row_as_its_predictions():
    for function in Function:
        for places in (function.signature.arguments, function.signature.results):
            assert all(MASKS_OF[place] in places for place in places if place in MASKS_OF)
            assert not [place for place in places if "mask" in place and place not in MASKS_OF]


def test_a_batch_output_has_the_fields_of_the_tuple_and_a_mask():
    assert Function.FORWARD_PASS.signature.results == tuple(
        f"batch_output.{name}" for name in (*BatchOutput._fields, "prediction_mask")
    )


@pytest.mark.parametrize("function", Function, ids=lambda function: function.name)
def test_a_function_can_be_pickled_and_copied(function):
    assert pickle.loads(pickle.dumps(function)) is copy.deepcopy(function) is Function(function.value) is function
