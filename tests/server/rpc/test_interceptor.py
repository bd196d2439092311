"""What the interceptor knows of calls before their requests are there, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import grpc
import prometheus_client
import pytest

from forwardpass.wire.methods import MODEL_SERVICE, SERVICES
from forwardpass_server.rpc.access import Access
from forwardpass_server.rpc.departure import Departure
from forwardpass_server.rpc.interceptor import Interceptor
from forwardpass_server.serving.arrivals import Arrivals
from forwardpass_server.telemetry.families import Families
from forwardpass_server.telemetry.rpcs import RpcMetrics
from support.raw_http2 import RawConnection
from support.servers import wait_until

UNARY, STREAM = "/test.Service/Unary", "/test.Service/Stream"


@contextlib.asynccontextmanager
async def serving(arrivals: Arrivals):
    """The address of a server with one unary method, which answers with how many calls are known to come."""

    async def unary(request: bytes, context: object) -> bytes:
        return b"%d" % arrivals.count

    async def stream(requests, context: object):
        async for _ in requests:
            yield b"%d" % arrivals.count

    families = Families("Calls", prometheus_client.CollectorRegistry(), [])
    interceptor = Interceptor(RpcMetrics(families), Access(), Departure(), arrivals, None)
    server = grpc.aio.server(interceptors=[interceptor])
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Service", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


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


def test_calls_that_compute_are_refused_while_the_device_does_not_work_and_others_are_answered():
    works = threading.Event()

    async def answer(request: bytes, context: object) -> bytes:
        return b"answered"

    async def main() -> None:
        families = Families("Calls", prometheus_client.CollectorRegistry(), [])
        interceptor = Interceptor(
            RpcMetrics(families), Access(), Departure(), Arrivals(), None, device_works=works.is_set
        )
        server = grpc.aio.server(interceptors=[interceptor])
        unary = [method for method in SERVICES[MODEL_SERVICE].values() if method.is_unary]
        handlers = {method.name: grpc.unary_unary_rpc_method_handler(answer) for method in unary}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(MODEL_SERVICE, handlers)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                for _ in range(2):
                    found = {method.name: await status_of(channel, method.path) for method in unary}
                    refused = {name for name, status in found.items() if status is grpc.StatusCode.UNAVAILABLE}
                    describing = {"GetModel", "ListModels"}
                    assert refused == (set() if works.is_set() else set(found) - describing)
                    assert {name for name, status in found.items() if status is grpc.StatusCode.OK} >= describing
                    works.set()
        finally:
            await server.stop(None)

    asyncio.run(main())


async def status_of(channel: grpc.aio.Channel, path: str) -> grpc.StatusCode:
    return await channel.unary_unary(path)(b"", timeout=30).code()
