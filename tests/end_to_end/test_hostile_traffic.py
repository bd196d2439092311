"""What the worst callers do to a real server: each has its answer, an honest caller is served, memory comes back.

The server has small limits, so that a test need not send much to reach them. `--log-cli-level=INFO` shows the figures.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import h2.events
import numpy as np
import pytest
from hyperframe.frame import ContinuationFrame, HeadersFrame

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import fields
from forwardpass.wire.methods import METHODS, MODEL_SERVICE, SERVICES, WEIGHTS_SERVICE
from forwardpass_server.access import tokens
from forwardpass_server.access.tokens import Role
from support.raw_http2 import RawConnection
from support.servers import ServerProcess, wait_until

_LOGGER = logging.getLogger(__name__)

MIB = 2**20
LIST = METHODS["ListModels"].path
PIPELINE = METHODS["Pipeline"].path

# A structure that is one array.
LEAF = v1.TreeDef(leaf=v1.TreeDef.Leaf())

# What gRPC calls them on the wire.
OK, RESOURCE_EXHAUSTED = "0", "8"

# An attack is made twice: what stays of the first is warmth, and what the second adds would be added by each.
# Of the server's memory at rest, some 500 MiB.
LEAK_BYTES = 48 * MIB


FACTORIES = ("--factory", "slow=support.zoo:slow", "--factory", "wide=support.zoo:wide_4k")
LIMITS = (
    *("--max-message-mib", "8", "--max-concurrent-mib", "32", "--connection-idle", "2", "--weights-mib", "64"),
    "--accept-compressed",
)


@pytest.fixture(scope="module")
def server():
    with ServerProcess(*FACTORIES, *LIMITS) as process:
        yield process


@pytest.fixture
def attack(server):
    """Makes an attack, twice, with an honest caller beside it."""

    return lambda make: attack_twice(server, make)


def attack_twice(server: ServerProcess, make: Callable[[], None], token: str | None = None) -> None:
    """token: of the honest caller."""
    with honest_caller(server, token) as seconds:
        make()
        before = server.resident_bytes()
        make()
    grown = server.resident_bytes() - before
    _LOGGER.info("%d honest calls, the slowest %.0f ms; %+.1f MiB", len(seconds), max(seconds) * 1e3, grown / MIB)
    assert grown < LEAK_BYTES


@contextlib.contextmanager
def honest_caller(server: ServerProcess, token: str | None) -> Iterator[list[float]]:
    """Calls all the time, and expects each call to be answered: its bound is its deadline. Yields their seconds."""
    stop, failures, answered = threading.Event(), [], []

    def call() -> None:
        with forwardpass_client.connect(server.address, timeout_s=30, token=token) as client:
            model = client.model("slow")
            while not stop.is_set():
                began = time.monotonic()
                try:
                    assert model.predict_on_batch(((), ()), [7]).tolist() == [7]
                except Exception as error:
                    failures.append(error)
                    return
                answered.append(time.monotonic() - began)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        wait_until(lambda: len(answered) > 10 or failures)
        yield answered
        served = len(answered)
        wait_until(lambda: len(answered) > served + 10 or failures)
    finally:
        stop.set()
        caller.join()
    assert not failures


def status_of(server: ServerProcess, path: str, request: bytes, **more) -> tuple[str, str]:
    """Name and message of the status of a unary call."""
    with grpc.insecure_channel(server.address, [("grpc.max_send_message_length", -1)]) as channel:
        try:
            channel.unary_unary(path)(request, timeout=30, **more)
        except grpc.RpcError as error:
            return error.code().name, error.details()
    return "OK", ""


def test_a_gzip_bomb_is_refused_by_its_decompressed_length(server, attack):
    bomb = gzip.compress(bytes(1024 * MIB))

    def make() -> None:
        with RawConnection(server.address) as connection:
            stream = connection.open(LIST, ("grpc-encoding", "gzip"))
            # What has no room in the window waits for it.
            position = 0
            message = b"\x01" + len(bomb).to_bytes(4, "big") + bomb
            while position < len(message):
                room = min(connection.h2.local_flow_control_window(stream), connection.h2.max_outbound_frame_size)
                if not room:
                    if connection.wait(lambda event: isinstance(event, h2.events.WindowUpdated)) is None:
                        break
                    continue
                piece = message[position : position + room]
                position += len(piece)
                connection.h2.send_data(stream, piece, end_stream=position == len(message))
                connection.flush()
            assert connection.status(stream)[0] == RESOURCE_EXHAUSTED

    attack(make)


def test_a_compressed_message_is_refused_by_default():
    with ServerProcess("--factory", "slow=support.zoo:slow") as unwilling:
        status, message = status_of(unwilling, LIST, b"", compression=grpc.Compression.Gzip)
    assert (status, message) == ("UNIMPLEMENTED", "Compression algorithm 'gzip' is disabled.")


def test_a_thousand_silent_streams_are_kept_until_their_connection_ends(server, attack):
    def make() -> None:
        with RawConnection(server.address) as connection:
            assert connection.h2.remote_settings.max_concurrent_streams == 1024
            for _ in range(1000):
                connection.open(PIPELINE)
            connection.flush()
            last = connection.open(LIST)
            connection.send(last, b"")
            assert connection.status(last) == (OK, "")

    attack(make)
    labels = f'grpc_method="Pipeline",grpc_service="{MODEL_SERVICE}",grpc_type="bidi_stream"'
    names = [f"grpc_server_{name}{{{labels}}}" for name in ("started_total", "handling_seconds_count")]
    wait_until(lambda: len({server.metrics()[name] for name in names}) == 1)


def test_sockets_that_never_speak_are_closed(server, attack):
    def make() -> None:
        host, _, port = server.address.rpartition(":")
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(200)]
            for one in sockets:
                one.settimeout(60)
                # The server's own first words, and then the end.
                while one.recv(65536):
                    pass

    attack(make)


def test_a_connection_without_a_call_is_closed(server):
    with RawConnection(server.address) as connection:
        assert connection.wait(lambda event: isinstance(event, h2.events.ConnectionTerminated)) is not None


def test_a_connection_that_does_not_speak_http2_is_closed(server, attack):
    def make() -> None:
        host, _, port = server.address.rpartition(":")
        for words in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00" + bytes(512), bytes(10_000)):
            with socket.create_connection((host, int(port)), timeout=60) as one:
                one.sendall(words)
                with contextlib.suppress(ConnectionError):
                    while one.recv(65536):
                        pass

    attack(make)


def test_streams_that_are_reset_as_soon_as_they_begin_cost_little(server, attack):
    def make() -> None:
        with RawConnection(server.address) as connection:
            for _ in range(100):
                for _ in range(100):
                    connection.h2.reset_stream(connection.open(PIPELINE), error_code=8)
                if not connection.flush():
                    # It has been thrown out.
                    return
            stream = connection.open(LIST)
            connection.send(stream, b"")
            assert connection.status(stream)[0] in (OK, "reset")

    attack(make)


def test_a_connection_with_endless_headers_is_closed(server, attack):
    def make() -> None:
        with RawConnection(server.address) as connection:
            stream = connection.h2.get_next_available_stream_id()
            # Of HPACK: a name and a value that stand for nothing, and are not remembered.
            field = b"\x00\x03x-a\x7f\x01" + b"y" * 128
            sent = connection.flush(HeadersFrame(stream, field * 100).serialize())
            for _ in range(1000):
                sent = sent and connection.flush(ContinuationFrame(stream, field * 100).serialize())
            # Or the connection ends without a word.
            connection.wait(lambda event: isinstance(event, h2.events.ConnectionTerminated))

    attack(make)


def test_a_flood_of_pings_ends_the_connection(server, attack):
    def make() -> None:
        with RawConnection(server.address) as connection:
            for _ in range(100):
                for _ in range(100):
                    connection.h2.ping(b"pingping")
                if not connection.flush():
                    return
            ended = connection.wait(lambda event: isinstance(event, h2.events.ConnectionTerminated))
            assert ended is None or ended.error_code == 11  # ENHANCE_YOUR_CALM

    attack(make)


GARBAGE = {
    "no field": b"\xff\xff\xff",
    "a varint without an end": b"\x08" + b"\x80" * 11,
    "longer than it is": b"\x0a\x7f" + b"x",
    "2^63 bytes": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "groups in groups": b"\x0b" * 10_000,
    "messages in messages": fields.prefix(5, 3000) + b"\x0a\x80\x17" * 1000,
    "not UTF-8": b"\x0a\x04\x0a\x02\xff\xfe",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("service", [MODEL_SERVICE, WEIGHTS_SERVICE])
def test_broken_protobufs_are_invalid_arguments(server, attack, service, garbage):
    def make() -> None:
        for method in SERVICES[service].values():
            if method.is_unary:
                status, message = status_of(server, method.path, garbage)
                # Some of it is a message after all, of a method that asks for little: fields that it does not know.
                assert status in ("INVALID_ARGUMENT", "NOT_FOUND", "OK"), (method.path, status, message)
                assert len(message) < 500

    attack(make)


def test_a_message_with_a_wrong_length_fails_without_affecting_others(server, attack):
    def make() -> None:
        with RawConnection(server.address) as connection:
            for size, flag in ((100, 0), (2**32 - 1, 0), (3, 0), (10, 1)):
                # To a message that ends before its end, gRPC has no answer but the deadline.
                stream = connection.open(LIST, ("grpc-timeout", "2S"))
                connection.send(stream, bytes(10), size=size, flag=flag)
                assert connection.status(stream)[0] != OK
            stream = connection.open(LIST)
            connection.send(stream, b"")
            assert connection.status(stream) == (OK, "")

    attack(make)


@pytest.mark.parametrize(
    "shape",
    [[-1], [0, 2**62], [2**62], [2**32, 2**32], [2**31, 2**31, 4], [2**63 - 1] * 8, [1] * 1000, [-(2**63), 2], [7]],
    ids=lambda shape: f"{shape[:2]} of {len(shape)}",
)
@pytest.mark.parametrize("data", [b"", b"\0\0\0\0"], ids=["nothing", "one number"])
def test_shapes_that_request_huge_memory_are_refused_without_an_allocation(server, attack, shape, data):
    tensor = v1.Tensor(data_type=v1.DataType.DATA_TYPE_FLOAT32, shape=shape, data=data)
    request = v1.PredictOnBatchRequest(model=v1.ModelSelector(name="wide"), x=v1.Structure(tree=LEAF, leaves=[tensor]))

    def make() -> None:
        status, message = status_of(server, METHODS["PredictOnBatch"].path, request.SerializeToString())
        assert status == "INVALID_ARGUMENT"
        assert message.startswith("x: ")

    attack(make)


def test_a_manifest_larger_than_the_server_allocates_no_memory(server, attack):
    manifest = v1.WeightsManifest(tree=LEAF)
    manifest.tensors.add(
        digest=bytes(32),
        spec=v1.TensorSpec(data_type=v1.DataType.DATA_TYPE_FLOAT32, shape=[2**40]),
        size_bytes=2**42,
    )
    request = v1.PutWeightsRequest(manifest=manifest).SerializeToString()

    def make() -> None:
        assert status_of(server, METHODS["PutWeights"].path, request)[0] in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")

    attack(make)


@pytest.mark.parametrize(
    "name", ["../slow", "slow/1", "/etc/passwd", "a\0b", "slow\0", "\r\nx: y", "n" * MIB, "\u202e"]
)
def test_invalid_names_are_not_found_and_are_shortened_in_the_error(server, attack, name):
    request = v1.GetModelRequest(model=v1.ModelSelector(name=name)).SerializeToString()

    def make() -> None:
        status, message = status_of(server, METHODS["GetModel"].path, request)
        assert status == "NOT_FOUND"
        assert len(message) < 2000
        assert message.isprintable()

    attack(make)


def test_excessive_metadata_is_refused(server, attack):
    def make() -> None:
        for metadata in ((("x-huge", "x" * MIB),), tuple((f"x-{index}", "y" * 100) for index in range(1000))):
            status, message = status_of(server, LIST, b"", metadata=metadata)
            assert status == "RESOURCE_EXHAUSTED", message

    attack(make)


def test_calls_that_never_arrive_completely_use_at_most_a_share_and_release_it(tmp_path):
    made = {name: tokens.create(name, [Role.CALL], None) for name in ("honest", "hostile")}
    (tmp_path / "tokens").write_text("".join(token.line() + "\n" for _, token in made.values()))
    metadata = (("authorization", f"Bearer {made['hostile'][0]}"),)

    def make() -> None:
        # 20 streams announce 8 MiB each and send half of it; a share is 16 MiB.
        done, answers = threading.Event(), []

        def announce() -> Iterator[bytes]:
            frame = v1.CallFrame(call=1, method="ListModels", size_bytes=8 * MIB, data=bytes(MIB))
            for _ in range(4):
                yield v1.PipelineRequest(frames=[frame]).SerializeToString()
                frame = v1.CallFrame(call=1, data=bytes(MIB))
            done.wait(60)

        def first_answer(stream) -> None:
            with contextlib.suppress(grpc.RpcError):
                answers.extend(v1.PipelineResponse.FromString(next(stream)).frames)

        with grpc.insecure_channel(server.address) as channel, concurrent.futures.ThreadPoolExecutor(20) as pool:
            pipeline = channel.stream_stream(PIPELINE)
            streams = [pipeline(announce(), timeout=60, metadata=metadata) for _ in range(20)]
            for stream in streams:
                pool.submit(first_answer, stream)
            wait_until(lambda: len(answers) >= 18)
            assert {(frame.status, frame.message) for frame in answers} == {
                (8, f"this principal's calls: expected at most {16 * MIB} bytes at once, got {24 * MIB}")
            }
            done.set()
            for stream in streams:
                stream.cancel()

    with ServerProcess(*FACTORIES, *LIMITS, "--tokens", str(tmp_path / "tokens")) as server:
        attack_twice(server, make, made["honest"][0])
        with forwardpass_client.connect(server.address, token=made["hostile"][0]) as client:
            # Nothing of it is left: a share's worth of calls has room.
            model = client.model("wide")
            x = np.ones((450_000, 4), np.float32)
            with model.pipeline(model.initial_weights) as calls:
                found = [calls.predict_on_batch(x) for _ in range(2)]
            assert [len(future.result()) for future in found] == [len(x)] * 2
