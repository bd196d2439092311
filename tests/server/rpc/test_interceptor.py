"""The interceptor, over real connections: announced calls, refusals, unread responses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator

import grpc
import h2.events
import prometheus_client
import pytest

from forwardpass.wire.methods import MODEL_SERVICE, SERVICES, WEIGHTS_SERVICE
from forwardpass_server.access.access import Access
from forwardpass_server.calls.admission import Admission, Limits
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.rpc.interceptor import Interceptor
from forwardpass_server.telemetry.families import Families
from forwardpass_server.telemetry.rpcs import RpcMetrics
from support.raw_http2 import RawConnection
from support.servers import wait_until

UNARY, STREAM, LONG = "/test.Service/Unary", "/test.Service/Stream", "/test.Service/Long"

# More than gRPC sends before the client reads.
LONG_BYTES = 2**24


@contextlib.asynccontextmanager
async def serving(arrivals: Arrivals, registry: prometheus_client.CollectorRegistry | None = None):
    """The address of a server whose unary method and stream answer with the number of announced calls.

    Another method has a long answer.
    """

    async def unary(request: bytes, context: object) -> bytes:
        return b"%d" % arrivals.count

    async def stream(requests, context: object):
        async for _ in requests:
            yield b"%d" % arrivals.count

    async def long(request: bytes, context: object) -> bytes:
        return bytes(LONG_BYTES)

    families = Families("Calls", registry or prometheus_client.CollectorRegistry(), [])
    interceptor = Interceptor(RpcMetrics(families), Access(), Drain(), arrivals, None)
    server = grpc.aio.server(interceptors=[interceptor])
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Long": grpc.unary_unary_rpc_method_handler(long),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Service", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def handled(registry: prometheus_client.CollectorRegistry, method: str) -> dict[str, float]:
    """The number of ended calls of a method, by status."""
    return {
        sample.labels["grpc_code"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "grpc_server_handled_total" and sample.labels["grpc_method"] == method and sample.value
    }


@pytest.mark.parametrize("goes", ["with its message", "reset", "with its connection"])
def test_a_call_is_announced_from_its_headers_until_its_message_arrives_or_it_is_cancelled(goes):
    async def main() -> None:
        arrivals = Arrivals()
        async with serving(arrivals) as address:
            connection = await asyncio.to_thread(RawConnection, address)
            with connection:
                stream = connection.open(UNARY)
                connection.flush()
                await asyncio.to_thread(wait_until, lambda: arrivals.count == 1)
                if goes == "with its message":
                    connection.send(stream, b"x")
                    assert await asyncio.to_thread(connection.status, stream) == ("0", "")
                elif goes == "reset":
                    connection.h2.reset_stream(stream)
                    connection.flush()
                    await asyncio.to_thread(wait_until, lambda: not arrivals.count)
            await asyncio.to_thread(wait_until, lambda: not arrivals.count)

    asyncio.run(main())


def test_calls_that_have_arrived_and_streams_are_not_announced():
    async def main() -> None:
        async with serving(Arrivals()) as address, grpc.aio.insecure_channel(address) as channel:
            stream = channel.stream_stream(STREAM)()
            await stream.write(b"x")
            assert await stream.read() == b"0"
            assert await channel.unary_unary(UNARY)(b"x") == b"0"
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF

    asyncio.run(main())


@contextlib.asynccontextmanager
async def model_service(interceptor: Interceptor) -> AsyncIterator[str]:
    """The address of a server that answers each unary method of the model service."""

    async def answer(request: bytes, context: object) -> bytes:
        return b"answered"

    server = grpc.aio.server(interceptors=[interceptor])
    handlers = {name: grpc.unary_unary_rpc_method_handler(answer) for name in UNARY_OF_MODELS}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(MODEL_SERVICE, handlers)])
    handlers = {name: grpc.unary_unary_rpc_method_handler(answer) for name in UNARY_OF_WEIGHTS}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(WEIGHTS_SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


UNARY_OF_MODELS = {name: method.path for name, method in SERVICES[MODEL_SERVICE].items() if method.is_unary}
UNARY_OF_WEIGHTS = {name: method.path for name, method in SERVICES[WEIGHTS_SERVICE].items() if method.is_unary}
UNARY_OF_BOTH = {**UNARY_OF_MODELS, **UNARY_OF_WEIGHTS}
COMPUTING = {*(UNARY_OF_MODELS.keys() - {"GetModel", "ListModels"}), "CombineWeights"}


def rpc_metrics() -> RpcMetrics:
    return RpcMetrics(Families("Calls", prometheus_client.CollectorRegistry(), []))


@pytest.mark.parametrize("missing", ["device", "room for a call", "room for bytes"])
def test_only_calls_that_compute_are_refused_when_the_device_fails_or_a_limit_is_reached(missing):
    works = threading.Event()
    limits = Limits(calls=2, size_bytes=100)
    admission = Admission(limits, limits)
    entered = {"device": [], "room for a call": [1, 1], "room for bytes": [100]}[missing]
    if missing != "device":
        works.set()
    status = grpc.StatusCode.UNAVAILABLE if missing == "device" else grpc.StatusCode.RESOURCE_EXHAUSTED

    async def refused(channel: grpc.aio.Channel) -> set[str]:
        found = {name: await status_of(channel, path) for name, path in UNARY_OF_BOTH.items()}
        assert {name for name, one in found.items() if one is grpc.StatusCode.OK} >= UNARY_OF_BOTH.keys() - COMPUTING
        return {name for name, one in found.items() if one is status}

    async def main() -> None:
        interceptor = Interceptor(
            rpc_metrics(), Access(), Drain(), Arrivals(), None, admission, device_works=works.is_set
        )
        async with model_service(interceptor) as address, grpc.aio.insecure_channel(address) as channel:
            for size_bytes in entered:
                admission.enter("", size_bytes)
            assert await refused(channel) == COMPUTING
            for size_bytes in entered:
                admission.leave("", size_bytes)
            works.set()
            assert await refused(channel) == set()

    asyncio.run(main())


def test_a_call_beyond_the_limit_is_refused_before_its_request_arrives():
    limits = Limits(calls=1, size_bytes=100)
    admission = Admission(limits, limits)

    async def main() -> None:
        interceptor = Interceptor(rpc_metrics(), Access(), Drain(), Arrivals(), None, admission)
        async with model_service(interceptor) as address:
            admission.enter("another", 1)
            with await asyncio.to_thread(RawConnection, address) as connection:
                stream = connection.open(UNARY_OF_MODELS["PredictOnBatch"])
                connection.flush()
                code, message = await asyncio.to_thread(connection.status, stream)
        assert code == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert "the server's calls: expected at most 1 at once, got more" in message

    asyncio.run(main())


async def status_of(channel: grpc.aio.Channel, path: str) -> grpc.StatusCode:
    return await channel.unary_unary(path)(b"", timeout=30).code()


def test_an_unread_response_counts_as_cancelled_and_is_logged_in_one_line(caplog):
    async def main() -> dict[str, float]:
        registry = prometheus_client.CollectorRegistry()
        async with serving(Arrivals(), registry) as address:
            connection = await asyncio.to_thread(RawConnection, address)
            with connection:
                stream = connection.open(LONG)
                connection.send(stream, b"x")
                # The window is full, and the rest of the response waits.
                await asyncio.to_thread(connection.wait, lambda event: isinstance(event, h2.events.DataReceived))
                connection.h2.reset_stream(stream)
                connection.flush()
                await asyncio.to_thread(wait_until, lambda: handled(registry, "Long"))
            async with grpc.aio.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
                assert len(await channel.unary_unary(LONG)(b"x")) == LONG_BYTES
                await asyncio.to_thread(wait_until, lambda: "OK" in handled(registry, "Long"))
            return handled(registry, "Long")

    caplog.set_level(logging.INFO)
    assert asyncio.run(main()) == {"Canceled": 1, "OK": 1}
    messages = [(record.levelname, record.getMessage()) for record in caplog.records if record.name != "asyncio"]
    assert messages == [("INFO", f"call of {LONG}: the client disconnected before the response was sent")]
