"""Where a client may be used: processes, event loops, gevent."""

from __future__ import annotations

import asyncio
import copy
import pathlib
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import errors
from support.public_calls import CALLS, ENDS

PROGRAMS = pathlib.Path(__file__).parent / "programs"
OTHER_LOOP = "belongs to another event loop.*docs/processes.md"


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_objects_with_a_connection_cannot_be_copied_or_pickled(client, copied):
    model = client.model("no_metrics")
    held = [
        client,
        model,
        model.put_weights(model.initial_weights),
        client.model("keras_cnn").metrics_session(),
    ]
    with model.pipeline(held[2]) as pipeline:
        for thing in (*held, pipeline):
            with pytest.raises(TypeError, match=f"a {type(thing).__name__} cannot be pickled or copied.*call connect"):
                copied(thing)


def test_async_pipelines_and_sessions_cannot_be_copied(server):
    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("counting")
            handle = await model.put_weights(await model.initial_weights)
            async with model.pipeline(handle) as pipeline, model.metrics_session() as session:
                for thing in (client, model, handle, pipeline, session):
                    with pytest.raises(TypeError, match=f"a {type(thing).__name__} cannot be pickled or copied"):
                        pickle.dumps(thing)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_objects_made_before_a_fork_raise_an_error_in_the_child_that_says_what_to_do(server, kind):
    # Where a child hangs its alarm ends it, and its line is missing.
    finished = subprocess.run(
        [sys.executable, PROGRAMS / "forked_child.py", server.address, kind],
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = dict(line.split(": ", 1) for line in finished.stdout.splitlines() if ": " in line)
    assert finished.stdout.endswith("the parent has gone on\n"), finished.stdout + finished.stderr
    # Closing a client does nothing there; connecting works.
    assert lines.pop("Client left") == "returned None"
    connected = lines.pop("connect in the child"), lines.pop("connect_async in the child")
    if kind == "sync":
        advice = r"call connect\(\) in the child"
        assert connected == ("returned [[5.0], 300, 30]",) * 2
    else:
        # There gRPC hangs or crashes.
        advice = "start the process by spawn"
        for outcome in connected:
            assert re.fullmatch(f"RuntimeError: .* had used an AsyncClient, .*: {advice}.*", outcome)
    extra = {"Pipeline.close alone", "Pipeline left", "Session left"}
    if kind == "sync":
        extra |= {"Future.result", "Future.exception", "predict_many that had begun"}
    assert set(lines) == {*CALLS, *ENDS, *extra}
    for way, outcome in lines.items():
        expected = f"RuntimeError: this .* was made before the process forked, .*: {advice}.*"
        assert re.fullmatch(expected, outcome), (way, outcome)


def test_an_async_client_belongs_to_the_first_event_loop_that_uses_it(server):
    client = forwardpass_client.connect_async(server.address)

    async def use() -> forwardpass_client.AsyncRemoteFunctionalModel:
        assert await client.is_ready()
        return await client.model("no_metrics")

    async def run() -> None:
        model = await use()
        async with await model.pipeline(await model.initial_weights) as pipeline:

            async def elsewhere() -> None:
                x = np.zeros((1, 4), np.float32)
                for call in (client.models, client.is_ready, client.wait_until_ready, client.close, pipeline.close):
                    with pytest.raises(RuntimeError, match=OTHER_LOOP):
                        await call()
                with pytest.raises(RuntimeError, match=OTHER_LOOP):
                    pipeline.predict_on_batch(x, training=False)

            await asyncio.to_thread(asyncio.run, elsewhere())
            await pipeline.predict_on_batch(np.zeros((1, 4), np.float32), training=False)
        await client.close()

    asyncio.run(run())


def test_one_async_client_in_two_runs_is_refused_at_once(server):
    client = forwardpass_client.connect_async(server.address)
    asyncio.run(client.models())
    with pytest.raises(RuntimeError, match=OTHER_LOOP):
        asyncio.run(client.models())


def test_an_async_client_that_was_closed_before_its_first_call_stays_closed():
    client = forwardpass_client.connect_async("127.0.0.1:1")

    async def run() -> None:
        await client.close()
        with pytest.raises(errors.CallCancelled, match="the client is closed"):
            await client.models()

    asyncio.run(run())


def test_an_async_client_without_an_event_loop_says_what_to_do():
    client = forwardpass_client.connect_async("127.0.0.1:1")
    call = client.models()
    with pytest.raises(RuntimeError, match="needs a running event loop: await its methods"):
        call.send(None)


def test_threads_share_a_client_even_with_an_event_loop_in_each_thread(server):
    found = []

    def work() -> None:
        async def run() -> None:
            async with forwardpass_client.connect_async(server.address) as client:
                found.append(await client.is_ready())

        asyncio.run(run())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


GEVENT = """
from gevent import monkey
monkey.patch_all()
import sys, gevent
if "init" in sys.argv:
    from grpc.experimental import gevent as grpc_gevent
    grpc_gevent.init_gevent()
import numpy as np
import forwardpass_client

if "async" in sys.argv:
    import asyncio
    async def run():
        forwardpass_client.connect_async(sys.argv[1])
    asyncio.run(run())

with forwardpass_client.connect(sys.argv[1]) as client:
    model = client.model("no_metrics")
    weights, x = model.initial_weights, np.ones((2, 4), np.float32)
    jobs = [gevent.spawn(model.predict_on_batch, weights, x, training=False) for _ in range(8)]
    gevent.joinall(jobs, raise_error=True)
    handle = model.put_weights(weights)
    assert len(list(model.predict_many(handle, [x] * 20, training=False))) == 20
    with model.pipeline(handle) as pipeline:
        futures = [pipeline.predict_on_batch(x, training=False) for _ in range(20)]
        # A batch of several calls may add up its products in another order.
        assert all(np.allclose(future.result(), jobs[0].value, rtol=1e-5, atol=1e-6) for future in futures)
print("all answered")
"""


def gevent(server, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Where it hangs the test fails.
    return subprocess.run(
        [sys.executable, "-c", GEVENT, server.address, *arguments], capture_output=True, text=True, timeout=120
    )


def test_gevent_works_after_init_gevent(server):
    finished = gevent(server, "init")
    assert finished.stdout == "all answered\n", finished.stderr


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((), "call grpc.experimental.gevent.init_gevent() after monkey.patch_all() and before connect()"),
        (("async",), "connect_async() does not work where gevent has patched Python's threads"),
        (("async", "init"), "connect_async() does not work where gevent has patched Python's threads"),
    ],
)
def test_gevent_that_would_hang_is_refused_at_connect(server, arguments, sentence):
    finished = gevent(server, *arguments)
    assert finished.returncode == 1
    assert re.search(f"RuntimeError: .*{re.escape(sentence)}", finished.stderr.strip().splitlines()[-1])
