"""A server in a control group takes what its memory holds, refuses the rest, and is not killed."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import errors, frames
from forwardpass.wire.frames import Outbox
from forwardpass.wire.methods import METHODS
from forwardpass_server.calls import memory_budget
from forwardpass_server.calls.memory_budget import MemoryBudget
from support.memory_groups import memory_group
from support.servers import ServerProcess, wait_until

MIB = 2**20
# Of a process that takes some 600 MiB without a request.
MEMORY_BYTES = 1536 * MIB
WEIGHTS_MIB = 64

# Twelve of these and their responses, which are as long, take 1,536 MiB in the best case.
REQUEST_BYTES = 64 * MIB
CALLERS = 12

SLOW = ("--factory", "slow=support.zoo:slow", "--weights-mib", str(WEIGHTS_MIB), "--max-unary-mib", "8")
USED, LIMIT = "forwardpass_messages_bytes", "forwardpass_messages_limit_bytes"


@pytest.fixture(scope="module")
def small() -> Iterator[ServerProcess]:
    """A server whose limits follow from its control group; where there can be none, it is told the limit."""
    with memory_group(MEMORY_BYTES) as group:
        budget = MemoryBudget(memory_bytes=MEMORY_BYTES, base_bytes=0, weights_bytes=WEIGHTS_MIB * MIB)
        limit_bytes = budget.messages_bytes(memory_budget.model_bytes([]))
        told = () if group is not None else ("--max-concurrent-mib", str(limit_bytes // MIB))
        with ServerProcess(*SLOW, *told, group=group) as server:
            # A server that takes more than the base without a model has less for messages.
            assert limit_bytes / 2 < server.metrics()[LIMIT] < limit_bytes + MIB
            yield server


def test_twelve_large_requests_at_once_all_get_their_answer_and_the_server_survives(small):
    x = np.zeros(REQUEST_BYTES // 4, np.int32)
    # Far above what it takes: a busy machine needs a minute.
    with forwardpass_client.connect(small.address, timeout_s=500) as client:
        model = client.model("slow")

        def call() -> None:
            assert model.predict_on_batch(((), ()), x).shape == x.shape

        with concurrent.futures.ThreadPoolExecutor(CALLERS) as pool:
            for done in [pool.submit(call) for _ in range(CALLERS)]:
                done.result()
    assert small.process.poll() is None
    assert small.highest_resident_bytes() < MEMORY_BYTES
    refused = 'forwardpass_pipeline_calls_total{code="ResourceExhausted",method="PredictOnBatch"}'
    assert small.metrics()[refused] > 0
    wait_until(lambda: small.metrics()[USED] == 0)


def test_a_request_beyond_the_memory_limit_gets_a_retry_time_and_is_accepted_later(small):
    limit_bytes = int(small.metrics()[LIMIT])
    arriving = Outbox(answers=False)
    arriving.put(1, frames.encode_call("PredictOnBatch", None, limit_bytes), bytes(limit_bytes))
    ended = threading.Event()

    def first_piece() -> Iterator[bytes]:
        yield arriving.next_message()
        ended.wait()

    request = v1.PredictOnBatchRequest(model=v1.ModelSelector(name="slow"))
    # A field that the server does not know: as long as an array, and refused before anybody looks at it.
    data = request.SerializeToString() + b"\xfa\x7f" + b"\x80\x80\x40" + bytes(MIB)
    with grpc.insecure_channel(small.address) as channel:
        stream = channel.stream_stream(METHODS["Pipeline"].path)(first_piece())
        wait_until(lambda: small.metrics()[USED] == limit_bytes)
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary(METHODS["PredictOnBatch"].path)(data, timeout=60)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = dict(raised.value.trailing_metadata())
        found = errors.decode("RESOURCE_EXHAUSTED", raised.value.details(), trailing[errors.DETAIL_KEY])
        assert isinstance(found, errors.ServerOverloaded)
        assert found.retry_after_s > 0
        ended.set()
        stream.cancel()
    wait_until(lambda: small.metrics()[USED] == 0)
    with forwardpass_client.connect(small.address) as client:
        assert client.model("slow").predict_on_batch(((), ()), [0]).tolist() == [0]


def test_a_unary_request_beyond_its_limit_is_refused_and_the_sdk_sends_it_in_pieces(small):
    x = np.zeros(9 * MIB // 4, np.int32)
    with forwardpass_client.connect(small.address) as client:
        model = client.model("slow")
        request = model._calls.predict_on_batch(((), ()), x, False).request.join()
        with grpc.insecure_channel(small.address) as channel, pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary(METHODS["PredictOnBatch"].path)(request, timeout=60)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in raised.value.details()
        assert model.predict_on_batch(((), ()), x).shape == x.shape


def test_a_response_counts_until_its_caller_has_read_it(small):
    x = np.zeros(16 * MIB // 4, np.int32)
    with forwardpass_client.connect(small.address) as client:
        request = client.model("slow")._calls.predict_on_batch(((), ()), x, False).request.join()
    arriving = Outbox(answers=False)
    arriving.put(1, frames.encode_call("PredictOnBatch", None, len(request)), request)
    ended = threading.Event()

    def messages() -> Iterator[bytes]:
        while arriving:
            yield arriving.next_message()
        ended.wait()

    with grpc.insecure_channel(small.address) as channel:
        stream = channel.stream_stream(METHODS["Pipeline"].path)(messages())
        answered = 'forwardpass_pipeline_calls_total{code="OK",method="PredictOnBatch"}'
        before = small.metrics().get(answered, 0)
        wait_until(lambda: small.metrics().get(answered, 0) > before)
        # All but what gRPC has taken on its way already.
        wait_until(lambda: 4 * MIB < small.metrics()[USED] <= x.nbytes + MIB)
        ended.set()
        stream.cancel()
    wait_until(lambda: small.metrics()[USED] == 0)
