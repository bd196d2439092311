"""Many callers at once, of several models and versions: every one gets its own numbers."""

from __future__ import annotations

import asyncio
import concurrent.futures

import numpy as np
import pytest

import forwardpass_client
from support import zoo

CALLERS = 16
CALLS = 40


class Caller:
    """Knows what its calls must give: computed alone, before any other caller is about."""

    def __init__(self, client: forwardpass_client.Client, index: int) -> None:
        self.name, self.version = [("keras_cnn", 1), ("keras_cnn", 2), ("no_metrics", 1), ("linear_regression", 1)][
            index % 4
        ]
        model = client.model(self.name, self.version)
        rng = np.random.default_rng(index)
        self.weights = tuple(
            tuple(
                # Variances are among them and must stay positive.
                leaf if leaf.dtype.kind == "i" else (leaf + rng.random(leaf.shape)).astype(leaf.dtype)
                for leaf in part
            )
            for part in model.initial_weights
        )
        x_spec, y_spec = model.input_spec
        self.batches = []
        for size in rng.integers(1, 9, 5):
            x = rng.normal(size=(size, *x_spec.shape[1:])).astype(x_spec.dtype)
            y = rng.integers(0, 3, (size, *y_spec.shape[1:])).astype(y_spec.dtype)
            self.batches.append((x, y))
        self.expected = [model.forward_pass(self.weights, batch, training=False) for batch in self.batches]

    def check(self, index: int, found) -> None:
        expected = self.expected[index % len(self.batches)]
        assert np.isfinite(expected.predictions).all()
        # Rows of a batch are summed alike whoever else calls: the very same bits.
        assert np.array_equal(found.predictions, expected.predictions)
        assert np.array_equal(found.loss, expected.loss)
        assert found.num_examples == expected.num_examples


@pytest.fixture(scope="module")
def callers(server):
    with forwardpass_client.connect(server.address) as client:
        return [Caller(client, index) for index in range(CALLERS)]


def test_sixteen_threads_get_their_own_numbers(server, callers):
    with forwardpass_client.connect(server.address) as client, concurrent.futures.ThreadPoolExecutor(CALLERS) as pool:

        def work(caller: Caller) -> int:
            model = client.model(caller.name, caller.version)
            for index in range(CALLS):
                batch = caller.batches[index % len(caller.batches)]
                caller.check(index, model.forward_pass(caller.weights, batch, training=False))
            return CALLS

        assert sum(pool.map(work, callers)) == CALLERS * CALLS


def test_sixteen_tasks_get_their_own_numbers(server, callers):
    async def run() -> int:
        async with forwardpass_client.connect_async(server.address) as client:

            async def work(caller: Caller) -> int:
                model = await client.model(caller.name, caller.version)
                batches = [caller.batches[index % len(caller.batches)] for index in range(CALLS)]
                results = await asyncio.gather(
                    *(model.forward_pass(caller.weights, batch, training=False) for batch in batches)
                )
                for index, found in enumerate(results):
                    caller.check(index, found)
                return len(results)

            return sum(await asyncio.gather(*map(work, callers)))

    assert asyncio.run(run()) == CALLERS * CALLS


def test_two_hundred_batch_sizes_trace_nothing(server, client):
    model = client.model("keras_cnn")
    traces = server.metrics()["forwardpass_traces_total"]
    assert traces > 0
    for size in range(200):
        x, y = zoo.keras_batch(size)
        output = model.forward_pass(model.initial_weights, (x, y), training=bool(size % 2))
        assert output.num_examples == size
        assert output.predictions.shape == (size, 5)
    assert server.metrics()["forwardpass_traces_total"] == traces
