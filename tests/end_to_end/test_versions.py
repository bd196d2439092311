"""Versions that come, change and go in the repository of a real server, under callers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import shutil
import threading
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf.descriptor import Descriptor

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import errors, messages
from forwardpass.wire.errors import DETAIL_KEY
from forwardpass.wire.methods import MANAGEMENT_SERVICE, METHODS, SERVICES
from forwardpass.wire.structures import Structure
from forwardpass_client.cli.commands import forwardpass
from support.multiplying import write
from support.redis_servers import RedisProcess
from support.servers import ServerProcess, wait_until


def label(folder: pathlib.Path, **labels: int) -> None:
    (folder / "forwardpass-versions.json").write_text(json.dumps({"labels": labels}))


def predictions(client: forwardpass_client.Client, weights: Any) -> list[float]:
    """Of version 2; none where it is changed between the look at it and the call."""
    with contextlib.suppress(errors.ModelChanged):
        return client.model("times", 2).predict_on_batch(weights, [3.0]).tolist()
    return []


def test_no_call_fails_while_versions_are_added_changed_and_removed(tmp_path):
    folder = tmp_path / "times"
    folder.mkdir()
    write(folder, 1, 1)
    label(folder, stable=1)
    with ServerProcess("--model-repository", str(tmp_path), "--repository-poll", "0.2") as server:
        with forwardpass_client.connect(server.address) as client:
            first = client.model("times", label="stable")
            weights = first.initial_weights
            stop, errors_met, calls = threading.Event(), [], []

            def call() -> None:
                with first.metrics_session() as session:
                    try:
                        while not stop.is_set():
                            assert first.predict_on_batch(weights, [3.0]).tolist() == [3]
                            session.forward_pass(weights, ([1.0], [0.0]))
                            calls.append(1)
                        assert session.result() == {"total": len(calls)}
                    except Exception as error:
                        errors_met.append(error)

            caller = threading.Thread(target=call)
            caller.start()

            write(folder, 2, 2)
            label(folder, stable=1, canary=2)
            wait_until(lambda: client.model("times").version == 2, 60)
            second = client.model("times", label="canary")
            assert second.predict_on_batch(weights, [3.0]).tolist() == [6]
            assert [found.labels for found in client.models()] == [("stable",), ("canary",)]

            # A label that moves is for whoever asks from then on: `first` goes on with what it was.
            label(folder, stable=2, canary=2, old=1)
            wait_until(lambda: client.model("times", label="stable").version == 2)
            assert (first.version, client.model("times", label="old").version) == (1, 1)
            label(folder, stable=1, canary=2)
            wait_until(lambda: client.model("times", label="stable").version == 1)

            # Another content under the same name is another model: its client is told.
            write(folder, 2, 5)
            wait_until(lambda: predictions(client, weights) == [15], 60)
            with pytest.raises(errors.ModelChanged):
                second.predict_on_batch(weights, [3.0])

            for file in (folder / "2").glob("*.pb"):
                file.write_bytes(b"broken")
            wait_until(lambda: client.models()[1].error != "", 60)
            assert client.models()[1].state == "available"
            assert client.model("times", 2).predict_on_batch(weights, [3.0]).tolist() == [15]

            shutil.rmtree(folder / "2")
            label(folder, stable=1)
            wait_until(lambda: len(client.models()) == 1, 60)
            with pytest.raises(errors.ModelVersionNotFound, match="label of model 'times': expected one of stable"):
                client.model("times", label="canary")
            before = len(calls)
            wait_until(lambda: len(calls) > before + 5 or bool(errors_met))
            stop.set()
            caller.join(30)
            assert errors_met == []


REFUSE = ("--unload-with-sessions", "refuse", "--management-port", "0")


def answer(address: str, method: str, request: bytes) -> Any:
    """What a client without our checks is answered. Raises errors of the catalogue."""
    with grpc.insecure_channel(address) as channel:
        try:
            data = channel.unary_unary(METHODS[method].path)(request, timeout=30)
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            raise errors.decode(error.code().name, error.details(), trailing.get(DETAIL_KEY)) from None
    return METHODS[method].response.FromString(data)


def manage(server: ServerProcess, method: str, version: int) -> None:
    """Has the operator do something with a version of `times`."""
    request = METHODS[method].request(model=v1.ModelSelector(name="times", version=version))
    answer(server.management_address, method, request.SerializeToString())


def test_a_version_waits_for_sessions_that_another_server_has(tmp_path):
    folder = tmp_path / "models" / "times"
    folder.mkdir(parents=True)
    for version in (1, 2):
        write(folder, version, version)
    with RedisProcess(tmp_path) as redis, contextlib.ExitStack() as stack:
        arguments = ("--model-repository", str(tmp_path / "models"), "--session-store", redis.url, *REFUSE)
        one, other = (stack.enter_context(ServerProcess(*arguments, "--repository-poll", "0.2")) for _ in range(2))
        client, away = (stack.enter_context(forwardpass_client.connect(server.address)) for server in (one, other))
        model = away.model("times", 1)
        session = model.metrics_session()
        with pytest.raises(errors.ModelInUse, match="model times/1: expected no open metric sessions, got 1"):
            manage(one, "UnloadModel", 1)
        shutil.rmtree(folder / "1")
        for asked in (client, away):
            wait_until(lambda asked=asked: "waits for its sessions" in asked.models()[0].error, 60)
            assert [found.state for found in asked.models()] == ["available", "available"]
        session.forward_pass(model.initial_weights, ([1.0], [0.0]))
        # By the server that did not open it, too.
        assert client.model("times", 1).metrics_session(session.id).result() == {"total": 1}
        session.close()
        for asked in (client, away):
            wait_until(lambda asked=asked: [found.version for found in asked.models()] == [2], 60)
        assert one.wait_for_log("model times/1 is unloaded").count("waits for its sessions") == 1


@pytest.mark.parametrize("is_replaced", [False, True], ids=["unloaded", "replaced"])
def test_a_session_of_an_earlier_process_continues_with_a_model_that_is_no_longer_served(tmp_path, is_replaced):
    folder = tmp_path / "models" / "times"
    folder.mkdir(parents=True)
    write(folder, 1, 1)
    arguments = ("--model-repository", str(tmp_path / "models"), "--management-port", "0")
    arguments += ("--session-store", f"sqlite://{tmp_path}/sessions.sqlite3")
    batch = ([1.0], [0.0])
    with ServerProcess(*arguments) as server, forwardpass_client.connect(server.address) as client:
        session = client.model("times").metrics_session()
        session.forward_pass(client.model("times").initial_weights, batch)
    with ServerProcess(*arguments) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("times")
        weights = model.initial_weights
        if is_replaced:
            write(folder, 1, 5)
            manage(server, "ReloadModel", 1)
            assert client.model("times").predict_on_batch(weights, [1.0]).tolist() == [5]
        else:
            manage(server, "UnloadModel", 1)
            assert client.models() == []
        resumed = model.metrics_session(session.id)
        resumed.forward_pass(weights, batch)
        assert resumed.result() == {"total": 2}


def test_no_session_fails_when_it_is_opened_during_an_unload(tmp_path):
    folder = tmp_path / "times"
    folder.mkdir()
    write(folder, 1, 1)
    with ServerProcess("--model-repository", str(tmp_path), *REFUSE) as server, contextlib.ExitStack() as stack:
        client = stack.enter_context(forwardpass_client.connect(server.address))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(2))
        model = client.model("times")
        weights = model.put_weights(model.initial_weights)

        def use_sessions() -> None:
            """One after another, each to its end, until there is no model for a further one."""
            for _ in range(30):
                try:
                    session = model.metrics_session()
                except errors.ModelNotFound:
                    return
                with session:
                    session.forward_pass(weights, ([1.0], [0.0]))
                    assert session.result() == {"total": 1}

        refused = set()
        for _ in range(5):
            manage(server, "LoadModel", 1)
            using = [pool.submit(use_sessions) for _ in range(2)]
            while client.models():
                try:
                    manage(server, "UnloadModel", 1)
                except errors.ModelInUse as error:
                    refused.add(error.found)
            for one in using:
                one.result(30)
        assert {"1"} <= refused <= {"1", "2"}


def test_a_version_and_a_label_are_refused_together(client):
    with pytest.raises(ValueError, match="expected a version or a label, got both"):
        client.model("keras_cnn", 1, label="stable")
    with pytest.raises(errors.ModelVersionNotFound, match="expected none: the model has no labels, got 'stable'"):
        client.model("keras_cnn", label="stable")


@dataclasses.dataclass
class Labelled:
    """A server with versions 1, `stable`, and 2, `canary`, and the folder of its model."""

    server: ServerProcess
    folder: pathlib.Path

    def call(self, method: str, label: str, version: int = 0, **fields: Any) -> Any:
        """The answer to a call of `times`, as a client without our checks would make it. Raises what it ends with."""
        is_management = method in SERVICES[MANAGEMENT_SERVICE]
        address = self.server.management_address if is_management else self.server.address
        parts = {"model_weights.trainable": (np.float32(1),), "model_weights.non_trainable": (), **PARTS}
        header = METHODS[method].request(model=v1.ModelSelector(name="times", version=version, label=label), **fields)
        taken = {place: Structure.of(value) for place, value in parts.items() if place in TAKES.get(method, ())}
        return answer(address, method, messages.encode(header, taken))

    def served(self) -> list[int]:
        with forwardpass_client.connect(self.server.address) as client:
            return [found.version for found in client.models()]


WEIGHTS = ("model_weights.trainable", "model_weights.non_trainable")
OUTPUT = tuple(f"batch_output.{name}" for name in ("loss", "predictions", "num_examples"))
# Which arguments a method takes; the others' requests hold none.
TAKES = {
    "ForwardPass": (*WEIGHTS, "batch_input.x", "batch_input.y"),
    "PredictOnBatch": (*WEIGHTS, "x"),
    "ForwardBackward": (*WEIGHTS, "batch_input.x", "batch_input.y"),
    "Vjp": (*WEIGHTS, "x", "cotangents"),
    "Loss": ("output", "label"),
    "UpdateMetricsState": ("state", "labels", *OUTPUT),
    "FinalizeMetrics": ("state",),
}
ROW = np.float32([3])
PARTS = {
    **dict.fromkeys(("batch_input.x", "batch_input.y", "x", "output", "label", "labels", "cotangents"), ROW),
    **dict(zip(OUTPUT, (np.float32(3), ROW, np.int32(1)), strict=True)),
    "state": {"total": np.float32(0)},
}


def selects(descriptor: Descriptor, above: tuple[Descriptor, ...] = ()) -> bool:
    """Whether a message names a model, itself or in a message that it holds."""
    if descriptor is v1.ModelSelector.DESCRIPTOR:
        return True
    inner = [field.message_type for field in descriptor.fields if field.message_type is not None]
    return any(selects(one, (*above, descriptor)) for one in inner if one not in above)


# Train names a model in the first message of its stream: see test_training.
SELECTING = [name for name, method in METHODS.items() if method.is_unary and selects(method.request.DESCRIPTOR)]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    repository = tmp_path_factory.mktemp("labelled")
    folder = repository / "times"
    folder.mkdir()
    write(folder, 1, 1)
    write(folder, 2, 2)
    label(folder, stable=1, canary=2)
    with ServerProcess("--model-repository", str(repository), "--management-port", "0") as server:
        yield Labelled(server, folder)


def version_in(answer: Any) -> int:
    """Of the model that answered, wherever a response says so."""
    model = answer.model
    told = getattr(model, "identity", None) or getattr(model, "status", None) or model
    return int(told.version)


@pytest.mark.parametrize("method", SELECTING)
def test_every_method_that_names_a_model_takes_a_label_and_refuses_an_unknown_one(labelled, method):
    session = {"session_id": method.encode().ljust(16, b".")[:16]} if method == "OpenSession" else {}
    refusal = "label of model 'times': expected one of canary, stable, got 'none'"
    with pytest.raises(errors.ModelVersionNotFound, match=refusal):
        labelled.call(method, "none", **session)
    with pytest.raises(errors.InvalidRequest, match="model: expected a version or a label, got both"):
        labelled.call(method, "stable", 1, **session)
    answer = labelled.call(method, "stable", **session)
    if method == "UnloadModel":
        assert labelled.served() == [2]
        # That it is not served is no error.
        labelled.call(method, "stable")
        assert version_in(labelled.call("LoadModel", "stable")) == 1
    else:
        assert version_in(answer) == 1
    assert labelled.served() == [1, 2]


def test_a_session_opened_by_label_is_found_after_the_label_has_moved(labelled):
    session = {"session_id": b"\1" * 16}
    assert version_in(labelled.call("OpenSession", "stable", **session)) == 1
    label(labelled.folder, stable=2, canary=2)
    try:
        # Without a watch a load is what makes the server look.
        assert labelled.call("LoadModel", "stable").model.status.labels == ["canary", "stable"]
        assert version_in(labelled.call("GetModel", "stable")) == 2
        for resume in (False, True):
            assert version_in(labelled.call("OpenSession", "stable", resume=resume, **session)) == 1
        with pytest.raises(errors.InvalidRequest, match="model: expected times/1, that of the session, got times/2"):
            labelled.call("OpenSession", "", 2, **session)
    finally:
        label(labelled.folder, stable=1, canary=2)
        labelled.call("LoadModel", "stable")


def test_management_describes_the_labels_of_versions(labelled):
    with grpc.insecure_channel(labelled.server.management_address) as channel:
        answer = channel.unary_unary(METHODS["DescribeModels"].path)(b"", timeout=30)
    found = v1.DescribeModelsResponse.FromString(answer).models
    assert [list(one.status.labels) for one in found] == [["stable"], ["canary"]]


def test_the_command_line_lists_labels_and_takes_one_with_every_command_that_names_a_model(labelled, tmp_path):
    def run(command: str, *arguments: str) -> str:
        done = CliRunner().invoke(forwardpass, [command, labelled.server.address, *arguments])
        return done.output + ("" if done.exit_code == 0 else f" exit {done.exit_code}")

    rows = [line.split() for line in run("models").splitlines()]
    assert rows[0] == ["model", "version", "state", "content", "labels", "error"]
    assert [(*row[:3], *row[4:]) for row in rows[1:]] == [
        ("times", "1", "available", "stable"),
        ("times", "2", "available", "canary"),
    ]
    assert "1 available (stable), 2 available (canary)" in run("describe", "times", "--label", "canary")
    np.savez(tmp_path / "data.npz", x=ROW, y=ROW)
    data, weights, out = (str(tmp_path / name) for name in ("data.npz", "weights.npz", "out.npz"))
    run("weights", "times", "-o", weights)
    others = {
        "describe": (),
        "weights": ("-o", weights),
        "put-weights": (weights,),
        "delete-weights": ("0" * 64,),
        "predict": ("--data", data, "-o", out),
        "evaluate": ("--data", data),
        "train": ("--data", data, "--learning-rate", "0"),
    }
    naming = [name for name, command in forwardpass.commands.items() if "model" in {one.name for one in command.params}]
    assert sorted(naming) == sorted(others)
    for name in naming:
        assert "exit" not in run(name, "times", *others[name], "--label", "stable")
        assert "expected one of canary, stable, got 'none'" in run(name, "times", *others[name], "--label", "none")
        shown = run(name, "times", *others[name], "--label", "stable", "--version", "1")
        assert "Error: model: expected a version or a label, got both" in shown
    for name, expected in (("stable", 3), ("canary", 6)):
        run("predict", "times", "--data", data, "-o", out, "--label", name)
        with np.load(out) as found:
            assert found["predictions"].tolist() == [expected]
