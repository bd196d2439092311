"""What metrics and spans cost a call: in one process and one run, as Markdown.

    python benchmarks/telemetry.py [--seconds 6] [--rounds 30]

First what is counted of one call, in a tight loop; the fastest round is shown. Then a call of 1 KiB that a grpc.aio
server answers with as much, on the event loop that it is called from: bare; through our interceptor, with nothing
counted; with the metrics of a call; with spans too, sent to a process that takes and forgets them. Kinds take turns.
Shown are the medians of all rounds: processor time of the whole process, the caller's included, and what it is to that
of the bare call of the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from forwardpass.wire.description import Function
from forwardpass.wire.methods import METHODS, MODEL_SERVICE
from forwardpass_server.access.access import Access
from forwardpass_server.calls.arrivals import Arrivals
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.rpc.interceptor import Interceptor
from forwardpass_server.telemetry.metrics import Metrics
from forwardpass_server.telemetry.spans import CallObserver, Tracing

METHOD = METHODS["PredictOnBatch"]
REQUEST = bytes(1024)
# A millisecond in the queue, two of computation, as time.perf_counter tells them.
ARRIVED, BEGAN, ENDED = 1.0, 1.001, 1.003
PORT_LINE = "listening on "


class Silent:
    """Metrics of a method, or anything else, of which nothing is kept."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: object) -> Any:
        return self


SILENT: Any = Silent()


def parts(metrics: Metrics) -> dict[str, Callable[[], object]]:
    """What is counted of one call, by which of its parts is."""
    rpc = metrics.rpcs.method("unary", MODEL_SERVICE, METHOD.name)
    models = metrics.models

    def begun_and_ended() -> None:
        rpc.started.inc()
        rpc.received_bytes.inc(1024)
        rpc.sent_bytes.inc(1024)
        rpc.handled("OK").inc()
        rpc.seconds.observe(0.004)

    def coded() -> None:
        models.decoded(0.0002)
        models.encoded(0.0002)

    return {
        "gRPC: begun, ended, its time, its bytes": begun_and_ended,
        "a call on a pipeline: ended, its time": lambda: metrics.rpcs.pipeline_call(METHOD.name, "OK", 0.004),
        "decoded, encoded": coded,
        "its wait, its computation, its examples, its batch": lambda: computed(models, models.batched_calls),
    }


def computed(observer: CallObserver, batched_calls: Callable[[int], object]) -> None:
    observer.batch("model", Function.PREDICT_ON_BATCH, 32)
    batched_calls(1)
    observer.call_ran("model", Function.PREDICT_ON_BATCH, ARRIVED, BEGAN, ENDED)


def microseconds(count: Callable[[], object], times: int = 2_000) -> float:
    started = time.perf_counter()
    for _ in range(times):
        count()
    return (time.perf_counter() - started) / times * 1e6


@contextlib.contextmanager
def sink() -> Iterator[str]:
    """The url of a process that takes spans."""
    process = subprocess.Popen([sys.executable, __file__, "--sink"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield "http://" + process.stdout.readline().removeprefix(PORT_LINE).strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def take_spans() -> None:
    """Answers every call with nothing, until the process is killed."""

    async def forget(request: bytes, context: object) -> bytes:
        return b""

    class Anything(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            return grpc.unary_unary_rpc_method_handler(forget)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers([Anything()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"{PORT_LINE}127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


class Kind:
    """One way to answer. metrics: None for none. tracing: None for no spans. is_bare: without our interceptor."""

    def __init__(self, metrics: Metrics | None, tracing: Tracing | None, *, is_bare: bool = False) -> None:
        models: Any = metrics.models if metrics else SILENT
        observer = tracing.of_calls(models) if tracing else models

        async def counting_echo(request: bytes, context: object) -> bytes:
            models.decoded(0.0002)
            computed(observer, models.batched_calls)
            models.encoded(0.0002)
            return request

        async def echo(request: bytes, context: object) -> bytes:
            return request

        self._echo = counting_echo if metrics else echo
        rpcs = metrics.rpcs if metrics else SILENT
        self._interceptors = [] if is_bare else [Interceptor(rpcs, Access(), Drain(), Arrivals(), tracing)]

    @contextlib.asynccontextmanager
    async def called(self) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
        """What makes one call."""
        server = grpc.aio.server(interceptors=self._interceptors)
        handler = grpc.unary_unary_rpc_method_handler(self._echo)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(MODEL_SERVICE, {METHOD.name: handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(METHOD.path)
            yield lambda: call(REQUEST)
        await server.stop(None)


async def processor_us(call: Callable[[], Awaitable[Any]], seconds: float) -> float:
    """Of one call, of those of so many seconds."""
    calls = 0
    end, started = time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < end:
        await call()
        calls += 1
    return (time.process_time() - started) / calls * 1e6


async def in_rounds(kinds: dict[str, Kind], seconds: float, rounds: int) -> list[dict[str, float]]:
    """What each kind took in each round."""
    async with contextlib.AsyncExitStack() as stack:
        calls = {name: await stack.enter_async_context(kind.called()) for name, kind in kinds.items()}
        for call in calls.values():
            await processor_us(call, 0.2)
        return [
            {name: await processor_us(call, seconds / rounds) for name, call in calls.items()} for _ in range(rounds)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each kind, in all rounds")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sink", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sink:
        asyncio.run(take_spans())
        return
    print("| counted of one call | us |\n|---|---|")
    for name, count in parts(Metrics()).items():
        print(f"| {name} | {min(microseconds(count) for _ in range(options.rounds)):.1f} |", flush=True)
    with sink() as url:
        tracing = Tracing(url)
        kinds = {
            "bare": Kind(None, None, is_bare=True),
            "with our interceptor": Kind(None, None),
            "and metrics": Kind(Metrics(), None),
            "and spans": Kind(Metrics(), tracing),
        }
        taken = asyncio.run(in_rounds(kinds, options.seconds, options.rounds))
        tracing.close()
    print("\n| a call | us of processor time | / bare |\n|---|---|---|")
    for name in kinds:
        spent_us = statistics.median(one[name] for one in taken)
        ratio = statistics.median(one[name] / one["bare"] for one in taken)
        print(f"| {name} | {spent_us:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
