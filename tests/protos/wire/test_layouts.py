"""Messages with a cached layout give the same results and errors as without the cache."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwardpass import v1
from forwardpass.wire import errors, layouts, messages, structures
from forwardpass.wire.limits import Limits
from forwardpass.wire.structures import Structure
from support.arrays import structures as any_structures


def request(value, name="digits", training=False, weights_id=b"") -> bytes:
    header = v1.PredictOnBatchRequest(
        model=v1.ModelSelector(name=name, version=3), training=training, weights_id=weights_id
    )
    return messages.encode(header, {"x": Structure.of(value)})


def outcome(data: bytes, kind=v1.PredictOnBatchRequest, **limits):
    """The result or the error of a message. With its own limits it is decoded without the cache."""
    try:
        header, parts = messages.decode(kind, data, **limits)
    except errors.InvalidRequest as error:
        return type(error), str(error)
    return header, {
        place: (
            part.tree,
            [
                (leaf.dtype, leaf.shape, leaf.tobytes() if leaf.dtype != object else leaf.tolist())
                for leaf in part.leaves
            ],
        )
        for place, part in parts.items()
    }


anew = functools.partial(outcome, limits=Limits())


def same(data: bytes, kind=v1.PredictOnBatchRequest) -> None:
    assert outcome(data, kind) == anew(data, kind)


@settings(max_examples=200)
@given(any_structures(), st.randoms(use_true_random=False))
def test_messages_are_decoded_equally_with_and_without_a_cached_layout(value, rng):
    before = request(value, weights_id=bytes(32))
    for _ in range(8):
        outcome(before)
        data = bytearray(before)
        for _ in range(rng.randint(0, 3)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 2, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        same(bytes(data))
        same(bytes(data[: rng.randrange(len(data) + 1)]))
        # Truncated in the middle, and padded to the same length.
        at = rng.randrange(len(data))
        same(bytes(data[at:]) + bytes(data[:at]))


@settings(max_examples=100)
@given(any_structures(), st.binary(min_size=2, max_size=60))
def test_a_header_of_any_bytes_is_read_with_a_cached_layout(value, head):
    body = messages.encode(v1.PredictOnBatchRequest(), {"x": Structure.of(value)})
    outcome(v1.PredictOnBatchRequest(weights_id=bytes(len(head) - 2)).SerializeToString() + body)
    same(head + body)


def test_a_cached_layout_gives_the_elements_of_each_message():
    for index in range(5):
        value = {"a": np.float32([[index, 1]]), "b": (np.int64(index), np.zeros((0, index), np.int8))}
        weights_id = bytes([index]) * 32
        header, parts = messages.decode(v1.PredictOnBatchRequest, request(value, weights_id=weights_id))
        assert header.weights_id == weights_id
        a, b, _ = parts["x"].leaves
        assert (a.tolist(), b.tolist()) == ([[index, 1.0]], index)
        assert not a.flags.writeable


def test_a_header_field_with_a_higher_number_than_the_structure_does_not_keep_a_layout_from_being_cached():
    header = v1.PredictOnBatchRequest(weights_id=bytes(32), allow_rounding=True)
    data = messages.encode(header, {"x": Structure.of(np.zeros(57, np.float32))})
    messages.decode(v1.PredictOnBatchRequest, data)
    layout = messages._layouts.find(v1.PredictOnBatchRequest, data)
    assert layout is not None
    assert v1.PredictOnBatchRequest.FromString(data[: layout.head_end]) == header
    same(data)
    header.allow_rounding = False
    same(messages.encode(header, {"x": Structure.of(np.zeros(57, np.float32))}))


def test_shapes_and_types_of_the_same_length_are_distinguished():
    arrays = [
        np.arange(6, dtype=np.int16).reshape(shape).astype(dtype)
        for shape in [(2, 3), (3, 2), (1, 6), (6, 1)]
        for dtype in ("int16", "float16", "uint16")
    ]
    for array in [*arrays, *reversed(arrays)]:
        _, parts = messages.decode(v1.PredictOnBatchRequest, request(array))
        (leaf,) = parts["x"].leaves
        assert (leaf.dtype, leaf.tolist()) == (array.dtype, array.tolist())


def test_an_invalid_bool_is_refused_by_leaf_name_with_a_cached_layout():
    data = request({"mask": np.bool_([True, False, True])})
    messages.decode(v1.PredictOnBatchRequest, data)
    with pytest.raises(errors.InvalidRequest, match=r"x\['mask'\]: malformed tensor: a bool that is neither 0 nor 1"):
        messages.decode(v1.PredictOnBatchRequest, data[:-1] + b"\x02")


def test_messages_with_strings_are_not_cached():
    for value in ([b"a", b"bcd"], [b"abc", b"d"], [b"", b"abcd"]):
        _, parts = messages.decode(v1.PredictOnBatchRequest, request(np.array(value, object)))
        assert parts["x"].leaves[0].tolist() == value


def test_a_structure_hidden_in_a_header_of_the_same_length_is_refused():
    hidden = messages.encode(v1.PredictOnBatchRequest(), {"x": Structure.of(np.int8(1))})
    body = messages.encode(v1.PredictOnBatchRequest(), {"x": Structure.of(np.zeros(100))})
    head = v1.PredictOnBatchRequest(weights_id=bytes(len(hidden) - 2)).SerializeToString()
    messages.decode(v1.PredictOnBatchRequest, head + body)
    with pytest.raises(errors.InvalidRequest, match="a second structure"):
        messages.decode(v1.PredictOnBatchRequest, hidden + body)


def test_a_header_field_that_covers_the_structures_is_not_read_as_structures():
    data = request(np.zeros(3), weights_id=bytes(32))
    messages.decode(v1.PredictOnBatchRequest, data)
    at = data.index(b"\x22\x20")
    swallowed = data[:at] + b"\x22" + bytes([len(data) - at - 2]) + data[at + 2 :]
    assert len(swallowed) == len(data)
    header, parts = messages.decode(v1.PredictOnBatchRequest, swallowed)
    assert parts == {}
    assert len(header.weights_id) == len(data) - at - 2


def test_a_message_of_another_type_has_another_layout():
    data = messages.encode(v1.LossRequest(), {"output": Structure.of(np.float32(1))})
    assert set(messages.decode(v1.LossRequest, data)[1]) == {"output"}
    same(data, v1.PredictOnBatchRequest)
    same(data, v1.FinalizeMetricsRequest)
    assert set(messages.decode(v1.LossRequest, data)[1]) == {"output"}


def layout(framing_bytes: int) -> layouts.Layout:
    return layouts.Layout(0, {}, [slice(0, framing_bytes)], [bytes(framing_bytes)])


def test_the_cache_is_bounded_and_drops_the_oldest_layout():
    kept = layouts.Layouts()
    for size in range(10_000):
        kept.keep(v1.LossRequest, size, layout(200))
        kept.keep(v1.LossRequest, size, layout(100))
    assert kept.find(v1.LossRequest, bytes(9_999)) is not None
    assert kept.find(v1.LossRequest, bytes(1)) is None
    assert sum(kept.find(v1.LossRequest, bytes(size)) is not None for size in range(10_000)) < 1000


@pytest.mark.parametrize("leaves, is_kept", [(10, True), (2000, False)])
def test_a_long_framing_is_not_cached(leaves, is_kept):
    pieces, _ = structures.encode(Structure.of([np.float32(index) for index in range(leaves)]))
    data = b"".join(pieces)
    part = structures.locate(data, 0, len(data), "x", Limits())
    assert (layouts.of(data, 0, {"x": part}) is not None) is is_kept
