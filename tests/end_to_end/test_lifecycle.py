"""A server's start, its end, and what callers notice of them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import forwardpass_client
from forwardpass.wire.methods import MANAGEMENT_SERVICE, METHODS, MODEL_SERVICE
from forwardpass_client import errors
from support import zoo
from support.servers import ServerProcess, read_metrics, wait_until

SLOW = ("--factory", "slow=support.zoo:slow")


def rounds_of(client, seconds: float) -> list[int]:
    """An input for which the slow model computes for about so long, on this machine, now."""
    model = client.model("slow")
    started = time.monotonic()
    model.predict_on_batch(((), ()), [20_000])
    return [int(20_000 * seconds / (time.monotonic() - started))]


def test_sigterm_lets_running_calls_end_and_exits_with_0():
    with ServerProcess(*SLOW) as server, forwardpass_client.connect(server.address) as client:
        x = rounds_of(client, 1.5)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            # One computation waits for the other's thread.
            calls = [pool.submit(client.model("slow").predict_on_batch, ((), ()), x) for _ in range(4)]
            wait_until(lambda: server.metrics().get(started_calls("PredictOnBatch"), 0) >= 5)
            assert server.terminate() == 0
            assert [call.result().tolist() for call in calls] == [x] * 4


def test_a_computation_that_does_not_end_is_cancelled_after_the_drain_timeout():
    with ServerProcess(*SLOW, "--drain-timeout", "1") as server, forwardpass_client.connect(server.address) as client:
        model = client.model("slow")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            call = pool.submit(model.predict_on_batch, ((), ()), [10**8])
            wait_until(lambda: server.metrics().get(started_calls("PredictOnBatch"), 0) >= 1)
            assert server.terminate() == 0
            with pytest.raises((errors.ServerUnavailable, errors.CallCancelled)):
                call.result(30)
        server.wait_for_log("a computation was still running at the end of the drain timeout")


def test_a_slow_call_among_fast_calls_of_the_same_size_does_not_delay_other_calls():
    with ServerProcess(*SLOW) as server, forwardpass_client.connect(server.address) as client:
        x = rounds_of(client, 3)
        model = client.model("slow")
        for _ in range(5):
            model.predict_on_batch(((), ()), [1])
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            call = pool.submit(model.predict_on_batch, ((), ()), x)
            wait_until(lambda: server.metrics().get(started_calls("PredictOnBatch"), 0) >= 7)
            assert client.is_ready()
            assert not call.done()
            assert call.result().tolist() == x


def started_calls(method: str) -> str:
    return f'grpc_server_started_total{{grpc_method="{method}",grpc_service="{MODEL_SERVICE}",grpc_type="unary"}}'


def test_no_call_fails_when_a_server_stops_and_another_one_runs(repository):
    arguments = (*zoo.serving(repository), "--drain-delay", "0.6")
    x, y = zoo.keras_batch(3)
    with ServerProcess(*arguments) as first, ServerProcess(*arguments) as second:
        with forwardpass_client.connect(f"ipv4:{first.address},{second.address}") as client:
            model = client.model("keras_cnn")
            weights = model.initial_weights
            expected = model.forward_pass(weights, (x, y), training=False).predictions
            stop = threading.Event()
            completed = []

            def call() -> None:
                while not stop.is_set():
                    found = model.forward_pass(weights, (x, y), training=False)
                    assert np.array_equal(found.predictions, expected)
                    completed.append(1)

            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                callers = [pool.submit(call) for _ in range(8)]
                wait_until(lambda: len(completed) > 100)
                assert first.terminate() == 0
                before = len(completed)
                wait_until(lambda: len(completed) > before + 100)
                stop.set()
                for caller in callers:
                    caller.result()


def test_a_killed_server_raises_server_unavailable_within_seconds():
    with ServerProcess(*SLOW) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("slow")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            call = pool.submit(model.predict_on_batch, ((), ()), [10**8])
            wait_until(lambda: server.metrics().get(started_calls("PredictOnBatch"), 0) >= 1)
            started = time.monotonic()
            server.process.kill()
            with pytest.raises(errors.ServerUnavailable):
                call.result(30)
        assert time.monotonic() - started < 20


def test_the_server_keeps_serving_after_a_caller_disconnects():
    with ServerProcess(*SLOW) as server, forwardpass_client.connect(server.address) as client:
        x = rounds_of(client, 0.5)
        script = (
            "import sys, forwardpass_client as f;"
            "m = f.connect(sys.argv[1]).model('slow'); print('calling', flush=True);"
            "m.predict_on_batch(((), ()), [int(sys.argv[2])])"
        )
        caller = subprocess.Popen(
            [sys.executable, "-c", script, server.address, str(x[0] * 4)], stdout=subprocess.PIPE, text=True
        )
        assert caller.stdout.readline() == "calling\n"
        wait_until(lambda: server.metrics().get(started_calls("PredictOnBatch"), 0) >= 2)
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        caller.stdout.close()
        labels = f'grpc_method="PredictOnBatch",grpc_service="{MODEL_SERVICE}",grpc_type="unary"'
        cancelled = f'grpc_server_handled_total{{grpc_code="Canceled",{labels}}}'
        wait_until(lambda: server.metrics().get(cancelled) == 1)
        assert client.model("slow").predict_on_batch(((), ()), x).tolist() == x


def test_calls_beyond_the_limit_are_refused_at_once():
    with ServerProcess(*SLOW, "--max-concurrent-calls", "2") as server:
        with forwardpass_client.connect(server.address) as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
            model = client.model("slow")
            x = rounds_of(client, 2)
            running = [pool.submit(model.predict_on_batch, ((), ()), x) for _ in range(2)]
            wait_until(lambda: server.metrics().get(started_calls("PredictOnBatch"), 0) >= 3)
            with pytest.raises(errors.ServerOverloaded, match="calls: expected at most 2 at once, got more"):
                model.predict_on_batch(((), ()), [1])
            assert [call.result().tolist() for call in running] == [x, x]
            assert model.predict_on_batch(((), ()), [1]).tolist() == [1]


def test_a_model_that_is_still_loading_is_waited_for_or_refused(tmp_path):
    # The factory waits for a file: the server listens meanwhile.
    module = tmp_path / "late_model.py"
    gate = tmp_path / "gate"
    module.write_text(
        "import os, time\nfrom support import zoo\n"
        f"def late():\n    while not os.path.exists({str(gate)!r}):\n        time.sleep(0.05)\n    return zoo.slow()\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        [*command, "--factory", "late=late_model:late"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        metrics_url = process.stdout.readline().removeprefix("metrics on ").strip()
        address = process.stdout.readline().removeprefix("listening on ").strip()
        with forwardpass_client.connect(address) as client:
            assert not client.is_ready()
            assert [health(address, service) for service in ("startup", "ready", "live")] == [
                "NOT_SERVING",
                "NOT_SERVING",
                "SERVING",
            ]
            assert scraped_health(read_metrics(metrics_url)) == {"started": 0, "live": 1, "ready": 0, "draining": 0}
            assert [(found.name, found.state) for found in client.models()] == [("late", "loading")]
            with pytest.raises(errors.ModelLoading, match="model late/1 is still being loaded"):
                client.model("late")
            with pytest.raises(errors.DeadlineExceeded, match=r"not ready within 0\.3 s"):
                client.wait_until_ready(0.3)
            gate.write_text("")
            client.wait_until_ready()
            assert client.model("late").predict_on_batch(((), ()), [3]).tolist() == [3]
            assert scraped_health(read_metrics(metrics_url)) == {"started": 1, "live": 1, "ready": 1, "draining": 0}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def scraped_health(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"forwardpass_{name}"] for name in ("started", "live", "ready", "draining")}


def health(address: str, service: str) -> str:
    with grpc.insecure_channel(address) as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        except grpc.RpcError as error:
            return error.code().name
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


@pytest.mark.parametrize(
    "service, status",
    [
        ("", "SERVING"),
        (MODEL_SERVICE, "SERVING"),
        ("model/keras_cnn", "SERVING"),
        ("model/keras_cnn/2", "SERVING"),
        ("model/broken", "NOT_SERVING"),
        ("model/broken/1", "NOT_SERVING"),
        ("model/nonsense", "NOT_FOUND"),
        ("startup", "SERVING"),
        ("ready", "SERVING"),
        ("live", "SERVING"),
    ],
)
def test_health_answers_for_the_server_and_for_each_model(server, service, status):
    assert health(server.address, service) == status


def test_health_can_be_watched_while_the_server_drains():
    with ServerProcess(*SLOW, "--drain-delay", "0.5") as server, grpc.insecure_channel(server.address) as channel:
        statuses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.process.wait(30) == 0


def test_a_draining_server_is_live_and_not_ready():
    with ServerProcess(*SLOW, "--drain-delay", "5") as server, grpc.insecure_channel(server.address) as channel:
        statuses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="ready"))
        assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert [health(server.address, service) for service in ("startup", "live", "", "model/slow")] == [
            "SERVING",
            "SERVING",
            "NOT_SERVING",
            "NOT_SERVING",
        ]
        assert scraped_health(server.metrics()) == {"started": 1, "live": 1, "ready": 0, "draining": 1}


def test_the_management_port_reports_serving():
    broken = ("--factory", "broken=support.zoo:missing", "--management-port", "0")
    with ServerProcess(*broken, waits_for="not ready: ") as server:
        answers = {service: health(server.management_address, service) for service in ("", MANAGEMENT_SERVICE, "ready")}
        # Whether models can be called is for the other port to say.
        assert answers == {"": "SERVING", MANAGEMENT_SERVICE: "SERVING", "ready": "NOT_FOUND"}


# A download is finished, as calls are.
HOLDING = [method for method in METHODS.values() if not method.is_unary and method.name != "DownloadTensor"]


def test_open_streams_end_when_the_server_drains():
    arguments = (*SLOW, "--management-port", "0", "--drain-timeout", "600")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ServerProcess(*arguments))
        never = threading.Event()
        stack.callback(never.set)

        def nothing_more(*first: object) -> Iterator[object]:
            yield from first
            never.wait()

        endings: list[Callable[[], object]] = []
        for address in (server.address, server.management_address):
            channel = stack.enter_context(grpc.insecure_channel(address))
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            listing = nothing_more(reflection_pb2.ServerReflectionRequest(list_services=""))
            reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(listing)
            next(watch), next(reflected)
            endings += [functools.partial(list, watch), functools.partial(list, reflected)]
        channel = stack.enter_context(grpc.insecure_channel(server.address))
        for method in HOLDING:
            if method.streams_responses:
                endings.append(functools.partial(list, channel.stream_stream(method.path)(nothing_more())))
            else:
                endings.append(channel.stream_unary(method.path).future(nothing_more()).result)
        wait_until(lambda: all(has_started(server, method.path) for method in HOLDING))
        assert server.terminate() == 0
        for ending in endings:
            with pytest.raises(grpc.RpcError) as raised:
                ending()
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def has_started(server: ServerProcess, path: str) -> bool:
    _, service, method = path.split("/")
    name = f'grpc_server_started_total{{grpc_method="{method}",grpc_service="{service}"'
    return any(found.startswith(name) and value for found, value in server.metrics().items())


def test_reflection_lists_the_services_and_their_methods(server):
    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=MODEL_SERVICE),
        ]
        listed, described = stub.ServerReflectionInfo(iter(requests))
    names = {service.name for service in listed.list_services_response.service}
    assert {MODEL_SERVICE, "grpc.health.v1.Health"} <= names
    assert any(b"PredictOnBatch" in file for file in described.file_descriptor_response.file_descriptor_proto)


@pytest.mark.parametrize(
    "path", ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"], ids=["unary", "stream"]
)
def test_garbage_for_other_services_is_an_invalid_argument_too(server, path):
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(path) if path.endswith("Check") else channel.unary_stream(path)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(b"\xff\xfe", timeout=10)) if path.endswith("Watch") else call(b"\xff\xfe", timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "not a valid message" in caught.value.details()


def test_garbage_for_reflection_is_an_invalid_argument_too(server):
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([b"\xff\xfe"]), timeout=10))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def run_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forwardpass_server.app.cli", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_used_port_ends_the_program_with_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_serve(*SLOW, "--port", str(port), "--metrics-port", "-1")
        assert done.returncode == 1
        assert f"Error: cannot listen on 127.0.0.1:{port}: choose another address or port" in done.stderr
        done = run_serve(*SLOW, "--port", "0", "--metrics-port", str(port))
        assert done.returncode == 1
        sentence = f"--metrics-port: cannot listen on 127.0.0.1:{port}: Address already in use: choose another address"
        assert f"Error: {sentence} or port" in done.stderr


def test_an_invalid_version_policy_ends_the_program_with_one_line(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "forwardpass-versions.json").write_text("{")
    done = run_serve("--model-repository", str(tmp_path), "--port", "0")
    assert done.returncode == 1
    assert "Error: --model-repository: m/forwardpass-versions.json: expected JSON: " in done.stderr


def test_a_factory_for_a_model_that_the_repository_has_is_refused(repository):
    name = "keras_cnn_emnist"
    done = run_serve("--model-repository", str(repository), "--factory", f"{name}=support.zoo:slow", "--port", "0")
    assert done.returncode == 1
    assert f"Error: --factory: the model repository has a {name}/1 already" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--model-repository: expected a folder; without one, give at least one --factory"),
        (("--model-repository", "/nowhere"), "--model-repository: expected a folder, got '/nowhere'"),
        (("--factory", "slow"), "--factory: expected NAME=MODULE:FUNCTION, got 'slow'"),
        (("--factory", "slow=zoo"), "--factory: expected NAME=MODULE:FUNCTION, got slow=zoo"),
        (("--factory", "../x=a:b"), "--factory: expected a model name like"),
        (("--factory", "a=b:c", "--factory", "a=d:e"), "--factory: a is given twice"),
        ((*SLOW, "--port", "65536"), "--port: expected 0 to 65535, got 65536"),
        ((*SLOW, "--metrics-port", "99999"), "--metrics-port: expected 0 to 65535, got 99999"),
        ((*SLOW, "--max-message-mib", "2048"), "--max-message-mib: expected 4 to 2047, got 2048"),
        ((*SLOW, "--max-message-mib", "3"), "--max-message-mib: expected 4 to 2047, got 3"),
        ((*SLOW, "--execution-threads", "0"), "--execution-threads: expected at least 1, got 0"),
        ((*SLOW, "--max-concurrent-calls", "0"), "--max-concurrent-calls: expected at least 1, got 0"),
        ((*SLOW, "--repository-poll", "1"), "--repository-poll: requires --model-repository"),
        ((*SLOW, "--device-timeout", "0.5"), "--device-timeout: expected seconds >= 1, got 0.5"),
        ((*SLOW, "--drain-delay", "-1"), "--drain-delay: expected seconds >= 0, got -1"),
        ((*SLOW, "--drain-timeout", "nan"), "--drain-timeout: expected seconds >= 0, got nan"),
        (
            (*SLOW, "--host", "0.0.0.0"),
            "--host: other machines can reach 0.0.0.0, without encryption and authentication: give "
            "--tls-certificate, --tls-key and --tokens or --tls-client-ca, or else --insecure",
        ),
        ((*SLOW, "--host", "::"), "--host: other machines can reach ::, without encryption"),
        (
            (*SLOW, "--management-host", "0.0.0.0", "--management-port", "0"),
            "--management-host: other machines can reach 0.0.0.0, without authentication: give --tokens or "
            "--tls-client-ca, or else --insecure",
        ),
        ((*SLOW, "--management-port", "65536"), "--management-port: expected 0 to 65535, got 65536"),
        ((*SLOW, "--tls-certificate", "x"), "--tls-certificate and --tls-key: give both or neither"),
        ((*SLOW, "--tls-client-ca", "x"), "--tls-client-ca: requires --tls-certificate and --tls-key"),
        (
            (*SLOW, "--tls-certificate", "/none", "--tls-key", "/none"),
            "--tls-certificate, --tls-key, --tls-client-ca: ",
        ),
        ((*SLOW, "--tokens", "/none"), "--tokens: [Errno 2] No such file or directory: '/none'"),
        ((*SLOW, "--tokens", __file__), "--tokens: test_lifecycle.py: line 1: expected sha256:HEX PRINCIPAL"),
        ((*SLOW, "--open", "health"), "--open: requires --tokens or --tls-client-ca"),
        (
            (*SLOW, "--max-concurrent-calls-per-principal", "0"),
            "--max-concurrent-calls-per-principal: expected at least",
        ),
        ((*SLOW, "--connection-idle", "-1"), "--connection-idle: expected seconds >= 0, got -1"),
        ((*SLOW, "--weights-folder", "/proc/none"), "--weights-folder: [Errno 2] No such file or directory"),
        (
            (*SLOW, "--weights-folder", "file:///proc/none/weights"),
            "--weights-folder: file:///proc/none/weights: [Errno 2]",
        ),
        (
            (*SLOW, "--weights-folder", "http://host/weights"),
            "--weights-folder: expected a folder, or a URL file:///FOLDER",
        ),
        (("--model-repository", "file:///none"), "--model-repository: file:///none cannot be copied: there is no"),
        (
            (*SLOW, "--repository-cache", "/tmp"),
            "--repository-cache: requires --model-repository with a URL",
        ),
        ((*SLOW, "--device", "tpu"), "device: expected auto, cpu, gpu or gpu:N, got 'tpu'"),
        ((*SLOW, "--device", "cpu:7"), "device: expected one of ['cpu:0'], got 'cpu:7'"),
    ],
)
def test_an_invalid_setting_ends_the_program_before_a_port_opens(arguments, message):
    done = run_serve("--port", "0", "--metrics-port", "-1", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_settings_can_come_from_the_environment():
    with ServerProcess(environment={"FORWARDPASS_FACTORIES": "slow=support.zoo:slow"}) as server:
        with forwardpass_client.connect(server.address) as client:
            assert [found.name for found in client.models()] == ["slow"]


def test_metrics_count_calls_by_method_and_code(server, client):
    before = server.metrics()
    model = client.model("no_metrics")
    weights = model.initial_weights
    for _ in range(3):
        model.predict_on_batch(weights, np.zeros((5, 4), np.float32))
    with pytest.raises(errors.ModelNotFound):
        client.model("nonsense")
    after = server.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    labels = f'grpc_method="PredictOnBatch",grpc_service="{MODEL_SERVICE}",grpc_type="unary"'
    assert grown(f"grpc_server_started_total{{{labels}}}") == 3
    assert grown(f'grpc_server_handled_total{{grpc_code="OK",{labels}}}') == 3
    assert grown(f"grpc_server_handling_seconds_count{{{labels}}}") == 3
    assert grown(started_calls("GetModel").replace("started", "handled").replace("{", '{grpc_code="NotFound",')) == 1
    batches = 'function="predict_on_batch",model="no_metrics"'
    assert grown(f"forwardpass_batch_examples_sum{{{batches}}}") == 15
    assert after['forwardpass_models{state="failed"}'] == 1
    assert after['forwardpass_models{state="loading"}'] == 0
    assert after['forwardpass_models{state="available"}'] == len(client.models()) - 1


def test_unknown_method_names_do_not_become_metric_labels(server):
    with grpc.insecure_channel(server.address) as channel:
        for index in range(5):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/made.up.Service{index}/Method")(b"", timeout=10)
    assert not any("made" in name for name in server.metrics())
