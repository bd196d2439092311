"""Concurrent calls with the same weights, run as one batch."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import errors
from support import zoo
from support.servers import ServerProcess

CALLERS = 64
CALLS = 10_000


def batches(server) -> tuple[float, float]:
    """How many calls could have been batched, and how many batches they were."""
    metrics = server.metrics()
    return metrics["forwardpass_batched_calls_sum"], metrics["forwardpass_batched_calls_count"]


def test_no_answer_contains_a_row_of_another_call(server):
    """Every row is one of its own, and its prediction tells it from all others."""

    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("linear_regression")
            (kernel, bias), _ = await model.initial_weights
            handle = await model.put_weights(await model.initial_weights)

            async def caller(index: int) -> int:
                rng = np.random.default_rng(index)
                for _ in range(CALLS // CALLERS + 1):
                    x = rng.standard_normal((rng.integers(0, 6), 3)).astype(np.float32)
                    found = await model.predict_on_batch(handle, x, training=False)
                    assert found.shape == (len(x), 1)
                    # Float rounding; another caller's rows would differ by about 1.
                    assert np.allclose(found[:, 0], x @ kernel[0] + bias[0], rtol=0, atol=1e-5)
                return CALLS // CALLERS + 1

            assert sum(await asyncio.gather(*map(caller, range(CALLERS)))) >= CALLS

    calls, count = batches(server)
    asyncio.run(run())
    calls, count = batches(server)[0] - calls, batches(server)[1] - count
    assert calls >= CALLS
    assert count < calls / 2


@pytest.mark.parametrize("name", ["keras_cnn", "emnist_with_metrics", "dict_inputs", "every_dtype"])
def test_results_agree_with_those_of_single_calls(server, name):
    async def run() -> None:
        async with forwardpass_client.connect_async(server.address, reuse_weights=False) as client:
            model = await client.model(name)
            weights = await model.initial_weights
            handle = await model.put_weights(weights)
            xs = [zoo.inputs(model, 1 + index % 4) for index in range(24)]
            # By value they are never batched.
            alone = [await model.predict_on_batch(weights, x, training=False) for x in xs]
            together = await asyncio.gather(*(model.predict_on_batch(handle, x, training=False) for x in xs))
            for one, other in zip(alone, together, strict=True):
                # Kernels sum in another order for another number of rows: float32's last bits.
                zoo.assert_equal(other, one, atol=2e-6)

    before = batches(server)
    asyncio.run(run())
    after = batches(server)
    assert after[0] - before[0] == 24
    assert after[1] - before[1] < 24


def test_a_forward_pass_has_its_own_loss_and_number_of_examples(server):
    async def run() -> None:
        async with forwardpass_client.connect_async(server.address, reuse_weights=False) as client:
            model = await client.model("keras_cnn_emnist_head")
            weights = await model.initial_weights
            handle = await model.put_weights(weights)
            rng = np.random.default_rng(0)
            data = [(zoo.inputs(model, 1 + index), rng.integers(0, 62, 1 + index)) for index in range(8)]
            alone = [await model.forward_pass(weights, batch, training=False) for batch in data]
            together = await asyncio.gather(*(model.forward_pass(handle, batch, training=False) for batch in data))
            for index, (one, other) in enumerate(zip(alone, together, strict=True)):
                assert other.num_examples == index + 1
                zoo.assert_equal(other, one, atol=2e-6)

    before = batches(server)
    asyncio.run(run())
    assert batches(server)[0] - before[0] == 8


def test_calls_for_training_and_of_models_that_mix_rows_are_never_batched(server):
    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            for name, training in (("keras_cnn", True), ("slow", False), ("structures", False)):
                model = await client.model(name)
                handle = await model.put_weights(await model.initial_weights)
                x = zoo.inputs(model, 3)
                await asyncio.gather(*(model.predict_on_batch(handle, x, training) for _ in range(10)))

    before = batches(server)
    asyncio.run(run())
    assert batches(server) == before


def test_a_description_says_why_a_model_is_not_batched(client):
    reasons = {
        name: client.model(name).description.unbatchable_reason
        for name in ("keras_cnn", "lstm_next_word", "structures", "slow")
    }
    assert reasons["keras_cnn"] == ""
    assert reasons["lstm_next_word"] == ""
    assert "has no batch dimension" in reasons["structures"]
    assert "along the batch" in reasons["slow"]


PATIENT = ("--factory", "patient=support.zoo:patient")


def test_a_bad_request_in_a_batch_fails_alone():
    with ServerProcess(*PATIENT) as server:

        async def run() -> None:
            async with forwardpass_client.connect_async(server.address) as client:
                model = await client.model("patient")
                assert model.description.unbatchable_reason == ""
                handle = await model.put_weights(await model.initial_weights)
                table = await model.get_weights(handle)

                async def call(index: int):
                    return await model.predict_on_batch(handle, [index], training=False)

                # An index out of range is refused by the graph, and with it the batch that it is in.
                indices = [3, 10**6, 5, 7, -5]
                found = await asyncio.gather(*map(call, indices), return_exceptions=True)
                for index, one in zip(indices, found, strict=True):
                    if 0 <= index < len(table[0][0]):
                        assert np.array_equal(one, table[0][0][[index]])
                    else:
                        assert isinstance(one, errors.ModelRefusedInput)

        asyncio.run(run())


def test_waiting_calls_are_limited_by_number_and_by_bytes():
    slow = ("--factory", "slow=support.zoo:slow")
    x = [10**6] * 200_000
    with ServerProcess(*slow, "--max-concurrent-mib", "2") as server:
        with forwardpass_client.connect(server.address) as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
            model = client.model("slow")
            calls = [pool.submit(model.predict_on_batch, ((), ()), x, timeout_s=5) for _ in range(4)]
            refused = [call.exception() for call in calls]
            refused = [error for error in refused if isinstance(error, errors.ServerOverloaded)]
            assert len(refused) == 2
            for error in refused:
                assert "the server's calls: expected at most 2097152 bytes at once, got " in str(error)
                assert error.retry_after_s > 0


def test_a_deadline_that_passes_in_the_queue_ends_there():
    with ServerProcess("--factory", "ponder=support.zoo:ponder") as server:
        with forwardpass_client.connect(server.address) as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
            model = client.model("ponder")
            handle = model.put_weights(model.initial_weights)
            x = np.ones((1, 4), np.float32)
            started = time.monotonic()
            model.predict_on_batch(handle, x, training=False)
            once_s = time.monotonic() - started
            first = pool.submit(model.predict_on_batch, handle, np.ones((40, 4), np.float32), False)
            time.sleep(once_s)
            with pytest.raises(errors.DeadlineExceeded):
                model.predict_on_batch(handle, x, training=False, timeout_s=once_s)
            assert first.result().shape == (40,)
            # Those that ran: one, forty, and not the one that was given up.
            assert batches(server)[0] == 2
