"""The floor: a bare grpc.aio server that answers any bytes with as many as it is asked for. No protobuf, no model.

The number of bytes to answer with is the request's last eight. On a stream each message comes back as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

PATH = "/floor/Echo"


async def serve() -> None:
    answers: dict[bytes, bytes] = {}

    async def echo(request: bytes, context: object) -> bytes:
        size = request[-8:]
        answer = answers.get(size)
        if answer is None:
            answer = answers[size] = bytes(int.from_bytes(size, "little"))
        return answer

    async def echo_stream(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", 2**30), ("grpc.max_send_message_length", 2**30)]
    )
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "floor",
                {
                    "Echo": grpc.unary_unary_rpc_method_handler(echo),
                    "EchoStream": grpc.stream_stream_rpc_method_handler(echo_stream),
                },
            ),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())
