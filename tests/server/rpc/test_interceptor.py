"""What the interceptor knows of calls before their requests are there, over real connections."""

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

from forwardpass.wire.methods import MODEL_SERVICE, SERVICES
from forwardpass_server.access.access import Access
from forwardpass_server.calls.admission import Admission, Limits
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.rpc.departure import Departure
from forwardpass_server.rpc.interceptor import Interceptor
from forwardpass_server.telemetry.families import Families
from forwardpass_server.telemetry.rpcs import RpcMetrics
from support.raw_http2 import RawConnection
from support.servers import wait_until

UNARY, STREAM, LONG = "/test.Service/Unary", "/test.Service/Stream", "/test.Service/Long"

# More than gRPC sends before its caller reads.
LONG_BYTES = 2**24


@contextlib.asynccontextmanager
async def serving(arrivals: Arrivals, registry: prometheus_client.CollectorRegistry | None = None):
    """The address of a server whose unary method and stream answer with how many calls are known to come.

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
    interceptor = Interceptor(RpcMetrics(families), Access(), Departure(), arrivals, None)
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
    """How many calls of a method have ended with which status."""
    return {
        sample.labels["grpc_code"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "grpc_server_handled_total" and sample.labels["grpc_method"] == method and sample.value
    }


@pytest.mark.parametrize("goes", ["with its message", "reset", "with its connection"])
def test_a_call_is_known_from_its_headers_until_its_message_comes_or_its_caller_leaves(goes):
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


def test_a_call_that_is_there_and_a_stream_are_not_on_their_way():
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
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


UNARY_OF_MODELS = {name: method.path for name, method in SERVICES[MODEL_SERVICE].items() if method.is_unary}
DESCRIBING = {"GetModel", "ListModels"}


def rpc_metrics() -> RpcMetrics:
    return RpcMetrics(Families("Calls", prometheus_client.CollectorRegistry(), []))


@pytest.mark.parametrize("missing", ["device", "room for a call", "room for bytes"])
def test_calls_that_compute_are_refused_without_device_or_room_and_others_are_answered(missing):
    works = threading.Event()
    limits = Limits(calls=2, size_bytes=100)
    admission = Admission(limits, limits)
    entered = {"device": [], "room for a call": [1, 1], "room for bytes": [100]}[missing]
    if missing != "device":
        works.set()
    status = grpc.StatusCode.UNAVAILABLE if missing == "device" else grpc.StatusCode.RESOURCE_EXHAUSTED

    async def refused(channel: grpc.aio.Channel) -> set[str]:
        found = {name: await status_of(channel, path) for name, path in UNARY_OF_MODELS.items()}
        assert {name for name, one in found.items() if one is grpc.StatusCode.OK} >= DESCRIBING
        return {name for name, one in found.items() if one is status}

    async def main() -> None:
        interceptor = Interceptor(
            rpc_metrics(), Access(), Departure(), Arrivals(), None, admission, device_works=works.is_set
        )
        async with model_service(interceptor) as address, grpc.aio.insecure_channel(address) as channel:
            for size_bytes in entered:
                admission.enter("", size_bytes)
            assert await refused(channel) == UNARY_OF_MODELS.keys() - DESCRIBING
            for size_bytes in entered:
                admission.leave("", size_bytes)
            works.set()
            assert await refused(channel) == set()

    asyncio.run(main())


def test_a_call_without_room_is_refused_before_its_request_is_sent():
    limits = Limits(calls=1, size_bytes=100)
    admission = Admission(limits, limits)

    async def main() -> None:
        interceptor = Interceptor(rpc_metrics(), Access(), Departure(), Arrivals(), None, admission)
        async with model_service(interceptor) as address:
            admission.enter("another", 1)
            with await asyncio.to_thread(RawConnection, address) as connection:
                stream = connection.open(UNARY_OF_MODELS["PredictOnBatch"])
                connection.flush()
                code, message = await asyncio.to_thread(connection.status, stream)
        assert code == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert "the server's calls: expected at most 1 calls and 100 bytes at once, got more" in message

    asyncio.run(main())


async def status_of(channel: grpc.aio.Channel, path: str) -> grpc.StatusCode:
    return await channel.unary_unary(path)(b"", timeout=30).code()


def test_a_caller_that_leaves_an_answer_unread_is_counted_as_cancelled_and_is_one_line_of_the_log(caplog):
    async def main() -> dict[str, float]:
        registry = prometheus_client.CollectorRegistry()
        async with serving(Arrivals(), registry) as address:
            connection = await asyncio.to_thread(RawConnection, address)
            with connection:
                stream = connection.open(LONG)
                connection.send(stream, b"x")
                # All that fits into the window has come, and the rest of the answer waits.
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
    assert messages == [("INFO", f"call of {LONG}: the caller left before its answer was sent")]
