"""One client of two servers that share weights: calls by weights id go to both."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import RemoteFunctionalModel, errors, routes
from forwardpass_client.calls import FoundModel
from forwardpass_client.deadlines import Deadline
from support.rollouts import free_port
from support.servers import ServerProcess, wait_until

SETS = 40
X = np.int32([1, 2, 3])
Y = np.int64([1, 1, 1])


def weights_of(index: int):
    return (np.arange(10, dtype=np.float32) + index,), ()


def is_right(index: int, predictions) -> bool:
    """`counting` looks its inputs up in the weights."""
    return predictions.tolist() == (X + np.float32(index)).tolist()


class Replicas:
    """Two servers with one tier, at one port of two addresses. A context manager: leaving it kills them."""

    hosts = ("127.0.0.21", "127.0.0.22")

    def __init__(self, folder) -> None:
        self._arguments = (
            "--factory",
            "counting=support.zoo:counting",
            "--weights-folder",
            f"file://{folder}",
            "--session-store",
            "memory://",
        )
        self.port = free_port(self.hosts)
        self.servers = [self._start(host) for host in self.hosts]

    def _start(self, host: str) -> ServerProcess:
        return ServerProcess(*self._arguments, "--host", host, port=self.port)

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.servers]

    def counts(self, method: str) -> list[int]:
        """How often the method was called, for each server."""
        sample = f'grpc_server_started_total{{grpc_method="{method}",'
        return [
            int(sum(value for name, value in server.metrics().items() if name.startswith(sample)))
            for server in self.servers
        ]

    def pipelined(self) -> list[int]:
        """How many calls came over pipelines, for each server."""
        return [
            int(sum(v for k, v in server.metrics().items() if k.startswith("forwardpass_pipeline_calls_total")))
            for server in self.servers
        ]

    def kill(self, index: int) -> None:
        self.servers[index].process.kill()
        self.servers[index].process.wait()

    def start(self, index: int) -> None:
        """Starts a server that has ended, where it was."""
        self.servers[index].__exit__()
        self.servers[index] = self._start(self.hosts[index])

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_) -> None:
        for server in self.servers:
            server.__exit__()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory) -> Iterator[Replicas]:
    with Replicas(tmp_path_factory.mktemp("tier")) as found:
        yield found


@pytest.fixture
def model(replicas):
    with forwardpass_client.connect(replicas.addresses) as client:
        yield client.model("counting")


@pytest.fixture
def handles(model):
    return [model.put_weights(weights_of(index)) for index in range(SETS)]


def changes(before: list[int], after: list[int]) -> list[int]:
    return [new - old for old, new in zip(before, after, strict=True)]


def test_calls_by_id_go_to_both_servers_in_the_order_of_the_hash_and_weights_are_sent_once(replicas, model):
    uploads = replicas.counts("UploadTensors")
    handles = [model.put_weights(weights_of(100 + index)) for index in range(SETS)]
    calls = replicas.counts("PredictOnBatch")
    for index, handle in enumerate(handles):
        assert is_right(100 + index, model.predict_on_batch(handle, X))
    shares = changes(calls, replicas.counts("PredictOnBatch"))
    assert sum(shares) == SETS
    # Each of 40 goes to either with the probability 1/2: fewer than 6 have a probability of 1e-6. Ports are random.
    assert min(shares) >= 6
    for handle in handles:
        model.predict_on_batch(handle, X)
    assert changes(calls, replicas.counts("PredictOnBatch")) == [2 * share for share in shares]
    # Another client has the same order.
    with forwardpass_client.connect(replicas.addresses[::-1]) as client:
        other = client.model("counting")
        for handle in handles:
            other.predict_on_batch(other.weights_handle(handle.id), X)
    assert changes(calls, replicas.counts("PredictOnBatch")) == [3 * share for share in shares]
    assert sum(changes(uploads, replicas.counts("UploadTensors"))) == SETS


def test_predict_each_spreads_calls_over_a_stream_to_each_server(replicas, model, handles):
    before = replicas.pipelined()
    found = list(model.predict_each((handles[index % SETS], X) for index in range(400)))
    assert len(found) == 400
    assert all(is_right(index % SETS, one) for index, one in enumerate(found))
    shares = changes(before, replicas.pipelined())
    assert sum(shares) == 400
    assert min(shares) > 0
    # A pipeline of one handle goes to its server.
    before = replicas.pipelined()
    for index in range(2):
        with model.pipeline(handles[index]) as pipeline:
            assert all(is_right(index, pipeline.predict_on_batch(X).result()) for _ in range(3))
    assert sorted(changes(before, replicas.pipelined())) in ([0, 6], [3, 3])


def test_evaluations_trainings_of_weights_and_leases_use_any_server(replicas, model, handles):
    for index in range(4):
        assert model.evaluate(handles[index], [(X, Y)] * 3)["examples"] == 9
    assert [one["examples"] for one in model.evaluate_many(handles[:3], [(X, Y)])] == [3, 3, 3]
    assert min(replicas.counts("Evaluate")) > 0
    (fetched,), _ = model.get_weights(handles[7])
    assert fetched.tolist() == weights_of(7)[0][0].tolist()
    average = model.average([(handles[0], 1), (handles[2], 1)])
    assert is_right(1, model.predict_on_batch(average, X))
    handle = model.put_weights(weights_of(999))
    handle.lease(10)
    handle.lease(0)
    handle.delete()
    with model.metrics_session() as session:
        assert session.forward_pass(handles[0], (X, Y)).num_examples == 3


def test_weights_that_the_tier_has_lost_are_put_again(model):
    handle = model.put_weights(weights_of(500))
    for method in (model.predict_on_batch, lambda one, x: next(model.predict_each([(one, x)]))):
        handle.delete()
        assert is_right(500, method(handle, X))
    handle.delete()
    with pytest.raises(errors.WeightsNotFound):
        model.predict_on_batch(model.weights_handle(handle.id), X)


def test_replicas_behind_a_name_are_looked_up_and_one_that_is_added_gets_its_share(replicas, monkeypatch):
    """The resolver of this process is replaced, and not that of gRPC: the model is looked up at an address."""
    known = [replicas.hosts[0]]
    resolve = socket.getaddrinfo

    def look_up(host, port, *more, **options):
        if host != "replicas.test":
            return resolve(host, port, *more, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in known]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(routes, "_RESOLVE_S", 0.1)
    with (
        forwardpass_client.connect(replicas.addresses[0]) as direct,
        forwardpass_client.connect(f"dns:///replicas.test:{replicas.port}") as client,
    ):
        found = FoundModel(direct.model("counting").description, (), 2**24, True)
        transport = client._transports.own
        transport.share_weights(True, Deadline(10))
        model = RemoteFunctionalModel(transport, found, client._options)
        handles = [model.put_weights(weights_of(index)) for index in range(SETS)]

        def call_all() -> list[int]:
            before = replicas.counts("PredictOnBatch")
            for index, handle in enumerate(handles):
                assert is_right(index, model.predict_on_batch(handle, X))
            return changes(before, replicas.counts("PredictOnBatch"))

        assert call_all() == [SETS, 0]
        known.append(replicas.hosts[1])
        wait_until(lambda: min(call_all()) > 0)
        del known[0]
        wait_until(lambda: call_all() == [0, SETS])


class Callers:
    """Threads and an event loop that call without a pause by handles. failed: errors, and wrong answers."""

    def __init__(self, addresses: list[str]) -> None:
        self._client = forwardpass_client.connect(addresses)
        self.model = self._client.model("counting")
        self._addresses = addresses
        self.handles = [self.model.put_weights(weights_of(index)) for index in range(SETS)]
        self._stop = threading.Event()
        self.failed: list[object] = []
        self.counts = dict.fromkeys(("unary", "each", "asyncio", "asyncio each", "evaluation"), 0)
        ways: list[Callable[[], None]] = [self._unary, self._each, self._evaluation, lambda: asyncio.run(self._async())]
        self._threads = [threading.Thread(target=self._run, args=(way,), daemon=True) for way in ways]
        for thread in self._threads:
            thread.start()

    def _run(self, way: Callable[[], None]) -> None:
        try:
            way()
        except Exception as error:
            self.failed.append(error)

    def _check(self, way: str, index: int, predictions) -> None:
        if not is_right(index % SETS, predictions):
            self.failed.append((way, index, predictions))
        self.counts[way] += 1

    def _numbers(self) -> Iterator[int]:
        return itertools.takewhile(lambda _: not self._stop.is_set(), itertools.count())

    def _unary(self) -> None:
        for index in self._numbers():
            self._check("unary", index, self.model.predict_on_batch(self.handles[index % SETS], X))

    def _each(self) -> None:
        pairs = ((self.handles[index % SETS], X) for index in self._numbers())
        for index, predictions in enumerate(self.model.predict_each(pairs)):
            self._check("each", index, predictions)

    def _evaluation(self) -> None:
        for index in self._numbers():
            try:
                metrics = self.model.evaluate(self.handles[index % SETS], [(X, Y)] * 3)
            except (errors.SessionNotFound, errors.ServerUnavailable):
                # The servers do not share their sessions.
                continue
            assert metrics["examples"] == 9
            self.counts["evaluation"] += 1

    async def _async(self) -> None:
        async with forwardpass_client.connect_async(self._addresses) as client:
            model = await client.model("counting")
            handles = [model.weights_handle(one.id) for one in self.handles]

            async def unary() -> None:
                for index in self._numbers():
                    self._check("asyncio", index, await model.predict_on_batch(handles[index % SETS], X))

            async def each() -> None:
                index = 0
                async for predictions in model.predict_each((handles[i % SETS], X) for i in self._numbers()):
                    self._check("asyncio each", index, predictions)
                    index += 1

            await asyncio.gather(unary(), each())

    def go_on(self, calls: int = 60) -> None:
        """Waits until each way has made so many more calls (a tenth of evaluations), or one has failed."""
        before = dict(self.counts)
        needed = {way: count + (calls // 10 if way == "evaluation" else calls) for way, count in before.items()}
        wait_until(lambda: bool(self.failed) or all(self.counts[way] >= needed[way] for way in needed), 120)
        assert self.failed == []

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        self._client.close()
        assert self.failed == []


def test_no_call_fails_while_servers_are_killed_and_restarted_and_weights_are_not_sent_again(replicas):
    callers = Callers(replicas.addresses)
    callers.go_on()
    replicas.kill(0)
    callers.go_on()
    replicas.start(0)
    # It gets its share back.
    wait_until(lambda: bool(callers.failed) or replicas.counts("PredictOnBatch")[0] > 50, 60)
    callers.go_on()
    for index in range(2):
        assert replicas.servers[index].terminate() == 0
        callers.go_on()
        replicas.start(index)
        wait_until(lambda index=index: bool(callers.failed) or replicas.counts("PredictOnBatch")[index] > 50, 60)
        callers.go_on()
    callers.end()
    # Both have been restarted since the weights were put.
    assert replicas.counts("UploadTensors") == [0, 0]
