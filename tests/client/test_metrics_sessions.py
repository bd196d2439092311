"""How a session's updates are numbered, whatever their answers are: apart from any server."""

from __future__ import annotations

import pytest

from forwardpass import v1
from forwardpass.wire import errors
from forwardpass.wire.chunks import Pieces
from forwardpass_client.call import Call
from forwardpass_client.deadlines import Deadline
from forwardpass_client.metrics_sessions import _Writer, attempts
from forwardpass_client.transfers import Pause, Unary

SESSION = b"s" * 16
ANSWER = b"answer"


class Server:
    """Answers steps with what it is told, and takes note of the updates that it was sent."""

    def __init__(self, *outcomes: object) -> None:
        self._outcomes = list(outcomes)
        self.sent: list[v1.UpdateIdentity] = []
        self.pauses: list[float] = []

    def run(self, steps):
        step = next(steps)
        try:
            while True:
                if isinstance(step, Pause):
                    self.pauses.append(step.seconds)
                    step = steps.send(None)
                    continue
                assert isinstance(step, Unary)
                request = step.request.join() if isinstance(step.request, Pieces) else step.request
                self.sent.append(v1.UpdateSessionRequest.FromString(request).update)
                outcome = self._outcomes.pop(0)
                step = steps.throw(outcome) if isinstance(outcome, BaseException) else steps.send(outcome)
        except StopIteration as stop:
            assert not self._outcomes
            return stop.value


def call(content: bytes) -> Call:
    """An update that holds these bytes, in a field that nobody knows."""
    return Call("/path", b"\xfa\x01" + bytes([len(content)]) + content, lambda data: data)


def update(writer: _Writer, content: bytes, *outcomes: object, request: Call | None = None):
    """Makes one update: what it returned and the identities that were sent for it."""
    server = Server(*outcomes)
    return server.run(writer.update(request or call(content), lambda: call(content), Deadline(None))), server.sent


@pytest.fixture
def writer() -> _Writer:
    return _Writer(SESSION)


def numbers(sent) -> list[int]:
    return [identity.sequence for identity in sent]


def test_updates_are_numbered_from_one_and_have_ids_of_their_own(writer):
    sent = [update(writer, b"same", ANSWER)[1][0] for _ in range(3)]
    assert numbers(sent) == [1, 2, 3]
    assert len({identity.update_id for identity in sent}) == 3
    assert {(identity.session_id, identity.writer_id) for identity in sent} == {(SESSION, sent[0].writer_id)}
    assert writer.updates == 3


def test_an_interrupted_update_is_retried_as_the_same_update(writer):
    answer, sent = update(writer, b"a", errors.ServerUnavailable(), errors.ModelLoading(), ANSWER)
    assert answer == ANSWER
    assert numbers(sent) == [1, 1, 1]
    assert len({identity.update_id for identity in sent}) == 1
    assert writer.updates == 1


@pytest.mark.parametrize(
    "error",
    [
        errors.DeadlineExceeded,
        errors.InternalError,
        # Of a second try, whose first may have counted.
        errors.ServerOverloaded,
        errors.OutOfMemory,
        KeyboardInterrupt,
        ValueError,
    ],
)
def test_after_any_error_the_same_update_is_recognized_and_another_one_is_distinguished(writer, error):
    with pytest.raises(error):
        update(writer, b"a", error())
    first = update(writer, b"a", ANSWER)[1]
    assert numbers(first) == [1]
    with pytest.raises(error):
        update(writer, b"b", error())
    # The one in doubt has not counted: its number is free.
    other = update(writer, b"c", ANSWER)[1]
    assert numbers(other) == [2]
    assert writer.updates == 2


def test_another_update_gets_the_next_number_if_the_one_in_doubt_has_counted(writer):
    with pytest.raises(errors.DeadlineExceeded):
        update(writer, b"a", errors.DeadlineExceeded())
    _, sent = update(writer, b"b", errors.SequenceMismatch(), ANSWER)
    assert numbers(sent) == [1, 2]
    assert writer.updates == 2


def test_several_updates_in_doubt_are_each_recognized_when_they_are_repeated(writer):
    sent = {}
    for content in (b"a", b"b", b"a"):
        server = Server(errors.DeadlineExceeded())
        with pytest.raises(errors.DeadlineExceeded):
            server.run(writer.update(call(content), lambda content=content: call(content), Deadline(None)))
        sent.setdefault(content, []).append(server.sent[0].update_id)
    assert sent[b"a"][0] == sent[b"a"][1] != sent[b"b"][0]
    _, again = update(writer, b"b", ANSWER)
    assert again[0].update_id == sent[b"b"][0]
    # With it the others are settled, for only one of a number counts.
    _, later = update(writer, b"a", ANSWER)
    assert numbers(later) == [2]
    assert later[0].update_id != sent[b"a"][0]


def test_an_update_is_the_same_with_weights_by_value_and_by_id(writer):
    by_value, by_id = call(b"weights in it"), call(b"their id")
    with pytest.raises(errors.DeadlineExceeded):
        update(writer, b"content", errors.DeadlineExceeded(), request=by_value)
    assert numbers(update(writer, b"content", ANSWER, request=by_id)[1]) == [1]
    assert writer.updates == 1


def test_a_sequence_mismatch_without_an_update_in_doubt_is_raised(writer):
    for _ in range(2):
        with pytest.raises(errors.SequenceMismatch):
            update(writer, b"a", errors.SequenceMismatch())
    assert writer.updates == 0


def test_an_update_whose_caller_stopped_waiting_is_in_doubt(writer):
    steps = writer.update(call(b"a"), lambda: call(b"a"), Deadline(None))
    first = v1.UpdateSessionRequest.FromString(next(steps).request).update
    steps.close()
    assert update(writer, b"a", ANSWER)[1] == [first]


def test_a_long_request_begins_with_its_identity_and_is_not_joined(writer):
    pieces = Pieces([b"\xfa\x01\x01", b"x"], 4)
    assert numbers(update(writer, b"x", ANSWER, request=Call("/path", pieces, lambda data: data))[1]) == [1]


def test_no_call_is_retried_after_its_deadline():
    server = Server(errors.ServerUnavailable())
    with pytest.raises(errors.ServerUnavailable):
        server.run(attempts(call(b"a"), Deadline(0.01)))
    assert server.pauses == []
