"""Uses the objects of a client in a forked child. Prints one line with the outcome of each use.

Arguments: the server's address, and "sync" or "async".
"""

import asyncio
import collections
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import forwardpass_client
from support.public_calls import BATCH, CALLS, ENDS, World

WEIGHTS = ((np.arange(10, dtype=np.float32) + 3,), ())

# grpc.aio crashes one forked child in ten, in Python's own code after the fork (grpc/grpc#19793).
ATTEMPTS = {"sync": 1, "async": 20}
# A failed check of gRPC aborts. Python code that raises or hangs ends otherwise, and is reported.
CRASHES = (signal.SIGSEGV, signal.SIGABRT)


def in_child(name: str, call: Callable[[], Any]) -> None:
    """Prints what the call returns or raises in a forked child. A child that hangs ends by its alarm."""
    sys.stdout.flush()
    for _ in range(ATTEMPTS[sys.argv[2]]):
        child = os.fork()
        if not child:
            break
        _, status = os.waitpid(child, 0)
        if os.WTERMSIG(status) not in CRASHES:
            if status:
                print(f"{name}: hung or failed with status {status}")
            return
    else:
        print(f"{name}: crashed")
        return
    signal.alarm(60)
    try:
        print(f"{name}: returned {call()!r}", flush=True)
    except BaseException as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
    os._exit(0)


def finished(result: Any) -> Any:
    """What a call of either client returns in the end."""
    if inspect.isgenerator(result):
        return collections.deque(result)
    if inspect.isasyncgen(result):
        return asyncio.run(anext(result))
    if inspect.isawaitable(result):
        return asyncio.run(awaited(result))
    return result


async def awaited(result: Any) -> Any:
    return await result


def entered(manager: Any) -> None:
    """Leaves a context that was entered before the fork."""
    manager.__exit__(None, None, None)


def reconnect(address: str, handle: Any) -> list[Any]:
    """Calls of a client that the child makes. handle: of the parent."""
    with forwardpass_client.connect(address) as client:
        model = client.model("counting")
        predictions = model.predict_on_batch(handle, np.int32([2]))
        many = list(model.predict_many(handle, [np.int32([2])] * 300))
        metrics = model.evaluate(handle, [BATCH] * 10)
        return [predictions.tolist(), len(many), int(metrics["examples"])]


async def reconnect_async(address: str, handle: Any) -> list[Any]:
    """`reconnect` for asyncio."""
    async with forwardpass_client.connect_async(address) as client:
        model = await client.model("counting")
        predictions = await model.predict_on_batch(handle, np.int32([2]))
        many = [one async for one in model.predict_many(handle, [np.int32([2])] * 300)]
        metrics = await model.evaluate(handle, [BATCH] * 10)
        return [predictions.tolist(), len(many), int(metrics["examples"])]


def sync_ways(address: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    client = forwardpass_client.connect(address)
    model = client.model("counting")
    slow = client.model("slow")
    handle = model.put_weights(WEIGHTS)
    session, other = model.metrics_session(), model.metrics_session()
    pipeline, slow_pipeline = model.pipeline(handle), slow.pipeline(((), ()))
    pipeline.predict_on_batch(BATCH[0]).result()
    pending = slow_pipeline.predict_on_batch([10**9])
    predicting = model.predict_many(handle, [BATCH[0]] * 2000)
    next(predicting)
    state = model.initialize_metrics_state()
    world = World(client, model, WEIGHTS, handle, session, other, pipeline, model.pipeline(), state, {})
    for name, row in CALLS.items():
        yield name, lambda row=row: finished(row.call(world))
    for name, end in ENDS.items():
        yield name, lambda end=end: end(world)
    yield "Pipeline.close alone", pipeline.close
    yield "Future.result", pending.result
    yield "Future.exception", pending.exception
    yield "predict_many that had begun", lambda: len(list(predicting))
    yield "Pipeline left", lambda: entered(pipeline)
    yield "Session left", lambda: entered(session)
    yield "Client left", lambda: entered(client)
    yield "connect in the child", lambda: reconnect(address, handle)
    yield "connect_async in the child", lambda: asyncio.run(reconnect_async(address, handle))
    # The parent goes on.
    assert model.predict_on_batch(handle, np.int32([2])).tolist() == [5]
    assert pipeline.predict_on_batch(np.int32([2])).result().tolist() == [5]


def async_ways(address: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    loop = asyncio.new_event_loop()

    async def prepare() -> World:
        client = forwardpass_client.connect_async(address)
        model = await client.model("counting")
        handle = await model.put_weights(WEIGHTS)
        session, other = await model.metrics_session(), await model.metrics_session()
        pipeline = await model.pipeline(handle)
        await pipeline.predict_on_batch(BATCH[0])
        many, state = await model.pipeline(), await model.initialize_metrics_state()
        return World(client, model, WEIGHTS, handle, session, other, pipeline, many, state, {})

    world = loop.run_until_complete(prepare())
    for name, row in CALLS.items():
        yield name, lambda row=row: finished(row.call(world))
    for name, end in ENDS.items():
        yield name, lambda end=end: finished(end(world))
    yield "Pipeline.close alone", lambda: finished(world.pipeline.close())
    yield "Pipeline left", lambda: finished(world.pipeline.__aexit__(None, None, None))
    yield "Session left", lambda: finished(world.session.__aexit__(None, None, None))
    yield "Client left", lambda: finished(world.client.__aexit__(None, None, None))

    yield "connect in the child", lambda: reconnect(address, world.handle)
    yield "connect_async in the child", lambda: asyncio.run(reconnect_async(address, world.handle))

    async def go_on() -> None:
        assert (await world.model.predict_on_batch(world.handle, np.int32([2]))).tolist() == [5]
        assert (await world.pipeline.predict_on_batch(np.int32([2]))).tolist() == [5]

    loop.run_until_complete(go_on())


ways = {"sync": sync_ways, "async": async_ways}[sys.argv[2]]
for way, call in ways(sys.argv[1]):
    in_child(way, call)
print("the parent has gone on", flush=True)
os._exit(0)
