"""The error catalogue: complete, and the same in client and server."""

from __future__ import annotations

import inspect
import pickle
import string
import urllib.parse

import grpc
import pytest

from forwardpass.wire import errors

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.ForwardPassError) and cls is not errors.ForwardPassError
]


def test_every_class_is_in_the_catalogue():
    assert set(errors.CATALOGUE.values()) == set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_has_a_status_and_a_sentence_of_its_own(cls):
    assert cls.status in grpc.StatusCode.__members__
    assert cls.sentence.endswith(".")
    assert [other for other in CLASSES if other.sentence == cls.sentence] == [cls]
    assert str(cls()) == cls.sentence


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_is_decoded_unchanged(cls):
    error = cls(place="x[0]", expected="float32[]", found="int8[]", request_id="ab12")
    found = errors.decode(error.status, str(error), errors.encode_detail(error))
    assert type(found) is cls
    assert str(found) == str(error) == "x[0]: expected float32[], got int8[]"
    assert (found.place, found.expected, found.found, found.request_id) == ("x[0]", "float32[]", "int8[]", "ab12")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_errors_can_be_pickled(cls):
    error = pickle.loads(pickle.dumps(cls("why", place="x")))
    assert (type(error), str(error), error.place) == (cls, "x: why", "x")


@pytest.mark.parametrize("status", list(grpc.StatusCode.__members__))
def test_a_status_without_a_detail_becomes_an_error_with_its_text(status):
    error = errors.decode(status, "as gRPC put it", None)
    assert "as gRPC put it" in str(error)
    assert status in str(error)
    assert type(error) is errors.ForwardPassError or error.status == status


def test_grpcs_error_for_a_long_message_is_recognized():
    error = errors.decode("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (5 vs. 4)", None)
    assert type(error) is errors.MessageTooLarge


def test_an_unknown_reason_falls_back_to_its_status():
    detail = errors.v1.ErrorDetail(reason="OfTheFuture", request_id="7").SerializeToString()
    error = errors.decode("UNAVAILABLE", "later", detail)
    assert type(error) is errors.ServerUnavailable
    assert error.request_id == "7"


def test_an_invalid_detail_is_ignored():
    assert type(errors.decode("NOT_FOUND", "gone", b"\xff")) is errors.ForwardPassError


@pytest.mark.parametrize(
    "cls, python",
    [
        (errors.ShapeMismatch, ValueError),
        (errors.DTypeMismatch, TypeError),
        (errors.PermissionDenied, PermissionError),
        (errors.ModelNotFound, LookupError),
        (errors.ServerUnavailable, ConnectionError),
        (errors.DeadlineExceeded, TimeoutError),
        (errors.FunctionNotAvailable, NotImplementedError),
        (errors.OutOfMemory, MemoryError),
    ],
)
def test_errors_derive_from_matching_builtin_exceptions(cls, python):
    assert issubclass(cls, python)


@pytest.mark.parametrize("text", ["x" * 20_000, "\u4e2d" * 2000, "\U0001f600" * 2000, "\n" * 5000])
def test_long_texts_are_cut_to_fit_into_a_header(text):
    error = errors.StructureMismatch(place=text, expected=text, found=text)
    # The size as gRPC counts it: percent-encoded text, base64 of bytes, and 32 bytes per entry. The limit is 8 KiB.
    header = len(urllib.parse.quote(errors.encode_message(error), safe=string.printable.strip()))
    assert header + len(errors.encode_detail(error)) * 4 / 3 + 200 < 8192
    found = errors.decode(error.status, errors.encode_message(error), errors.encode_detail(error))
    assert type(found) is errors.StructureMismatch
    assert found.expected.startswith(text[:200])
