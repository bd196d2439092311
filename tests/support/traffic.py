"""Calls of every kind on a server, so that everything which it shows of itself has something to show."""

from __future__ import annotations

import concurrent.futures
import pathlib
import urllib.request

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import forwardpass_client
from forwardpass_client import errors
from forwardpass_server.access import tokens
from forwardpass_server.access.tokens import Role
from forwardpass_server.catalog import version_policy
from support import zoo
from support.certificates import Signer
from support.servers import ServerProcess, wait_until

ARGUMENTS = (
    *("--factory", "counting=support.zoo:counting", "--factory", "wide=support.zoo:wide_1m"),
    *("--factory", "slow=support.zoo:slow"),
    *("--factory", "crashing=support.zoo:crashing", "--factory", "broken=support.zoo:missing"),
    *("--required-models", "counting,wide,slow,crashing"),
    *("--weights-mib", "2", "--max-concurrent-calls", "64", "--management-port", "0"),
)
"""Of a server that is to be sent it. Its weight store holds two sets of `wide`."""


def watching_files(folder: pathlib.Path) -> list[str]:
    """Arguments of a server that watches files of every kind, which are made in this folder."""
    _, token = tokens.create("alice", [Role.CALL], tokens.parse_expiry("30d"))
    (folder / "tokens").write_text(token.line() + "\n")
    (folder / "models" / "m").mkdir(parents=True)
    (folder / "models" / "m" / version_policy.FILE).write_text("{}")
    arguments = [*Signer(folder / "signer").arguments(mutual=True), "--tokens", str(folder / "tokens")]
    arguments += ["--model-repository", str(folder / "models"), "--repository-poll", "0.1"]
    return [*arguments, "--factory", "slow=support.zoo:slow"]


def send(server: ServerProcess) -> None:
    """One call of each kind at least, those that fail included."""
    with forwardpass_client.connect(server.address, reuse_weights=False) as client:
        client.models()
        _call_by_value(client)
        _call_with_weights(client)
        _call_with_many_weights(client, server)
        _count_in_sessions(client)
        _train(client)
        _fail(client)
    with grpc.insecure_channel(server.address) as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    with urllib.request.urlopen(server.metrics_url) as response:
        response.read()


def _call_by_value(client: forwardpass_client.Client) -> None:
    model = client.model("counting")
    weights = model.initial_weights
    x, y = zoo.counting_batch(1)
    output = model.forward_pass(weights, (x, y))
    model.loss(model.predict_on_batch(weights, x), y)
    model.finalize_metrics(model.update_metrics_state(model.initialize_metrics_state(), y, output))


def _call_with_weights(client: forwardpass_client.Client) -> None:
    model = client.model("wide")
    x = np.ones((2, 4), np.float32)
    handles = [model.put_weights(zoo.wide_weights(2**20, seed)) for seed in range(3)]
    # The first was dropped to make room.
    with pytest.raises(errors.WeightsNotFound):
        model.predict_on_batch(model.weights_handle(handles[0].id), x)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda _: model.predict_on_batch(handles[2], x, training=False), range(64)):
            pass
    assert len(list(model.predict_many(handles[2], [x] * 32, training=False))) == 32


def _call_with_many_weights(client: forwardpass_client.Client, server: ServerProcess) -> None:
    """Calls with different weights until some have run as one computation."""
    model = client.model("counting")
    x, _ = zoo.counting_batch(1)
    handles = [model.put_weights(((np.arange(10, dtype=np.float32) + number,), ())) for number in range(8)]
    stacked = "forwardpass_stacked_sets_count"
    before = server.metrics()[stacked]

    def have_run() -> bool:
        assert len(list(model.predict_each(((handle, x) for handle in handles), training=False))) == 8
        return server.metrics()[stacked] > before

    wait_until(have_run)


def _count_in_sessions(client: forwardpass_client.Client) -> None:
    model = client.model("counting")
    weights = model.initial_weights
    batch = zoo.counting_batch(1)
    with model.metrics_session() as session:
        session.forward_pass(weights, batch)
        session.result()
    model.evaluate(weights, [batch] * 3)


def _train(client: forwardpass_client.Client) -> None:
    model = client.model("counting")
    model.train(model.initial_weights, [zoo.counting_batch(1)] * 3, optimizer="rmsprop", learning_rate=0.1)
    unknown = {"class_name": "SGD", "config": {"nonsense": 1}}
    with pytest.raises(errors.OptimizerNotSupported):
        model.train(model.initial_weights, [], optimizer=unknown, learning_rate=0.1)


def _fail(client: forwardpass_client.Client) -> None:
    with pytest.raises(errors.ModelNotFound):
        client.model("nonsense")
    with pytest.raises(errors.ModelFailed):
        client.model("broken")
    with pytest.raises(errors.InternalError):
        client.model("crashing").predict_on_batch(((), ()), np.float32([1]))
    with client.model("slow").pipeline(((), ())) as pipeline, pytest.raises(errors.DeadlineExceeded):
        pipeline.predict_on_batch([10**5], timeout_s=0.1).result()
