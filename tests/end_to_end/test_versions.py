"""Versions that come, change and go in the repository of a real server, under callers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import shutil
import threading
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import errors
from forwardpass.wire.methods import METHODS
from forwardpass_server import FunctionalModel, save_functional_model
from support.redis_servers import RedisProcess
from support.servers import ServerProcess, wait_until


def times(factor: float) -> FunctionalModel:
    """Multiplies by its number, so that versions can be told from one another."""

    @tf.function
    def predict_on_batch(model_weights, x, training):
        return x * tf.constant(factor, tf.float32) * model_weights[0][0]

    zero = {"total": tf.constant(0.0)}
    return FunctionalModel(
        initial_weights=((np.float32(1),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        metrics_fns=(
            tf.function(lambda: zero),
            tf.function(
                lambda state, labels, batch_output, sample_weight=None: {
                    "total": state["total"] + tf.reduce_sum(batch_output.predictions)
                }
            ),
            lambda state: state,
        ),
        input_spec=(tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


def write(folder: pathlib.Path, version: int, factor: float) -> None:
    """Puts a version there at once, as `mv` does."""
    beside = folder / f".{version}"
    save_functional_model(times(factor), beside)
    if (folder / str(version)).exists():
        shutil.rmtree(folder / str(version))
    beside.rename(folder / str(version))


def label(folder: pathlib.Path, **labels: int) -> None:
    (folder / "forwardpass-versions.json").write_text(json.dumps({"labels": labels}))


def predictions(client: forwardpass_client.Client, weights: Any) -> list[float]:
    """Of version 2; none where it is changed between the look at it and the call."""
    with contextlib.suppress(errors.ModelChanged):
        return client.model("times", 2).predict_on_batch(weights, [3.0]).tolist()
    return []


def test_versions_come_change_and_go_under_callers_that_notice_nothing(tmp_path):
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


def manage(server: ServerProcess, what: str, version: int) -> None:
    """Has the operator do something with a version of `times`. Raises errors of the catalogue."""
    method = METHODS[what]
    request = method.request(model=v1.ModelSelector(name="times", version=version))
    with grpc.insecure_channel(server.management_address) as channel:
        try:
            channel.unary_unary(method.path)(request.SerializeToString(), timeout=30)
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata())
            raise errors.decode(error.code().name, error.details(), trailing[errors.DETAIL_KEY]) from None


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
def test_a_session_of_the_process_before_goes_on_with_a_model_that_is_not_served_any_more(tmp_path, is_replaced):
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


def test_no_session_is_stranded_by_a_version_that_is_unloaded_when_it_has_none(tmp_path):
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
