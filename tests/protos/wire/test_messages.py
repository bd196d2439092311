"""Whole requests and responses, compared with protobuf's own parser."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwardpass import v1
from forwardpass.wire import errors, messages, trees
from forwardpass.wire.methods import MODEL_SERVICE, SERVICES, SESSION_SERVICE
from forwardpass.wire.structures import Structure
from support.arrays import same_bits, structures

MESSAGE_TYPES = [
    *(
        kind
        for service in (MODEL_SERVICE, SESSION_SERVICE)
        for method in SERVICES[service].values()
        for kind in (method.request, method.response)
        if method.is_unary
    ),
    # Sent in frames, on a stream.
    v1.EvaluationBatch,
]

STRUCTURES = {
    "ForwardPassRequest": ["model_weights.trainable", "model_weights.non_trainable", "batch_input.x", "batch_input.y"],
    "ForwardPassResponse": ["batch_output.loss", "batch_output.predictions", "batch_output.num_examples"],
    "PredictOnBatchRequest": ["model_weights.trainable", "model_weights.non_trainable", "x"],
    "PredictOnBatchResponse": ["predictions"],
    "ForwardBackwardRequest": [
        "model_weights.trainable",
        "model_weights.non_trainable",
        "batch_input.x",
        "batch_input.y",
        "sample_weight",
    ],
    "ForwardBackwardResponse": [
        "batch_output.loss",
        "batch_output.predictions",
        "batch_output.num_examples",
        "gradients",
    ],
    "VjpRequest": ["model_weights.trainable", "model_weights.non_trainable", "x", "cotangents"],
    "VjpResponse": ["weights_cotangents", "x_cotangents"],
    "LossRequest": ["output", "label", "sample_weight"],
    "LossResponse": ["loss"],
    "InitializeMetricsStateRequest": [],
    "InitializeMetricsStateResponse": ["state"],
    "UpdateMetricsStateRequest": [
        "state",
        "labels",
        "batch_output.loss",
        "batch_output.predictions",
        "batch_output.num_examples",
        "sample_weight",
    ],
    "UpdateMetricsStateResponse": ["state"],
    "FinalizeMetricsRequest": ["state"],
    "FinalizeMetricsResponse": ["metrics"],
    "GetModelRequest": [],
    "GetModelResponse": [],
    "ListModelsRequest": [],
    "ListModelsResponse": [],
    "GetInitialWeightsRequest": [],
    "GetInitialWeightsResponse": ["model_weights.trainable", "model_weights.non_trainable"],
    "OpenSessionRequest": ["initial_state"],
    "OpenSessionResponse": [],
    "UpdateSessionRequest": [
        "labels",
        "batch_output.loss",
        "batch_output.predictions",
        "batch_output.num_examples",
        "sample_weight",
    ],
    "UpdateSessionResponse": [],
    "ForwardPassInSessionRequest": [
        "model_weights.trainable",
        "model_weights.non_trainable",
        "batch_input.x",
        "batch_input.y",
        "sample_weight",
    ],
    "ForwardPassInSessionResponse": ["batch_output.loss", "batch_output.predictions", "batch_output.num_examples"],
    "MergeIntoSessionRequest": ["state"],
    "MergeIntoSessionResponse": [],
    "GetSessionStateRequest": [],
    "GetSessionStateResponse": ["state"],
    "GetSessionResultRequest": [],
    "GetSessionResultResponse": ["metrics"],
    "CloseSessionRequest": [],
    "CloseSessionResponse": [],
    "EvaluationBatch": ["batch_input.x", "batch_input.y", "sample_weight"],
}


def header(kind):
    message = kind()
    field = kind.DESCRIPTOR.fields_by_name.get("model")
    if field is not None and field.message_type.name in ("ModelSelector", "ModelIdentity"):
        message.model.name, message.model.version = "digits", 3
    return message


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda kind: kind.DESCRIPTOR.name)
def test_the_places_of_structures_are_read_from_the_descriptor(kind):
    # STRUCTURES leaves masks out.
    places = {place for place in messages.places(kind) if not place.endswith("mask")}
    assert places == set(STRUCTURES[kind.DESCRIPTOR.name])


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda kind: kind.DESCRIPTOR.name)
def test_every_message_is_decoded_with_its_header_and_structures(kind):
    places = STRUCTURES[kind.DESCRIPTOR.name]
    parts = {place: Structure.of((np.float32([index]), None)) for index, place in enumerate(places)}
    data = messages.encode(header(kind), parts)
    found_header, found = messages.decode(kind, data)
    assert found_header == header(kind)
    assert list(found) == places
    for place in places:
        assert found[place].tree == parts[place].tree
        assert same_bits(found[place].leaves[0], parts[place].leaves[0])
    # protobuf parses the message and serializes it to the same message.
    assert messages.decode(kind, kind.FromString(data).SerializeToString())[1].keys() == found.keys()


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda kind: kind.DESCRIPTOR.name)
def test_structures_may_be_absent(kind):
    assert messages.decode(kind, messages.encode(header(kind), {})) == (header(kind), {})


def test_a_message_over_the_limit_is_refused_before_it_is_joined():
    header = v1.PredictOnBatchResponse(model=v1.ModelIdentity(name="m"))
    parts = {"predictions": Structure.of(np.zeros(2**18, np.float32))}
    with pytest.raises(errors.MessageTooLarge, match="PredictOnBatchResponse: expected at most 1000 bytes, got 10486"):
        messages.encode(header, parts, 1000)


@settings(max_examples=30)
@given(structures(), st.booleans())
def test_fields_may_come_in_any_order(value, training):
    head = v1.PredictOnBatchRequest(training=training, model=v1.ModelSelector(name="m")).SerializeToString()
    body = messages.encode(v1.PredictOnBatchRequest(), {"x": Structure.of(value)})
    found, parts = messages.decode(v1.PredictOnBatchRequest, body + head)
    assert (found.training, found.model.name) == (training, "m")
    assert parts["x"].tree == trees.flatten(value)[0]


def test_a_message_field_in_two_parts_is_merged():
    weights = {f"model_weights.{name}": Structure.of((np.int8(1),)) for name in ("trainable", "non_trainable")}
    pieces = b"".join(messages.encode(v1.ForwardPassRequest(), {place: part}) for place, part in weights.items())
    assert set(messages.decode(v1.ForwardPassRequest, pieces)[1]) == set(weights)


HOSTILE = {
    "one structure twice": messages.encode(v1.PredictOnBatchRequest(), {"x": Structure.of(np.int8(1))}) * 2,
    "a structure as a varint": b"\x28\x01",
    "a header that is no message": b"\x0a\x02\xff\xff",
    "a name that is no UTF-8": b"\x0a\x04\x0a\x02\xff\xfe",
    "a field cut off": messages.encode(v1.PredictOnBatchRequest(), {"x": Structure.of(np.int8(1))})[:-1],
    "a length of 2**63": b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_bytes_that_are_not_a_message_are_refused(data):
    with pytest.raises(errors.InvalidRequest):
        messages.decode(v1.PredictOnBatchRequest, data)


@pytest.mark.parametrize("name", ["m" * length for length in range(1, 9)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex128])
def test_long_arrays_are_aligned_in_the_message(name, dtype):
    weights = Structure.of((np.ones(700, dtype), np.ones((3, 50_000), dtype), np.ones(3, dtype), np.ones(900, dtype)))
    parts = {
        "model_weights.trainable": weights,
        "model_weights.non_trainable": Structure.of(()),
        "batch_input.x": Structure.of(np.ones((32, 28, 28, 1), dtype)),
        "batch_input.y": Structure.of(np.ones(3, np.int64)),
    }
    header = v1.ForwardBackwardRequest(model=v1.ModelSelector(name=name, version=1))
    data = messages.encode(header, parts)
    _, found = messages.decode(v1.ForwardBackwardRequest, data)
    for place, structure in parts.items():
        for leaf, expected in zip(found[place].leaves, structure.leaves, strict=True):
            assert same_bits(leaf, expected)
            assert expected.nbytes < 1024 or leaf.flags.aligned
    # Other readers skip the padding.
    other = v1.ForwardBackwardRequest.FromString(data).model_weights.trainable.leaves
    assert [one.data for one in other] == [leaf.tobytes() for leaf in weights.leaves]
    assert all(not any(one.padding) for one in other)
