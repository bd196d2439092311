"""A server is started and ready when it can do what it is for: required models, and the session store."""

from __future__ import annotations

import concurrent.futures
import shutil
import urllib.request

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc

import forwardpass_client
from forwardpass import v1
from forwardpass.wire.methods import METHODS
from forwardpass_client import errors
from forwardpass_client.cli.commands import forwardpass
from support import golden, zoo
from support.redis_servers import RedisProcess
from support.servers import ServerProcess, wait_until

COUNTING = ("--factory", "counting=support.zoo:counting")
BROKEN = ("--factory", "broken=support.zoo:missing")
UP = "forwardpass_session_store_up"

NOT_FOUND = "model digits cannot be called: it is not among the models of this server"
EMPTY = "no model can be called: add one to the model repository, or start with --required-models none"


def health(server: ServerProcess) -> dict[str, bool]:
    """What probes are told."""
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return {
            service: stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
            == health_pb2.HealthCheckResponse.SERVING
            for service in ("startup", "ready", "live")
        }


def scraped(server: ServerProcess) -> dict[str, bool]:
    metrics = server.metrics()
    names = {"startup": "started", "ready": "ready", "live": "live"}
    return {service: metrics[f"forwardpass_{name}"] == 1 for service, name in names.items()}


def page(server: ServerProcess) -> str:
    with urllib.request.urlopen(server.metrics_url.removesuffix("metrics")) as response:
        return str(response.read().decode())


def write(repository, name: str, version: int, *, broken: bool = False) -> None:
    folder = repository / name / str(version)
    folder.mkdir(parents=True)
    if broken:
        (folder / "notes.txt").write_text("no model")
    else:
        shutil.copytree(golden.FOLDER / "no_metrics" / "saved_model", folder, dirs_exist_ok=True)


NOWHERE = {"startup": False, "ready": False, "live": True}
EVERYWHERE = {"startup": True, "ready": True, "live": True}


@pytest.mark.parametrize(
    "models, required, reason",
    [
        ({}, (), EMPTY),
        ({"digits": {1: "broken"}}, (), "model digits cannot be called: digits/1 failed: expected a saved_model.pb"),
        ({"digits": {1: "broken"}, "other": {1: "good"}}, (), "model digits cannot be called: digits/1 failed"),
        ({"other": {1: "good"}}, ("digits,other",), NOT_FOUND),
        ({"digits": {1: "good", 2: "broken"}}, ("digits/2",), "model digits/2 cannot be called: digits/2 failed"),
    ],
    ids=["empty repository", "only version", "one of two models", "not in the repository", "required version"],
)
def test_a_server_without_a_required_model_is_neither_started_nor_ready_and_says_why(
    tmp_path, models, required, reason
):
    for name, versions in models.items():
        for version, state in versions.items():
            write(tmp_path, name, version, broken=state == "broken")
    arguments = ["--model-repository", str(tmp_path), *(f"--required-models={names}" for names in required)]
    with ServerProcess(*arguments, waits_for="not ready: ") as server:
        assert health(server) == scraped(server) == NOWHERE
        assert server.ready_line.startswith(f"not ready: {reason}")
        server.wait_for_log(f"not ready: {reason}")
        assert reason in page(server)
        with forwardpass_client.connect(server.address) as client:
            assert not client.is_ready()
            (found,) = client.unready_reasons()
            assert found.startswith(reason)
        told = CliRunner().invoke(forwardpass, ["health", server.address])
        assert told.exit_code == 1
        assert reason in told.output


@pytest.mark.parametrize(
    "models, required",
    [
        ({}, ("none",)),
        ({"digits": {1: "good", 2: "broken"}}, ()),
        ({"digits": {1: "broken"}, "other": {1: "good"}}, ("other",)),
    ],
    ids=["no model required", "an older version serves", "another model"],
)
def test_a_server_that_can_call_the_required_models_is_ready(tmp_path, models, required):
    for name, versions in models.items():
        for version, state in versions.items():
            write(tmp_path, name, version, broken=state == "broken")
    arguments = ["--model-repository", str(tmp_path), *(f"--required-models={names}" for names in required)]
    with ServerProcess(*arguments) as server, forwardpass_client.connect(server.address) as client:
        assert health(server) == scraped(server) == EVERYWHERE
        assert client.is_ready()
        assert client.unready_reasons() == []


def test_a_repaired_model_makes_the_server_ready_and_an_unloaded_one_is_no_longer_required(tmp_path):
    write(tmp_path, "digits", 1, broken=True)
    write(tmp_path, "other", 1)
    arguments = ("--model-repository", str(tmp_path), "--management-port", "0")
    with ServerProcess(*arguments, waits_for="not ready: ") as server:

        def manage(method: str, name: str, request) -> None:
            selector = v1.ModelSelector(name=name, version=1)
            with grpc.insecure_channel(server.management_address) as channel:
                channel.unary_unary(METHODS[method].path)(request(model=selector).SerializeToString(), timeout=60)

        shutil.rmtree(tmp_path / "digits" / "1")
        write(tmp_path, "digits", 1)
        manage("LoadModel", "digits", v1.LoadModelRequest)
        server.wait_until_ready()
        assert health(server) == EVERYWHERE
        manage("UnloadModel", "digits", v1.UnloadModelRequest)
        assert health(server) == EVERYWHERE
        manage("UnloadModel", "other", v1.UnloadModelRequest)
        # Nothing is left to call. A start is not taken back: Kubernetes would kill the server.
        assert health(server) == {"startup": True, "ready": False, "live": True}
        server.wait_for_log(f"not ready: {EMPTY}")


def test_a_server_starts_once_its_session_store_is_reached(tmp_path):
    with RedisProcess(tmp_path) as redis:
        redis.kill()
        with ServerProcess(*COUNTING, "--session-store", redis.url, waits_for="not ready: ") as server:
            reason = "the session store cannot be reached"
            assert server.ready_line == f"not ready: {reason}"
            assert health(server) == scraped(server) == NOWHERE
            assert server.metrics()[UP] == 0
            assert reason in page(server)
            with forwardpass_client.connect(server.address) as client:
                assert client.unready_reasons() == [reason]
            redis.start()
            server.wait_until_ready()
            assert health(server) == EVERYWHERE
            assert server.metrics()[UP] == 1
        # One line when it fails, and one when it works.
        assert sum("fails: " in line for line in server.log) == 1
        assert sum("works again" in line for line in server.log) == 1


def test_a_session_store_that_fails_later_is_shown_and_callers_get_an_error_within_their_deadline(tmp_path):
    x, y = zoo.counting_batch(1)
    with (
        RedisProcess(tmp_path) as redis,
        ServerProcess(*COUNTING, "--session-store", redis.url) as server,
        forwardpass_client.connect(server.address) as client,
    ):
        model = client.model("counting")
        session = model.metrics_session()
        session.forward_pass(model.initial_weights, (x, y))
        redis.pause()
        # On its way while nobody knows yet that Redis hangs, too.
        with pytest.raises(errors.SessionStoreUnavailable, match="did not answer within"):
            session.forward_pass(model.initial_weights, (x, y), timeout_s=20)
        wait_until(lambda: server.metrics()[UP] == 0)
        assert "did not answer within" in page(server)
        with forwardpass_client.connect(server.address, timeout_s=8) as hasty:
            asked = hasty.model("counting")
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                told = [pool.submit(asked.metrics_session).exception for _ in range(8)]
                assert {type(error()) for error in told} == {errors.SessionStoreUnavailable}
        # All other calls go on, and the server is ready for them.
        assert health(server) == EVERYWHERE
        assert np.array_equal(model.predict_on_batch(model.initial_weights, x), model.initial_weights[0][0][x])
        redis.resume()
        wait_until(lambda: server.metrics()[UP] == 1)
        # Nobody knows whether the update has counted: made again, it counts once.
        session.forward_pass(model.initial_weights, (x, y))
        assert session.updates == 2


def test_a_call_of_an_unavailable_store_fails_at_once(tmp_path):
    with RedisProcess(tmp_path) as redis, ServerProcess(*COUNTING, "--session-store", redis.url) as server:
        redis.pause()
        wait_until(lambda: server.metrics()[UP] == 0)
        with grpc.insecure_channel(server.address) as channel:
            open_session = channel.unary_unary(METHODS["OpenSession"].path)
            request = v1.OpenSessionRequest(model=v1.ModelSelector(name="counting"), session_id=b"1" * 16)
            answers = []
            for _ in range(20):
                with pytest.raises(grpc.RpcError) as raised:
                    # Far below the seconds that Redis is waited for. One call now and then tries it.
                    open_session(request.SerializeToString(), timeout=1)
                answers.append(raised.value.code())
        assert answers.count(grpc.StatusCode.UNAVAILABLE) >= 15
