"""One measurement of metric sessions: callers that call one server as fast as it answers. Prints JSON.

Kinds: a forward pass, and one in a session; an update of a metrics state by value, and of a session; batches evaluated
over one stream, by one caller, under one and under 64 sets of weights; and the same in a local loop, by the shortest
way. Each caller has its own session.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import timing
import workloads

import forwardpass_client
from forwardpass.wire.description import Function

CALLS = ("forward", "session-forward", "update", "session-update")


def call_of(kind: str, model: Any, handle: Any, session: Any, state: Any, output: Any, batch: Any) -> Callable[[], Any]:
    """One call of a kind, sync or async as the model is."""
    return {
        "forward": lambda: model.forward_pass(handle, batch, training=False),
        "session-forward": lambda: session.forward_pass(handle, batch),
        "update": lambda: model.update_metrics_state(state, batch[1], output),
        "session-update": lambda: session.update(batch[1], output),
    }[kind]


def one_caller(kind: str, address: str, name: str, seconds: float) -> list[float]:
    """The seconds of each call of one synchronous client."""
    batch = workloads.batch(name), workloads.labels(name)
    with forwardpass_client.connect(address) as client:
        model = client.model(workloads.WORKLOADS[name].model)
        handle = model.put_weights(workloads.weights(model.name))
        with model.metrics_session() as session:
            output, state = model.forward_pass(handle, batch, training=False), model.initialize_metrics_state()
            return timing.repeat(call_of(kind, model, handle, session, state, output, batch), seconds)


async def many_callers(kind: str, address: str, name: str, callers: int, seconds: float) -> list[float]:
    """Those of the tasks of one asynchronous client."""
    batch = workloads.batch(name), workloads.labels(name)
    async with forwardpass_client.connect_async(address) as client, contextlib.AsyncExitStack() as stack:
        model = await client.model(workloads.WORKLOADS[name].model)
        handle = await model.put_weights(workloads.weights(model.name))
        output, state = await model.forward_pass(handle, batch, training=False), await model.initialize_metrics_state()
        measuring: list[Awaitable[list[float]]] = []
        for _ in range(callers):
            session = await stack.enter_async_context(await model.metrics_session())
            call = call_of(kind, model, handle, session, state, output, batch)
            measuring.append(timing.repeat_async(call, 1, seconds))
        return [one for taken in await asyncio.gather(*measuring) for one in taken]


def until(seconds: float, batch: Any) -> Iterator[Any]:
    """The same batch again and again, for so long."""
    end = time.perf_counter() + seconds
    return itertools.takewhile(lambda _: time.perf_counter() < end, itertools.repeat(batch))


def evaluated(address: str, name: str, seconds: float) -> float:
    """Examples per second of an evaluation."""
    batch = workloads.batch(name), workloads.labels(name)
    with forwardpass_client.connect(address) as client:
        model = client.model(workloads.WORKLOADS[name].model)
        handle = model.put_weights(workloads.weights(model.name))
        model.evaluate(handle, [batch] * 10)
        started = time.perf_counter()
        with model.metrics_session() as session:
            model.evaluate(handle, until(seconds, batch), session=session)
            return session.updates * len(batch[0]) / (time.perf_counter() - started)


SETS = 64


def evaluated_many(address: str, name: str, seconds: float) -> float:
    """Examples per second of an evaluation of 64 sets of weights; an example counts once for each set."""
    batch = workloads.batch(name), workloads.labels(name)
    with forwardpass_client.connect(address) as client:
        model = client.model(workloads.WORKLOADS[name].model)
        trainable, others = workloads.weights(model.name)
        sets = [tuple(leaf + leaf.dtype.type(index / 1000) for leaf in trainable) for index in range(SETS)]
        handles = [model.put_weights((one, others)) for one in sets]
        # Long enough for the measurements by which the server chooses its way.
        list(model.evaluate_many(handles, until(1.0, batch), exact=False))
        counted = 0

        def batches() -> Iterator[Any]:
            nonlocal counted
            for one in until(seconds, batch):
                counted += SETS * len(one[0])
                yield one

        started = time.perf_counter()
        list(model.evaluate_many(handles, batches(), exact=False))
        return counted / (time.perf_counter() - started)


def looped(name: str, seconds: float) -> float:
    """Examples per second of a loop over the model in this process."""
    import models

    from forwardpass_server.models import tracing
    from forwardpass_server.models.execution import Execution

    traced = tracing.trace(getattr(models, workloads.WORKLOADS[name].model)())
    execution = Execution(traced.functions, "/device:CPU:0")
    batch = [workloads.batch(name), workloads.labels(name)]
    state = execution.run(Function.INITIALIZE_METRICS_STATE, False, [])
    counted, started = 0, 0.0
    for warm_up in (True, False):
        counted, started = 0, time.perf_counter()
        for _ in until(0.2 if warm_up else seconds, batch):
            output = execution.run(Function.FORWARD_PASS, False, [*traced.initial_weights, *batch])
            state = execution.run(Function.UPDATE_METRICS_STATE, False, [*state, batch[1], *output])
            counted += len(batch[0])
    return counted / (time.perf_counter() - started)


def main() -> None:
    options = timing.arguments(__doc__, (*CALLS, "evaluate", "evaluate-many", "local"))
    if options.kind == "local":
        print(json.dumps({"examples_per_s": looped(options.workload, options.seconds)}))
        return
    if options.kind == "evaluate-many":
        print(json.dumps({"examples_per_s": evaluated_many(options.address, options.workload, options.seconds)}))
        return
    if options.kind == "evaluate":
        print(json.dumps({"examples_per_s": evaluated(options.address, options.workload, options.seconds)}))
        return
    arguments = options.kind, options.address, options.workload
    if options.callers == 1:
        taken = one_caller(*arguments, options.seconds)
    else:
        taken = asyncio.run(many_callers(*arguments, options.callers, options.seconds))
    timing.show(taken, options.callers)


if __name__ == "__main__":
    main()
