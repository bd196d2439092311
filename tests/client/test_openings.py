"""Sessions and pipelines of the async client are contexts by themselves, and awaitables as before."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import errors
from support import zoo

X = np.zeros((1, 4), np.float32)


def run(server, work) -> None:
    async def connected() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            await work(client)

    asyncio.run(connected())


def test_a_session_is_entered_directly_and_closed_at_the_end(server):
    async def work(client) -> None:
        model = await client.model("counting")
        async with model.metrics_session() as session:
            await session.forward_pass(await model.initial_weights, zoo.counting_batch(1))
            assert session.updates == 1
        with pytest.raises(errors.SessionNotFound):
            await session.result()

    run(server, work)


def test_an_error_leaves_the_session_open(server):
    async def work(client) -> None:
        model = await client.model("counting")
        with pytest.raises(KeyError):
            async with model.metrics_session() as session:
                raise KeyError
        assert (await session.result())["examples"] == 0
        await session.close()

    run(server, work)


def test_a_pipeline_is_entered_directly_and_has_its_answers_at_the_end(server):
    async def work(client) -> None:
        model = await client.model("no_metrics")
        async with model.pipeline(await model.initial_weights) as pipeline:
            futures = [pipeline.predict_on_batch(X, training=False) for _ in range(10)]
        assert all(future.done() for future in futures)
        with pytest.raises(errors.CallCancelled, match="the pipeline is closed"):
            pipeline.predict_on_batch(X)

    run(server, work)


def test_each_opening_is_a_coroutine_too(server):
    async def work(client) -> None:
        model = await client.model("counting")
        weights = await model.initial_weights
        task = asyncio.create_task(model.metrics_session())
        assert repr(task)
        first, second, third, pipeline = await asyncio.gather(
            task, model.metrics_session(), asyncio.wait_for(model.metrics_session(), 60), model.pipeline(weights)
        )
        assert len({first.id, second.id, third.id}) == 3
        async with await model.pipeline(weights) as again, pipeline:
            for one in (pipeline, again):
                assert (await one.predict_on_batch(np.int32([3]))).tolist() == [3]

    run(server, work)


def test_errors_about_arguments_are_raised_before_the_await(server):
    async def work(client) -> None:
        model = await client.model("counting")
        with pytest.raises(ValueError, match="session_id: expected 32 hexadecimal digits"):
            model.metrics_session("x")

    run(server, work)
