"""Evaluation over one stream: the metrics of a local loop, each batch once, whatever becomes of either end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

import forwardpass_client
from forwardpass import v1
from forwardpass.wire.methods import METHODS, SESSION_SERVICE
from forwardpass_client import errors
from support import zoo
from support.golden import NAMES, golden
from support.servers import ServerProcess

COUNTING = ("--factory", "counting=support.zoo:counting")


@pytest.fixture
def counting(client):
    return client.model("counting")


def batches(count: int, first: int = 1):
    return (zoo.counting_batch(number) for number in range(first, first + count))


def counted(metrics) -> tuple[int, int]:
    return int(metrics["examples"]), int(metrics["labels"])


def all_of(count: int) -> tuple[int, int]:
    """What `batches(count)` amount to."""
    return 3 * count, 3 * count * (count + 1) // 2


def wait_until(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in [*NAMES, "emnist_with_metrics"]
        if name == "emnist_with_metrics" or golden(name).manifest["metrics_in_saved_model"]
    ],
)
def test_the_metrics_equal_those_of_a_loop_bit_for_bit(client, name):
    expected = golden("keras_cnn_emnist" if name == "emnist_with_metrics" else name)
    model = client.model(name)
    data = [expected.batch(prefix) for prefix in expected.batches] * 5
    handle = model.put_weights(expected.weights())
    state = model.initialize_metrics_state()
    for batch in data:
        state = model.update_metrics_state(state, batch[1], model.forward_pass(handle, batch, training=False))
    zoo.assert_equal(model.evaluate(handle, data), model.finalize_metrics(state))
    zoo.assert_equal(model.evaluate(expected.weights(), iter(data)), model.finalize_metrics(state))


@pytest.mark.parametrize("weighted", [True, False])
def test_areas_under_curves_equal_those_of_the_local_model(client, weighted):
    local, model = zoo.curves(), client.model("curves")
    handle = model.put_weights(local.initial_weights)
    state = local.initialize_metrics_state()
    data = [zoo.curves_batch(20 + seed, seed)[: 3 if weighted else 2] for seed in range(40)]
    for x, y, *sample_weight in data:
        output = model.forward_pass(handle, (x, y), training=False)
        state = local.update_metrics_state(state, y, output, *sample_weight)
    expected = {name: np.asarray(value) for name, value in local.finalize_metrics(state).items()}
    zoo.assert_equal(dict(model.evaluate(handle, data)), expected)


def test_batches_may_be_pairs_triples_and_mappings(counting):
    x, y = zoo.counting_batch(1)
    weight = np.float32([1, 0, 0.5])
    forms = [(x, y), [x, y], (x, y, weight), {"x": x, "y": y}, {"x": x, "y": y, "sample_weight": weight}]
    metrics = counting.evaluate(counting.initial_weights, forms)
    assert metrics == {"examples": 15, "labels": 15, "weights": 9 + 1.5 + 1.5}


def test_an_evaluation_without_batches_returns_the_metrics_of_the_initial_state(counting):
    assert counted(counting.evaluate(counting.initial_weights, [])) == (0, 0)
    assert counting.evaluate_many([], batches(3)) == []


def test_batches_count_in_a_continued_session(counting):
    handle = counting.put_weights(counting.initial_weights)
    with counting.metrics_session() as session:
        session.forward_pass(handle, zoo.counting_batch(1))
        assert counted(counting.evaluate(handle, batches(99, 2), session=session)) == all_of(100)
        assert session.updates == 100
        session.forward_pass(handle, zoo.counting_batch(101))
        counting.evaluate(handle, batches(9, 102), session=session)
        assert counted(session.result()) == all_of(110)
        assert counting.metrics_session(session.id).updates == session.updates == 110


def test_progress_is_reported_and_ends_with_the_last_batch(counting):
    told = []
    counting.evaluate(counting.initial_weights, batches(200), progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 200


def test_batches_are_read_only_after_earlier_ones_have_counted(counting):
    taken, most = [], 0
    told = [0]

    def watched():
        nonlocal most
        for batch in batches(500):
            taken.append(1)
            most = max(most, len(taken) - told[-1])
            yield batch

    counting.evaluate(counting.initial_weights, watched(), progress=told.append)
    assert 1 < most <= 34


def test_each_batch_is_sent_once_for_many_weights(client, server):
    model = client.model("curves")
    weights = [
        model.initial_weights,
        *((tuple(leaf * scale for leaf in model.initial_weights[0]), ()) for scale in (0, 2)),
    ]
    data = [zoo.curves_batch(1000, seed)[:2] for seed in range(30)]
    handles = [model.put_weights(one) for one in weights]
    found = model.evaluate_many(handles, iter(data))
    assert len(found) == 3
    for metrics, one in zip(found, weights, strict=True):
        zoo.assert_equal(metrics, model.evaluate(one, data))
    assert found[0]["roc"] != found[1]["roc"]
    zoo.assert_equal(model.evaluate_many([handles[1], weights[1]], data), [found[1], found[1]])


def test_the_async_evaluation_does_the_same(server):
    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("counting")
            weights = await model.initial_weights
            assert counted(await model.evaluate(weights, batches(100))) == all_of(100)

            async def slowly():
                for batch in batches(100):
                    await asyncio.sleep(0)
                    yield batch

            told = []
            async with await model.metrics_session() as session:
                assert counted(
                    await model.evaluate(weights, slowly(), session=session, progress=told.append)
                ) == all_of(100)
                assert session.updates == told[-1] == 100
            many = await model.evaluate_many([weights, await model.put_weights(weights)], slowly())
            assert [counted(one) for one in many] == [all_of(100)] * 2
            with pytest.raises(errors.ModelRefusedInput, match=r"^batch 3: "):
                await model.evaluate(weights, [*batches(2), ([77], [1]), *batches(50)])
            with pytest.raises(KeyError):
                await model.evaluate(weights, failing())

    asyncio.run(run())


def failing():
    yield from batches(5)
    raise KeyError


@pytest.mark.parametrize("weights", [1, 3])
def test_a_batch_that_the_model_refuses_is_named_by_its_number(counting, server, weights):
    before = server.metrics()["forwardpass_sessions"]
    for bad in (([77], [1]), ([1], [-1])):
        with pytest.raises(errors.ModelRefusedInput, match=r"^batch 41: "):
            counting.evaluate_many([counting.initial_weights] * weights, [*batches(40), bad, *batches(100)])
    assert server.metrics()["forwardpass_sessions"] == before
    with counting.metrics_session() as session:
        with pytest.raises(errors.ModelRefusedInput):
            counting.evaluate(counting.initial_weights, [*batches(40), ([1], [-1]), *batches(100)], session=session)
        assert counted(session.result()) == all_of(40)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ((np.float32([1]), [1]), errors.DTypeMismatch, "batch_input.x: expected int32"),
        (([1], {"label": [1]}), errors.StructureMismatch, "batch_input.y: expected int64"),
        (([1], [1], [[1.0]]), errors.ShapeMismatch, "sample_weight: expected float32"),
        (5, errors.StructureMismatch, "batch_input: expected a pair"),
    ],
)
def test_a_batch_that_the_client_refuses_is_named_by_its_leaf(counting, bad, error, message):
    with counting.metrics_session() as session:
        with pytest.raises(error) as caught:
            counting.evaluate(counting.initial_weights, [*batches(3), bad], session=session)
        assert message in str(caught.value)


def test_errors_of_the_iterator_and_of_progress_reach_the_caller(counting):
    with pytest.raises(KeyError):
        counting.evaluate(counting.initial_weights, failing())

    def progress(count: int) -> None:
        if count:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        counting.evaluate(counting.initial_weights, batches(500), progress=progress)


def test_an_evaluation_that_cannot_run_raises_the_reason(client, counting):
    with pytest.raises(errors.FunctionNotAvailable, match="no TFF release saves metrics"):
        client.model("no_metrics").evaluate(client.model("no_metrics").initial_weights, [])
    with pytest.raises(errors.WeightsNotFound, match="has no arrays to send"):
        counting.evaluate(counting.weights_handle("01" * 32), batches(3))
    with pytest.raises(errors.ShapeMismatch, match="model_weights"):
        counting.evaluate((([1.0],), ()), batches(3))
    with counting.metrics_session() as session:
        session.close()
        with pytest.raises(errors.SessionNotFound):
            counting.evaluate(counting.initial_weights, batches(3), session=session)


def test_a_session_of_another_model_is_not_evaluated_in(client, counting):
    model = client.model("remembering")
    with counting.metrics_session() as session:
        with pytest.raises((errors.ModelChanged, errors.InvalidRequest)):
            model.evaluate(model.initial_weights, [(np.float32([1]), [1])], session=session)


def test_long_batches_are_sent_in_pieces_and_short_ones_do_not_overtake_them(counting):
    long, longer = 300_001, 2**20 + 1
    sizes = [longer, 1, long, 2, 3, long, long, 1, longer, 1]
    data = [zoo.counting_batch(index, size) for index, size in enumerate(sizes)]
    metrics = counting.evaluate(counting.initial_weights, data)
    assert counted(metrics) == (sum(sizes), sum(index * size for index, size in enumerate(sizes)))


def test_weights_that_the_server_drops_during_a_call_are_put_again(counting):
    handle = counting.put_weights(((np.arange(10, dtype=np.float32) + 5,), ()))

    def dropping():
        for number, batch in enumerate(batches(300)):
            if number % 100 == 50:
                handle.delete()
            yield batch

    assert counted(counting.evaluate(handle, dropping())) == all_of(300)


@contextlib.contextmanager
def durable(tmp_path):
    """A server that can be killed, and its model; `again` starts it anew where it was."""
    arguments = (*COUNTING, "--session-store", f"sqlite://{tmp_path}/sessions.sqlite3")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(ServerProcess(*arguments))]
        client = stack.enter_context(forwardpass_client.connect(servers[0].address))

        def kill() -> None:
            servers[-1].process.kill()
            servers[-1].process.wait()
            thread = threading.Thread(target=again)
            thread.start()
            stack.callback(thread.join)

        def again() -> None:
            servers.append(stack.enter_context(ServerProcess(*arguments, port=servers[0].port)))

        yield client.model("counting"), kill, servers


def test_an_evaluation_loses_no_batch_when_its_server_is_killed(tmp_path):
    with durable(tmp_path) as (model, kill, _):
        told = []

        def interrupted():
            for number, batch in enumerate(batches(400)):
                if number == 200:
                    kill()
                yield batch

        handles = [model.put_weights(((np.arange(10, dtype=np.float32) * scale,), ())) for scale in (1, 2)]
        with model.metrics_session() as session:
            assert counted(model.evaluate(handles[0], interrupted(), session=session, progress=told.append)) == all_of(
                400
            )
            assert told == sorted(told)
            assert session.updates == model.metrics_session(session.id).updates == 400
        assert [counted(one) for one in model.evaluate_many(handles, batches(50))] == [all_of(50)] * 2


def test_several_weights_survive_a_killed_server_too(tmp_path):
    with durable(tmp_path) as (_, kill, servers):

        async def run() -> None:
            async def interrupted():
                for number, batch in enumerate(batches(300)):
                    if number == 150:
                        kill()
                    yield batch

            async with forwardpass_client.connect_async(servers[0].address) as client:
                model = await client.model("counting")
                weights = [await model.initial_weights, ((np.arange(10, dtype=np.float32) * 3,), ())]
                found = await model.evaluate_many(weights, interrupted())
                assert [counted(one) for one in found] == [all_of(300)] * 2

        asyncio.run(run())


def test_another_client_continues_the_session_of_a_killed_client(counting, server):
    session = counting.metrics_session()
    code = (
        "import sys, itertools, forwardpass_client as f; from support import zoo\n"
        "m = f.connect(sys.argv[1]).model('counting'); s = m.metrics_session(sys.argv[2])\n"
        "batches = (zoo.counting_batch(n) for n in itertools.count(1))\n"
        "m.evaluate(m.initial_weights, batches, session=s, progress=lambda n: print(n, flush=True))"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code, server.address, session.id], stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: int(caller.stdout.readline()) > 100)
    caller.send_signal(signal.SIGKILL)
    told = [int(line) for line in caller.stdout.read().split()]
    caller.wait()
    caller.stdout.close()
    handled = f'grpc_method="Evaluate",grpc_service="{SESSION_SERVICE}",grpc_type="bidi_stream"'
    wait_until(
        lambda: (
            server.metrics()[f"grpc_server_started_total{{{handled}}}"]
            == sum(value for name, value in server.metrics().items() if "handled_total" in name and handled in name)
        )
    )
    updates = counting.metrics_session(session.id).updates
    assert updates >= max(told, default=100)
    assert counted(counting.evaluate(counting.initial_weights, batches(50, updates + 1), session=session)) == all_of(
        updates + 50
    )
    session.close()


def test_bytes_of_batches_in_pieces_count_from_the_first_piece():
    # 100 streams announce a batch of 8 MiB each, and send a part of it.
    streams, announced, sent = 100, 8 * 2**20, 2**20
    done = threading.Event()
    with ServerProcess(*COUNTING, "--max-message-mib", "8", "--max-concurrent-mib", "32") as server:
        with forwardpass_client.connect(server.address) as client:
            model = client.model("counting")
            handle = model.put_weights(model.initial_weights)
            target = {"weights_id": bytes.fromhex(handle.id)}
            ids = [model.metrics_session().id for _ in range(streams)]

            def announce(session_id: str):
                targets = [v1.EvaluationTarget(session_id=bytes.fromhex(session_id), **target)]
                start = v1.EvaluationStart(writer_id=b"w" * 16, targets=targets)
                yield v1.EvaluateRequest(start=start).SerializeToString()
                frame = v1.CallFrame(call=1, size_bytes=announced, data=bytes(sent))
                yield v1.EvaluateRequest(frames=[frame]).SerializeToString()
                done.wait(60)

            with grpc.insecure_channel(server.address) as channel, concurrent.futures.ThreadPoolExecutor(100) as pool:
                evaluate = channel.stream_stream(METHODS["Evaluate"].path)
                calls = [evaluate(announce(session_id), timeout=60) for session_id in ids]
                ends = [pool.submit(lambda call=call: [None for _ in call]) for call in calls]
                # 4 have all of the room, and 8 more may wait for it.
                wait_until(lambda: sum(end.done() for end in ends) >= streams - 12)
                refused = [end.exception() for end in ends if end.done()]
                assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
                assert all("expected at most 33554432 bytes at once" in error.details() for error in refused)
                done.set()
                for call in calls:
                    call.cancel()
            # Nothing of it is left.
            metrics = model.evaluate(handle, batches(10))
            assert counted(metrics) == all_of(10)
