"""What goes in several steps: what is done when the connection breaks, without one."""

from __future__ import annotations

import time

import numpy as np
import pytest

from forwardpass import v1
from forwardpass.wire import chunks, errors, manifests
from forwardpass.wire.structures import Structure
from forwardpass_client import long_calls, retries, transfers
from forwardpass_client.deadlines import Deadline
from forwardpass_client.transfers import Exchange, Pause, Receive, Send, Unary

WEIGHTS = Structure.of(((np.arange(100, dtype=np.float32),), ()))
MANIFEST = manifests.of_structure(WEIGHTS, "w")
(TENSOR,) = MANIFEST.tensors


@pytest.fixture
def clock(monkeypatch):
    """Moves the time by hand."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def missing(received: int) -> bytes:
    entry = v1.MissingTensor(digest=TENSOR.digest, received_bytes=received)
    return v1.PutWeightsResponse(weights_id=MANIFEST.weights_id, missing=[entry]).SerializeToString()


def test_an_upload_that_is_interrupted_late_is_resumed(clock):
    steps = transfers.put(MANIFEST, WEIGHTS, Deadline(None))
    assert isinstance(next(steps), Unary)
    assert isinstance(steps.send(missing(0)), Send)
    clock(600)
    assert isinstance(steps.throw(errors.ServerUnavailable()), Pause)
    assert isinstance(next(steps), Unary)
    sending = steps.send(missing(200))
    assert isinstance(sending, Send)
    (request,) = sending.requests
    header, data = chunks.decode(v1.UploadTensorsRequest, request)
    assert (header.offset, len(data)) == (200, 200)


def test_a_download_that_is_interrupted_late_is_resumed(clock):
    steps = transfers.get(MANIFEST.weights_id, Deadline(None))
    next(steps)
    response = v1.DescribeWeightsResponse(manifest=manifests.encode(MANIFEST)).SerializeToString()
    receiving = steps.send(response)
    assert isinstance(receiving, Receive)
    data = WEIGHTS.leaves[0].tobytes()
    receiving.take(v1.DownloadTensorResponse(data=data[:200]).SerializeToString())
    clock(600)
    assert isinstance(steps.throw(errors.ServerUnavailable()), Pause)
    receiving = next(steps)
    assert v1.DownloadTensorRequest.FromString(receiving.request).offset == 200
    receiving.take(v1.DownloadTensorResponse(data=data[200:]).SerializeToString())
    with pytest.raises(StopIteration) as done:
        next(steps)
    assert np.array_equal(done.value.value[0][0], WEIGHTS.leaves[0])


def test_retries_end_when_the_server_stays_unavailable(clock):
    steps = transfers.put(MANIFEST, WEIGHTS, Deadline(None))
    next(steps)
    waited = []

    def keep_failing() -> None:
        while True:
            pause = steps.throw(errors.ServerUnavailable())
            assert isinstance(pause, Pause)
            clock(pause.seconds)
            waited.append(pause.seconds)
            next(steps)

    with pytest.raises(errors.ServerUnavailable):
        keep_failing()
    assert 30 <= sum(waited) <= 34


def test_an_upload_that_restarts_too_often_fails(clock):
    steps = transfers.put(MANIFEST, WEIGHTS, Deadline(None))
    next(steps)

    def start_over() -> None:
        for _ in range(1000):
            # As much is missing as before, whatever was sent.
            steps.send(missing(0))
            clock(steps.throw(errors.UploadOutOfStep()).seconds)
            next(steps)

    with pytest.raises(errors.UploadOutOfStep):
        start_over()


def test_uploads_that_the_server_drops_are_repeated_until_the_deadline(clock):
    deadline = Deadline(1.0)
    steps = transfers.put(MANIFEST, WEIGHTS, deadline)
    next(steps)
    sent = 0

    def keep_losing() -> None:
        nonlocal sent
        while True:
            step = steps.send(missing(0))
            if isinstance(step, Send):
                sent += 1
                step = steps.send(b"")
            else:
                clock(step.seconds)
                step = next(steps)
            assert isinstance(step, Unary)

    with pytest.raises(
        errors.DeadlineExceeded, match="The last attempt failed with UploadOutOfStep: the server has dropped"
    ):
        keep_losing()
    assert sent > 1
    # The deadline is the one of the call: no upload has moved it.
    assert deadline.at == 1001.0


def test_progress_renews_the_deadline_of_a_transfer_without_its_own_timeout(clock):
    deadline = Deadline(10.0, is_renewable=True)
    steps = transfers.put(MANIFEST, WEIGHTS, deadline)
    next(steps)
    assert isinstance(steps.send(missing(0)), Send)
    clock(9)
    clock(steps.throw(errors.ServerUnavailable()).seconds)
    next(steps)
    assert isinstance(steps.send(missing(200)), Send)
    assert deadline.remaining_s() == pytest.approx(10 + 200 / 2**20)


def test_a_long_call_is_sent_again_as_a_short_one(clock):
    deadline = Deadline(60.0)
    exchange = long_calls.exchange("/service/Method", b"request", deadline, 1000)
    step = next(exchange)
    assert isinstance(step, Exchange)
    assert b"request" in b"".join(step.requests)
    # A stream that ends without an answer is a server that is gone.
    with pytest.raises(errors.ServerUnavailable, match="without an answer") as gone:
        exchange.send(None)
    steps = retries.attempts(Unary("/service/Method", b"request"), None, deadline)
    sent, paused = 0, 0.0

    def keep_failing() -> None:
        nonlocal sent, paused
        step = next(steps)
        while True:
            assert isinstance(step, Unary)
            sent += 1
            pause = steps.throw(gone.value)
            assert isinstance(pause, Pause)
            clock(pause.seconds)
            paused += pause.seconds
            # The deadline is that of the whole call.
            assert deadline.remaining_s() == pytest.approx(60.0 - paused)
            step = next(steps)

    with pytest.raises(errors.ServerUnavailable, match="without an answer"):
        keep_failing()
    assert sent >= 5
    assert 3.0 <= paused <= 6.0


def test_a_long_call_is_retried_until_its_deadline_while_the_server_has_no_memory_for_it(clock):
    long = b"\0" * long_calls.MIN_BYTES
    steps = retries.attempts(Unary("/service/Method", long), None, Deadline(60.0))
    next(steps)
    paused = []

    def keep_refusing() -> None:
        while True:
            pause = steps.throw(errors.ServerOverloaded("full", retry_after_s=1.9))
            clock(pause.seconds)
            paused.append(pause.seconds)
            next(steps)

    with pytest.raises(errors.ServerOverloaded, match="full"):
        keep_refusing()
    assert min(paused) >= 1.9
    assert 55 <= sum(paused) < 60


def test_a_short_call_to_an_overloaded_server_fails_at_once():
    steps = retries.attempts(Unary("/service/Method", b"short"), None, Deadline(60.0))
    next(steps)
    with pytest.raises(errors.ServerOverloaded):
        steps.throw(errors.ServerOverloaded())
