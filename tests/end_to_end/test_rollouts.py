"""Replicas behind a name are replaced as in a rollout, under callers with the default policy."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import pathlib

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import RemoteFunctionalModel, errors
from support import zoo
from support.multiplying import write
from support.rolling_restart import Callers
from support.rollouts import Rollout
from support.servers import ServerProcess, wait_until

# Of all kinds together, between one event and the next: enough that each caller has made some. The figures of
# docs/reliability.md are of 10,000 calls by value: see benchmarks/rollouts.py.
_CALLS = 300

# Long beside what a name's look-up takes: all the servers that a client knows drain, and it must not notice.
_DRAINING = ("--drain-delay", "2")


def replace(rollout: Rollout, former: list[str], later: list[str], **options: str | bool) -> Callers:
    """Drains all the replicas that callers know, with new ones ready and in DNS. The callers, once they have ended."""
    rollout.start(*former, *later)
    rollout.publish(*former)
    callers = Callers(rollout.target, **options)
    callers.go_on(_CALLS)
    rollout.publish(*later)
    assert rollout.stop(*former) == [0] * len(former)
    callers.go_on(_CALLS)
    callers.end()
    return callers


def test_no_call_fails_when_both_replicas_that_a_client_knows_drain_at_once(tmp_path):
    with Rollout(tmp_path, 4, *_DRAINING) as rollout:
        callers = replace(rollout, rollout.hosts[:2], rollout.hosts[2:])
    assert callers.failed == []
    for acknowledged, counted in callers.updates:
        assert counted == acknowledged > 0


def test_no_call_with_a_token_fails_when_the_only_replica_that_a_client_knows_drains(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"sha256:{hashlib.sha256(b'secret').hexdigest()} caller call never\n")
    with Rollout(tmp_path, 2, *_DRAINING, "--tokens", str(tokens)) as rollout:
        former, later = rollout.hosts
        callers = replace(rollout, [former], [later], token="secret", allow_insecure_token=True)
    assert callers.failed == []


def test_calls_of_a_version_that_only_some_replicas_have_reach_the_server_of_the_look_up(tmp_path):
    for name, factors in (("old", (1,)), ("new", (1, 2))):
        (tmp_path / name / "times").mkdir(parents=True)
        for version in factors:
            write(tmp_path / name / "times", version, version)
    with (
        ServerProcess("--model-repository", str(tmp_path / "old")) as old,
        ServerProcess("--model-repository", str(tmp_path / "new")) as new,
    ):
        addresses = [old.address, new.address]
        versions = set()
        # Each client stays with a server taken at random: some learn the version that the other server lacks.
        for _ in range(16):
            with forwardpass_client.connect(addresses) as client:
                model = client.model("times")
                versions.add(model.version)
                call_in_every_way(model)
                # The server of the client may lack it: then the model stays with one that has it.
                call_in_every_way(client.model("times", 2))
                # One to each server for calls by value, and one to the server of the model.
                wait_until(lambda: connections(addresses) <= 3)
        assert versions == {1, 2}
        with forwardpass_client.connect(addresses) as client:
            with pytest.raises(errors.ModelVersionNotFound, match="3"):
                client.model("times", 3)
            # The look-up has closed those that it opened.
            wait_until(lambda: connections(addresses) == 1)
        # Without it: a closed client must not wait for the garbage collector to close its connections.
        gc.disable()
        try:
            asyncio.run(call_asynchronously(addresses))
        finally:
            gc.enable()


def connections(addresses: list[str]) -> int:
    """The number of connections from this machine to servers on it."""
    ports = {int(address.rpartition(":")[2]) for address in addresses}
    tables = [pathlib.Path("/proc/net", name).read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    sockets = [line.split() for table in tables for line in table]
    established = "01"
    return sum(int(one[2].rpartition(":")[2], 16) in ports and one[3] == established for one in sockets)


async def call_asynchronously(addresses: list[str]) -> None:
    for _ in range(8):
        async with forwardpass_client.connect_async(addresses) as client:
            assert await client.is_ready()
            for model in (await client.model("times"), await client.model("times", 2)):
                weights, expected = await model.initial_weights, [3.0 * model.version]
                for _ in range(10):
                    assert (await model.predict_on_batch(weights, [3.0])).tolist() == expected
                handle = await model.put_weights(weights)
                assert (await model.predict_on_batch(handle, [3.0])).tolist() == expected
            with pytest.raises(errors.ModelVersionNotFound):
                await client.model("times", 3)
        await asyncio.to_thread(wait_until, lambda: connections(addresses) == 0)


def call_in_every_way(model: RemoteFunctionalModel) -> None:
    weights = model.initial_weights
    expected = [3.0 * model.version]
    for _ in range(20):
        assert model.predict_on_batch(weights, [3.0]).tolist() == expected
    handle = model.put_weights(weights)
    assert model.predict_on_batch(handle, [3.0]).tolist() == expected
    assert list(map(np.ndarray.tolist, model.predict_many(handle, [[3.0]] * 3))) == [expected] * 3
    assert model.evaluate(handle, [([3.0], [0.0])]) == {"total": expected[0]}


def test_an_answer_of_other_content_of_the_version_is_never_returned(tmp_path):
    for factor in (2, 5):
        (tmp_path / str(factor) / "times").mkdir(parents=True)
        write(tmp_path / str(factor) / "times", 1, factor)
    with (
        ServerProcess("--model-repository", str(tmp_path / "2")) as first,
        ServerProcess("--model-repository", str(tmp_path / "5")) as second,
    ):
        found = set()
        for _ in range(16):
            with forwardpass_client.connect([first.address, second.address]) as client:
                model = client.model("times")
                weights = model.initial_weights
                answers = {tuple(model.predict_on_batch(weights, [1.0]).tolist()) for _ in range(20)}
                assert len(answers) == 1
                found |= answers
        assert found == {(2.0,), (5.0,)}


def loading_server(folder: pathlib.Path, gate: pathlib.Path) -> ServerProcess:
    """A server that listens, and loads its model until a file is there."""
    (folder / "late_model.py").write_text(
        "import os, time\nfrom support import zoo\n"
        f"def counting():\n    while not os.path.exists({str(gate)!r}):\n        time.sleep(0.05)\n"
        "    return zoo.counting()\n"
    )
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    return ServerProcess(
        *("--factory", "counting=late_model:counting"), environment={"PYTHONPATH": path}, waits_for="listening on "
    )


def test_servers_that_load_or_failed_are_skipped_and_give_the_reason_if_none_is_ready(tmp_path):
    gate = tmp_path / "gate"
    with (
        loading_server(tmp_path, gate) as loading,
        ServerProcess("--factory", "counting=support.zoo:missing", waits_for="not ready: ") as failed,
    ):
        with forwardpass_client.connect([loading.address, failed.address]) as client:
            assert not client.is_ready()
            (listed,) = client.models()
            assert (listed.name, listed.state, bool(listed.error)) in [
                ("counting", "loading", False),
                ("counting", "failed", True),
            ]
            with pytest.raises((errors.ModelLoading, errors.ModelFailed)):
                client.model("counting", timeout_s=20)
            gate.touch()
            client.wait_until_ready()
            model = client.model("counting")
            x, _ = zoo.counting_batch(1, 3)
            for weights in (model.initial_weights, model.put_weights(model.initial_weights)):
                for _ in range(50):
                    assert np.array_equal(model.predict_on_batch(weights, x), x)
            assert client.is_ready()
