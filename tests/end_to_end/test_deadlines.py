"""Every public method of the SDK ends with its deadline, whatever the server does.

The bound is a condition of the SDK and no measure of its speed: each call has a deadline of 1 s, and it must have ended
5 s later at most, on a busy machine too. Without one deadline for the whole call these calls took half a minute, or
never ended.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import errors
from support.breaking_proxies import ConnectionProxy, LosingProxy
from support.public_calls import CALLS, ENDS, LOCAL, PUBLIC, TIMEOUT_S, WITHOUT_TIMEOUT, World, public
from support.servers import ServerProcess

SLACK_S = 5.0


def test_every_public_method_is_in_the_table():
    for index in (0, 1):
        assert public(index) == {*CALLS, *ENDS, *LOCAL}


def test_every_call_takes_a_timeout():
    for place in CALLS:
        owner, _, name = place.partition(".")
        for cls in PUBLIC[owner]:
            method = getattr(cls, name)
            takes = not isinstance(method, property) and "timeout_s" in inspect.signature(method).parameters
            assert takes is (place not in WITHOUT_TIMEOUT), place


@pytest.fixture(scope="module")
def counting_server() -> Iterator[ServerProcess]:
    with ServerProcess("--factory", "counting=support.zoo:counting") as process:
        yield process


@contextlib.contextmanager
def breaking(kind: str, server: ServerProcess, weights: Collection[Any]) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of a proxy, and what breaks it. weights: those that the calls use."""
    if kind in ("stalls", "drops connections"):
        with ConnectionProxy(server.address) as connections:
            yield connections.address, connections.stall if kind == "stalls" else connections.drop
        return
    with LosingProxy(server.address) as losing, forwardpass_client.connect(server.address) as client:
        handles = [client.model("counting").put_weights(one) for one in weights]

        def lose() -> None:
            losing.weights_ids = [handle.id for handle in handles]
            losing.loses_uploads = kind == "loses uploads"
            # What a put needs, it lacks.
            for handle in handles:
                handle.delete()

        yield losing.address, lose


def weights_of(chosen: Collection[str]) -> dict[str, Any]:
    """Weights for each call. Had two calls the same ones, the put of one could save the other."""
    return {place: ((np.arange(10, dtype=np.float32) + index,), ()) for index, place in enumerate(chosen)}


KINDS = ["stalls", "drops connections", "loses uploads", "loses weights"]


class Outcome(NamedTuple):
    place: str
    seconds: float
    result: Any


def rows(kind: str, is_explicit: bool) -> dict[str, Callable[[World], Any]]:
    is_losing = kind.startswith("loses")
    chosen = {place: row.call for place, row in CALLS.items() if row.needs_weights or not is_losing}
    if kind == "loses weights":
        # These succeed: the weights are lost only before a call that is not part of a put, and a stream is one call.
        for place in ("Model.put_weights", "Model.pipeline", "Model.predict_many", "Model.predict_each"):
            del chosen[place]
        chosen = {place: call for place, call in chosen.items() if "Pipeline." not in place}
    chosen.update(ENDS)
    if is_explicit:
        chosen.pop("Client.wait_until_ready", None)
        for place in WITHOUT_TIMEOUT:
            chosen.pop(place, None)
    return chosen


def check(outcomes: list[Outcome]) -> None:
    for place, seconds, result in outcomes:
        assert seconds < TIMEOUT_S + SLACK_S, (place, seconds, result)
        if place in ENDS:
            assert not isinstance(result, Exception), (place, result)
            continue
        allowed = (errors.DeadlineExceeded, errors.ServerUnavailable, errors.WeightsNotFound)
        assert isinstance(result, allowed), (place, seconds, result)


def timeouts(is_explicit: bool) -> tuple[float, dict[str, float]]:
    """The client's timeout, and that of each call."""
    return (60.0, {"timeout_s": TIMEOUT_S}) if is_explicit else (TIMEOUT_S, {})


@pytest.mark.parametrize("is_explicit", [False, True], ids=["client's timeout", "own timeout"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_ends_with_its_deadline(counting_server, kind, is_explicit):
    chosen = rows(kind, is_explicit)
    weights = weights_of(chosen)
    timeout_s, more = timeouts(is_explicit)
    ready = threading.Barrier(len(chosen) + 1)
    broken = threading.Event()

    def run(address: str, place: str, call: Callable[[World], Any]) -> Outcome:
        with forwardpass_client.connect(address, timeout_s=timeout_s) as client:
            model = client.model("counting", timeout_s=60)
            handle = model.put_weights(weights[place], timeout_s=60)
            session, other = (model.metrics_session(timeout_s=60) for _ in range(2))
            pipeline, many = model.pipeline(handle), model.pipeline()
            state = model.initialize_metrics_state(timeout_s=60)
            ready.wait(60)
            broken.wait(60)
            world = World(client, model, weights[place], handle, session, other, pipeline, many, state, more)
            started = time.monotonic()
            try:
                result = call(world)
                if isinstance(result, concurrent.futures.Future):
                    result = result.result()
                elif inspect.isgenerator(result):
                    result = list(result)
            except Exception as error:
                result = error
            return Outcome(place, time.monotonic() - started, result)

    with breaking(kind, counting_server, weights.values()) as (address, break_now):
        with concurrent.futures.ThreadPoolExecutor(len(chosen)) as pool:
            running = [pool.submit(run, address, place, call) for place, call in chosen.items()]
            ready.wait(60)
            break_now()
            broken.set()
            check([one.result() for one in running])


@pytest.mark.parametrize("is_explicit", [False, True], ids=["client's timeout", "own timeout"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_of_the_async_client_ends_with_its_deadline(counting_server, kind, is_explicit):
    chosen = rows(kind, is_explicit)
    weights = weights_of(chosen)
    timeout_s, more = timeouts(is_explicit)

    async def run(address: str, place: str, call: Callable[[World], Any], ready: list[str], broken: Any) -> Outcome:
        async with forwardpass_client.connect_async(address, timeout_s=timeout_s) as client:
            model = await client.model("counting", timeout_s=60)
            handle = await model.put_weights(weights[place], timeout_s=60)
            session, other = [await model.metrics_session(timeout_s=60) for _ in range(2)]
            pipeline, many = await model.pipeline(handle), await model.pipeline()
            state = await model.initialize_metrics_state(timeout_s=60)
            ready.append(place)
            await broken.wait()
            world = World(client, model, weights[place], handle, session, other, pipeline, many, state, more)
            started = time.monotonic()
            try:
                result = call(world)
                result = [one async for one in result] if inspect.isasyncgen(result) else await result
            except Exception as error:
                result = error
            outcome = Outcome(place, time.monotonic() - started, result)
            for opened in (pipeline, many):
                await opened.__aexit__(KeyError, KeyError(), None)
            return outcome

    async def run_all(address: str, break_now: Callable[[], None]) -> list[Outcome]:
        ready: list[str] = []
        broken = asyncio.Event()
        running = [asyncio.ensure_future(run(address, place, call, ready, broken)) for place, call in chosen.items()]
        deadline = time.monotonic() + 60
        while len(ready) < len(running):
            assert time.monotonic() < deadline
            for one in running:
                if one.done():
                    one.result()
            await asyncio.sleep(0.01)
        break_now()
        broken.set()
        return await asyncio.gather(*running)

    with breaking(kind, counting_server, weights.values()) as (address, break_now):
        check(asyncio.run(run_all(address, break_now)))
