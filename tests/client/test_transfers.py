"""What goes in several steps: what is done when the connection breaks, without one."""

from __future__ import annotations

import time

import numpy as np
import pytest

from forwardpass import v1
from forwardpass.wire import chunks, errors, manifests
from forwardpass.wire.structures import Structure
from forwardpass_client import long_calls, transfers
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


def test_an_upload_that_breaks_after_a_long_while_is_taken_up_again(clock):
    steps = transfers.put(MANIFEST, WEIGHTS)
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


def test_a_download_that_breaks_after_a_long_while_is_taken_up_again(clock):
    steps = transfers.get(MANIFEST.weights_id)
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


def test_a_server_that_stays_away_is_given_up(clock):
    steps = transfers.put(MANIFEST, WEIGHTS)
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


def test_an_upload_that_starts_over_again_and_again_is_given_up(clock):
    steps = transfers.put(MANIFEST, WEIGHTS)
    next(steps)

    def start_over() -> None:
        for _ in range(1000):
            # As much is missing as before, whatever was sent.
            steps.send(missing(0))
            clock(steps.throw(errors.UploadOutOfStep()).seconds)
            next(steps)

    with pytest.raises(errors.UploadOutOfStep):
        start_over()


def test_a_long_call_is_sent_again_as_often_as_a_short_one(clock):
    steps = long_calls.steps("/service/Method", b"request", 60.0, 1000)
    sent = []

    def keep_failing() -> None:
        step = next(steps)
        while True:
            assert isinstance(step, Exchange)
            sent.append((b"".join(step.requests), step.timeout_s))
            # A stream that ends without an answer is a server that is gone.
            pause = steps.send(None)
            assert isinstance(pause, Pause)
            clock(pause.seconds)
            step = next(steps)

    with pytest.raises(errors.ServerUnavailable, match="without an answer"):
        keep_failing()
    assert len(sent) == 5
    assert all(b"request" in request for request, _ in sent)
    # The deadline is that of the whole call.
    assert [timeout for _, timeout in sent] == pytest.approx([60.0, 59.8, 59.4, 58.6, 57.0])
