"""Weights that replicas share: two servers over one folder, and over one S3."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import shutil
import signal
import time
import urllib.parse

import grpc
import numpy as np
import pytest

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import errors, manifests
from forwardpass.wire.methods import METHODS, WEIGHTS_SERVICE
from forwardpass.wire.structures import Structure
from forwardpass_server.access import tokens
from forwardpass_server.access.tokens import Role
from support import zoo
from support.object_stores import Place
from support.servers import ServerProcess, wait_until

MIB = 2**20
MODELS = ("--factory", "wide_1m=support.zoo:wide_1m", "--factory", "wide_24m=support.zoo:wide_24m")
X = np.ones((1, 4), np.float32)


class Pair:
    """Two servers that share weights, and clients of both for two principals."""

    def __init__(self, place: Place, folder: pathlib.Path) -> None:
        self.place = place
        self.secrets = {}
        lines = []
        for name in ("alice", "mallory"):
            self.secrets[name], token = tokens.create(name, [Role.CALL], None)
            lines.append(token.line())
        self._tokens = folder / "tokens"
        self._tokens.write_text("\n".join(lines) + "\n")
        self.servers = [self.start(), self.start()]

    def start(self, *arguments: str) -> ServerProcess:
        shared = ("--weights-folder", self.place.url, "--tokens", str(self._tokens))
        return ServerProcess(*MODELS, *shared, *arguments, environment=dict(self.place.environment))

    def connect(self, server: ServerProcess, principal: str = "alice", **options) -> forwardpass_client.Client:
        return forwardpass_client.connect(server.address, token=self.secrets[principal], **options)

    def close(self) -> None:
        for server in self.servers:
            server.__exit__()


@pytest.fixture(scope="module")
def pair(places, tmp_path_factory):
    made = Pair(places.make(), tmp_path_factory.mktemp("tokens"))
    yield made
    made.close()


@dataclasses.dataclass
class Models:
    """The model of one client at each server."""

    first: forwardpass_client.RemoteFunctionalModel
    second: forwardpass_client.RemoteFunctionalModel


@pytest.fixture
def models(pair):
    with pair.connect(pair.servers[0]) as first, pair.connect(pair.servers[1]) as second:
        yield Models(first.model("wide_1m"), second.model("wide_1m"))


def objects(pair: Pair, prefix: str = "") -> list[str]:
    return [one.name for one in pair.place.store().list(prefix)]


def assert_gives(model, weights_id: str, weights) -> None:
    """The model has these weights under this id, and computes with them."""
    handle = model.weights_handle(weights_id)
    zoo.assert_equal(model.get_weights(handle), weights)
    np.testing.assert_array_equal(model.predict_on_batch(handle, X), model.predict_on_batch(weights, X))


def test_weights_that_one_server_got_are_used_by_the_other(pair, models):
    weights = zoo.wide_weights(MIB, seed=1)
    handle = models.first.put_weights(weights)
    assert_gives(models.second, handle.id, weights)
    # Nor are they sent to the second server again.
    models.second.put_weights(weights)
    metrics = [server.metrics() for server in pair.servers]
    sent = f'grpc_server_started_total{{grpc_method="UploadTensors",grpc_service="{WEIGHTS_SERVICE}",grpc_type='
    assert [sum(value for name, value in one.items() if name.startswith(sent)) for one in metrics] == [1, 0]
    assert metrics[0]['forwardpass_weights_tier_bytes_total{operation="write"}'] == MIB
    assert metrics[1]['forwardpass_weights_tier_bytes_total{operation="read"}'] == MIB


def test_a_server_says_whether_its_weights_are_shared(pair, server):
    def shares(one: ServerProcess, model: str, token: str = "") -> bool:
        request = v1.GetModelRequest(model=v1.ModelSelector(name=model)).SerializeToString()
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        with grpc.insecure_channel(one.address) as channel:
            answer = channel.unary_unary(METHODS["GetModel"].path)(request, metadata=metadata, timeout=30)
        return v1.GetModelResponse.FromString(answer).shares_weights

    assert all(shares(one, "wide_1m", pair.secrets["alice"]) for one in pair.servers)
    assert not shares(server, "keras_cnn")


def test_a_principal_cannot_use_the_weights_of_another_one(pair, models):
    handle = models.first.put_weights(zoo.wide_weights(MIB, seed=2))
    for server in pair.servers:
        with pair.connect(server, "mallory") as client:
            model = client.model("wide_1m")
            with pytest.raises(errors.WeightsNotFound):
                model.predict_on_batch(model.weights_handle(handle.id), X)
            # Without effect for the owner.
            model.weights_handle(handle.id).delete()
    assert models.second.predict_on_batch(models.second.weights_handle(handle.id), X).shape == (1,)


def test_deleted_weights_disappear_from_both_servers(models):
    weights = zoo.wide_weights(MIB, seed=3)
    handle = models.first.put_weights(weights)
    other = models.second.weights_handle(handle.id)
    models.second.predict_on_batch(other, X)
    handle.delete()

    def is_gone(model) -> bool:
        try:
            model.predict_on_batch(model.weights_handle(handle.id), X)
        except errors.WeightsNotFound:
            return True
        return False

    assert is_gone(models.first)
    wait_until(lambda: is_gone(models.second))
    # They can be put again, there.
    assert_gives(models.first, models.second.put_weights(weights).id, weights)


def test_corrupted_objects_are_not_used(pair, models):
    weights = zoo.wide_weights(MIB, seed=4)
    before = set(objects(pair, "tensors/"))
    handle = models.first.put_weights(weights)
    (tensor,) = set(objects(pair, "tensors/")) - before
    pair.place.store().write(tensor, bytes(MIB))
    with pytest.raises(errors.WeightsNotFound):
        models.second.predict_on_batch(models.second.weights_handle(handle.id), X)
    assert pair.servers[1].metrics()['forwardpass_weights_tier_failures_total{operation="read",reason="corrupt"}'] >= 1
    # A client that has the arrays puts them again by itself.
    assert_gives(models.second, models.second.put_weights(weights).id, weights)


def test_sums_and_trained_weights_are_shared(pair, models):
    sets = [zoo.wide_weights(MIB, seed=seed) for seed in (5, 6)]
    first, second = models.first.put_weights(sets[0]), models.second.put_weights(sets[1])
    with pair.connect(pair.servers[1]) as client:
        mean = client.combine([(client.weights_handle(first.id), 0.5), (client.weights_handle(second.id), 0.5)])
    # Exact: a float32 sum of two halves.
    half = np.float32(0.5)
    expected = ((sets[0][0][0] * half + sets[1][0][0] * half,), ())
    assert_gives(models.first, mean.id, expected)


def test_kept_gradients_are_shared(pair, models):
    weights = zoo.wide_weights(MIB, seed=7)
    handle = models.first.put_weights(weights)
    _, kept = models.first.forward_backward(handle, (X, np.ones(1, np.float32)), keep=True)
    with pair.connect(pair.servers[1]) as client:
        moved = client.combine([(client.weights_handle(handle.id), 1.0), (client.weights_handle(kept.id), -0.5)])
        gradients = client.get_weights(client.weights_handle(kept.id))
        new = client.get_weights(client.weights_handle(moved.id))
    # The loss is the sum of the row times the sum of the weights.
    np.testing.assert_array_equal(gradients[0][0], np.full(MIB // 4, 4, np.float32))
    np.testing.assert_array_equal(new[0][0], weights[0][0] - np.float32(2))


def test_a_new_server_has_the_weights_and_its_death_leaves_nothing_half_written(pair, models):
    small, large = zoo.wide_weights(MIB, seed=8), zoo.wide_weights(24 * MIB, seed=9)
    handle = models.first.put_weights(small)
    with pair.start() as third, concurrent.futures.ThreadPoolExecutor() as threads:
        with pair.connect(third) as client:
            assert_gives(client.model("wide_1m"), handle.id, small)
        tensors, sets = objects(pair, "tensors/"), objects(pair, "sets/")

        def put() -> None:
            with pair.connect(third) as client:
                client.model("wide_24m").put_weights(large, timeout_s=60)

        def is_writing() -> bool:
            return list(pair.place.store().unfinished()) != [] or objects(pair, "tensors/") != tensors

        putting = threads.submit(put)
        wait_until(is_writing)
        third.process.send_signal(signal.SIGKILL)
        # The set may have been acknowledged in the last moment.
        error = putting.exception(120)
        assert isinstance(error, (errors.ServerUnavailable, errors.DeadlineExceeded, type(None)))
    with pair.connect(pair.servers[1]) as client:
        model = client.model("wide_24m")
        # Either no server sees the set, or it was complete before the kill.
        handle = model.weights_handle(manifests.of_structure(Structure.of(large), "w").weights_id.hex())
        if objects(pair, "sets/") == sets:
            with pytest.raises(errors.WeightsNotFound):
                model.predict_on_batch(handle, X)
            assert model.put_weights(large).id == handle.id
        assert_gives(model, handle.id, large)


def test_without_the_tier_warm_weights_are_used_and_others_fail_clearly(pair, models):
    warm, cold, new = (zoo.wide_weights(MIB, seed=seed) for seed in (10, 11, 12))
    handle, elsewhere = models.first.put_weights(warm), models.second.put_weights(cold)
    expected = models.first.predict_on_batch(handle, X)
    folder = pathlib.Path(urllib.parse.unquote(urllib.parse.urlsplit(pair.place.url).path))
    away = folder.with_name("away")
    if pair.place.s3 is None:
        folder.rename(away)
    else:
        pair.place.s3.pause()
    try:
        for _ in range(3):
            np.testing.assert_array_equal(models.first.predict_on_batch(handle, X), expected)
        cold_handle = models.first.weights_handle(elsewhere.id)
        with pytest.raises(errors.WeightStoreUnavailable, match="cannot reach or write the weight store"):
            models.first.predict_on_batch(cold_handle, X, timeout_s=40)
        with pytest.raises(errors.WeightStoreUnavailable):
            models.first.put_weights(new, timeout_s=2)
        # Calls without weights on the server do not notice.
        np.testing.assert_array_equal(models.first.predict_on_batch(warm, X), expected)
        failed = 'forwardpass_weights_tier_failures_total{operation="read",reason="unreachable"}'
        assert pair.servers[0].metrics()[failed] + pair.servers[0].metrics()[failed.replace("read", "follow")] >= 1
        # A client that waits for longer goes on when the tier answers again.
        with concurrent.futures.ThreadPoolExecutor() as threads:
            waiting = threads.submit(models.first.put_weights, new, timeout_s=60)
            time.sleep(0.5)
            if pair.place.s3 is None:
                shutil.rmtree(folder, ignore_errors=True)
                away.rename(folder)
            else:
                pair.place.s3.resume()
            assert_gives(models.second, waiting.result(60).id, new)
    finally:
        if pair.place.s3 is not None:
            pair.place.s3.resume()
        elif away.exists():
            away.rename(folder)
    assert_gives(models.first, elsewhere.id, cold)
