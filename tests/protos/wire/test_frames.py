"""Frames of calls and answers on a stream."""

from __future__ import annotations

import contextlib
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwardpass import v1
from forwardpass.wire import errors, fields, frames
from forwardpass.wire.chunks import CHUNK_BYTES
from forwardpass.wire.frames import Inbox, Outbox


def messages_of(outbox: Outbox) -> list[bytes]:
    found = []
    while outbox:
        found.append(outbox.next_message())
    return found


def received(messages: list[bytes], decode, inbox: Inbox | None = None):
    inbox = inbox or Inbox(2**30, 2**30)
    wholes = (inbox.take(frame) for message in messages for frame in decode(message))
    return {first.call: (first, bytes(data)) for first, data in filter(None, wholes)}


SIZES = [0, 1, 3000, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7]


@given(st.lists(st.sampled_from(SIZES), max_size=5), st.sampled_from([None, 0.25]))
@settings(max_examples=40)
def test_calls_of_any_length_are_decoded_unchanged(sizes, timeout_s):
    outbox = Outbox(answers=False)
    sent = {}
    for call, size in enumerate(sizes, 1):
        data = bytes([call]) * size
        sent[call] = ("ForwardPass", timeout_s or 0.0, data)
        outbox.put(call, frames.encode_call("ForwardPass", timeout_s, size), data)
    messages = messages_of(outbox)
    assert all(len(message) < CHUNK_BYTES + 1000 for message in messages)
    found = received(messages, frames.decode_calls)
    assert {call: (first.method, first.timeout_s, data) for call, (first, data) in found.items()} == sent


def test_many_small_calls_share_a_message():
    outbox = Outbox(answers=False)
    for call in range(100):
        outbox.put(call, frames.encode_call("Loss", None, 3), b"abc")
    (message,) = messages_of(outbox)
    assert len(received([message], frames.decode_calls)) == 100


def test_short_calls_are_sent_between_the_frames_of_a_long_one():
    outbox = Outbox(answers=False)
    outbox.put(1, frames.encode_call("Loss", None, 5 * CHUNK_BYTES), bytes(5 * CHUNK_BYTES))
    messages = [outbox.next_message()]
    outbox.put(2, frames.encode_call("Loss", None, 3), b"abc")
    messages += messages_of(outbox)
    assert 2 in received(messages[:3], frames.decode_calls)
    assert received(messages, frames.decode_calls)[1][1] == bytes(5 * CHUNK_BYTES)


def test_in_order_a_long_call_is_sent_completely_first():
    outbox = Outbox(answers=False, in_order=True)
    sizes = [3 * CHUNK_BYTES, 3, CHUNK_BYTES + 1, 0, 3, 2 * CHUNK_BYTES]
    for call, size in enumerate(sizes):
        outbox.put(call, frames.encode_call("", None, size), bytes(size))
    found = received(messages_of(outbox), frames.decode_calls)
    assert list(found) == list(range(len(sizes)))
    assert [len(data) for _, data in found.values()] == sizes


def test_answers_and_errors_are_decoded_unchanged():
    outbox = Outbox(answers=True)
    outbox.put(7, frames.encode_answer(4), b"data")
    outbox.put(8, frames.encode_error(errors.ShapeMismatch("wrong \u4e2d", place="x")))
    found = received(messages_of(outbox), frames.decode_answers)
    assert found[7][1] == b"data"
    assert found[8][0].status == 3
    with pytest.raises(errors.ShapeMismatch, match="x: wrong \u4e2d") as caught:
        frames.check(found[8][0])
    assert caught.value.place == "x"
    frames.check(found[7][0])


def test_frames_are_valid_protobuf_messages():
    outbox = Outbox(answers=False)
    outbox.put(300, frames.encode_call("Loss", 1.5, 3), b"abc")
    (message,) = messages_of(outbox)
    (frame,) = v1.PipelineRequest.FromString(message).frames
    assert frame == v1.CallFrame(call=300, method="Loss", timeout_s=1.5, size_bytes=3, data=b"abc")
    answer = v1.PipelineResponse(frames=[v1.AnswerFrame(call=5, size_bytes=2, data=b"ok")]).SerializeToString()
    assert received([answer], frames.decode_answers)[5][1] == b"ok"


def call_frame(**changes) -> v1.CallFrame:
    return v1.CallFrame(**{"call": 1, "method": "Loss", "size_bytes": 10, "data": b"abc", **changes})


@pytest.mark.parametrize(
    "pieces, error",
    [
        ([call_frame(size_bytes=2**20 + 1)], errors.MessageTooLarge),
        ([call_frame(size_bytes=2)], errors.InvalidRequest),
        ([call_frame(size_bytes=-1)], errors.MessageTooLarge),
        ([call_frame(), call_frame(data=bytes(8))], errors.InvalidRequest),
        ([call_frame(size_bytes=2**19), call_frame(call=2, size_bytes=2**19)], errors.ServerOverloaded),
    ],
    ids=["too long", "longer than said", "of negative length", "longer than said in the end", "too much in all"],
)
def test_an_invalid_call_is_refused(pieces, error):
    inbox = Inbox(2**20, 2**20 - 1)
    with pytest.raises(error):
        received([v1.PipelineRequest(frames=pieces).SerializeToString()], frames.decode_calls, inbox)


def test_a_dropped_call_releases_its_memory():
    inbox = Inbox(100, 100)
    half = v1.PipelineRequest(frames=[call_frame(size_bytes=100)]).SerializeToString()
    for _ in range(3):
        assert received([half], frames.decode_calls, inbox) == {}
        inbox.drop(1)
    assert received([half], frames.decode_calls, inbox) == {}
    inbox.clear()
    rest = [v1.PipelineRequest(frames=[call_frame(data=bytes(10))]).SerializeToString()]
    assert received(rest, frames.decode_calls, inbox)[1][1] == bytes(10)


@settings(max_examples=300)
@given(st.binary(max_size=100), st.integers(0, 100))
def test_any_bytes_are_decoded_or_refused(data, at):
    outbox = Outbox(answers=False)
    outbox.put(1, frames.encode_call("Loss", 1.0, 30), bytes(30))
    good = outbox.next_message()
    for decode, broken in itertools.product((frames.decode_calls, frames.decode_answers), (data, good[:at] + data)):
        inbox = Inbox(1000, 1000)
        with contextlib.suppress(errors.ForwardPassError):
            for frame in decode(broken):
                whole = inbox.take(frame)
                assert whole is None or len(whole[1]) == whole[0].size_bytes
        assert 0 <= inbox.size_bytes <= 1000


def outcome(read, message: bytes) -> str:
    """The frames of a message, or its error without the position."""
    try:
        return repr([frame._replace(data=bytes(frame.data)) for frame in read(message)])
    except errors.InvalidRequest as error:
        return re.sub(r"at byte \d+", "", repr(error))


def uncached(read):
    """Reads each frame with an unknown field (15) before it: no frame of this module begins so, and none is cached."""

    def read_all(message: bytes):
        for number, wire_type, _, start, end in fields.scan(message, 0, len(message)):
            if (number, wire_type) == (1, fields.LENGTH_DELIMITED):
                frame = b"\x78\x00" + message[start:end]
                yield from read(fields.prefix(1, len(frame)) + frame)

    return read_all


@settings(max_examples=300)
@given(st.sampled_from([None, 1.5]), st.integers(0, 300), st.randoms(use_true_random=False))
def test_frames_are_decoded_equally_with_and_without_the_header_cache(timeout_s, call, rng):
    calls, answers = Outbox(answers=False), Outbox(answers=True)
    for number in range(call, call + 3):
        calls.put(number, frames.encode_call("Loss", timeout_s, 30), bytes(30))
        answers.put(number, frames.encode_answer(30), bytes(30))
    for outbox, read in ((calls, frames.decode_calls), (answers, frames.decode_answers)):
        data = bytearray(outbox.next_message())
        assert outcome(read, bytes(data)) == outcome(uncached(read), bytes(data))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 8, 0x19, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        assert outcome(read, bytes(data)) == outcome(uncached(read), bytes(data))


@pytest.mark.parametrize(
    "frame",
    [
        v1.CallFrame(call=7, method="Loss", size_bytes=30, data=bytes(30)).SerializeToString() + b"\x08\x09",
        v1.CallFrame(call=7, method="Loss", data=bytes(30)).SerializeToString() + b"\x19" + bytes(8),
        b"\x08\x07" + v1.CallFrame(call=8, timeout_s=2.0, data=bytes(30)).SerializeToString(),
        b"\x08\x07" + b"\x19" + bytes(8) + b"\x19" + bytes(7) + b"\x40" + v1.CallFrame(data=b"a").SerializeToString(),
    ],
    ids=["number twice", "timeout behind the data", "number and timeout twice", "timeout twice"],
)
def test_the_last_of_a_repeated_field_of_a_frame_counts(frame):
    message = fields.prefix(1, len(frame)) + frame
    for _ in range(3):
        (found,) = frames.decode_calls(message)
        expected = v1.PipelineRequest.FromString(message).frames[0]
        assert (found.call, found.timeout_s, found.method, bytes(found.data)) == (
            expected.call,
            expected.timeout_s,
            expected.method,
            expected.data,
        )


def test_statuses_are_at_the_index_of_their_code():
    import grpc

    assert {name: number for number, name in enumerate(frames.STATUSES)} == {
        code.name: code.value[0] for code in grpc.StatusCode
    }
