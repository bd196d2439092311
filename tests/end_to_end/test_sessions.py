"""Metric sessions over the wire: the local model's numbers, each update once, whatever becomes of the server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import resource
import subprocess
import sys
import time

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import BatchOutput, errors
from support import zoo
from support.golden import NAMES, golden
from support.servers import ServerProcess

COUNTING = ("--factory", "counting=support.zoo:counting")


@pytest.fixture
def counting(client):
    return client.model("counting")


def counted(session) -> tuple[int, int]:
    """How many examples have counted, and the sum of their labels."""
    metrics = session.result()
    return int(metrics["examples"]), int(metrics["labels"])


def with_metrics() -> list[str]:
    return [name for name in NAMES if golden(name).manifest["metrics_in_saved_model"]]


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize("name", [*with_metrics(), "emnist_with_metrics"])
def test_a_session_counts_what_the_functions_count_bit_for_bit(client, name, by_id):
    expected = golden("keras_cnn_emnist" if name == "emnist_with_metrics" else name)
    model = client.model(name)
    weights = model.put_weights(expected.weights()) if by_id else expected.weights()
    state = model.initialize_metrics_state()
    with model.metrics_session() as by_forward, model.metrics_session() as by_update:
        for index, batch in enumerate(expected.batches):
            x, y = expected.batch(batch)
            output = model.forward_pass(weights, (x, y), training=False)
            state = model.update_metrics_state(state, y, output)
            zoo.assert_equal(by_forward.forward_pass(weights, (x, y)), output)
            by_update.update(y, output)
            for session in (by_forward, by_update):
                zoo.assert_equal(session.state(), state)
                found, tffs = session.result(), expected.get(f"finalized/{index + 1}", "finalized")
                zoo.assert_equal(found, model.finalize_metrics(state))
                # TFF's own, with the kernels of its TensorFlow: float32's last bits.
                zoo.assert_equal(found, tffs, atol=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_areas_under_curves_equal_the_local_models_bit_for_bit(client, weighted):
    local, model = zoo.curves(), client.model("curves")
    weights = local.initial_weights
    state = local.initialize_metrics_state()
    with model.metrics_session() as by_forward, model.metrics_session() as by_update:
        for seed in range(20):
            x, y, sample_weight = zoo.curves_batch(33 + seed, seed)
            sample_weight = sample_weight if weighted else None
            output = local.forward_pass(weights, (x, y), training=False)
            found = by_forward.forward_pass(weights, (x, y), sample_weight=sample_weight)
            # The server's graph multiplies and adds in one kernel, and the local model here in two.
            assert np.allclose(found.predictions, output.predictions, rtol=0, atol=1e-6)
            state = local.update_metrics_state(state, y, found, sample_weight)
            by_update.update(y, found, sample_weight)
        expected = {name: np.asarray(value) for name, value in local.finalize_metrics(state).items()}
        assert set(expected) == {"roc", "pr", "binary_accuracy"}
        for session in (by_forward, by_update):
            zoo.assert_equal(dict(session.result()), expected)


def test_a_with_block_closes_its_session_unless_an_error_is_raised(counting):
    with counting.metrics_session() as session:
        session.update(zoo.counting_batch(1)[1], BatchOutput())
        assert session.updates == 1
        assert repr(session) == f"<MetricsSession {session.id}>"
    with pytest.raises(errors.SessionNotFound, match=f"{session.id} was closed"):
        session.result()
    session.close()
    session = counting.metrics_session()
    with contextlib.suppress(KeyError), session:
        session.update(zoo.counting_batch(1)[1], BatchOutput())
        raise KeyError
    assert counted(session) == (3, 3)
    session.close()


def test_predictions_are_left_out_on_request(client):
    model = client.model("keras_cnn")
    batch = zoo.keras_batch(5)
    with model.metrics_session() as session:
        whole = session.forward_pass(model.initial_weights, batch)
        short = session.forward_pass(model.initial_weights, batch, with_predictions=False)
        assert whole.predictions.shape == (5, 5)
        assert short.predictions is None
        assert (short.loss, short.num_examples) == (whole.loss, 5)


def test_another_process_finds_a_session_by_its_id(counting, server):
    session = counting.metrics_session()
    session.forward_pass(counting.initial_weights, zoo.counting_batch(4))
    code = (
        "import sys, forwardpass_client as f; from support import zoo\n"
        "m = f.connect(sys.argv[1]).model('counting'); s = m.metrics_session(sys.argv[2])\n"
        "s.forward_pass(m.initial_weights, zoo.counting_batch(5)); print(s.updates)"
    )
    done = subprocess.run([sys.executable, "-c", code, server.address, session.id], capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr
    session.forward_pass(counting.initial_weights, zoo.counting_batch(6))
    assert counted(session) == (9, 45)
    assert counting.metrics_session(session.id).updates == 3
    session.close()


def test_states_are_exported_imported_and_merged(counting):
    with counting.metrics_session() as one, counting.metrics_session() as other:
        one.update(zoo.counting_batch(1)[1], BatchOutput())
        other.update(zoo.counting_batch(5)[1], BatchOutput(), np.float32([1, 0.5, 1]))
        assert other.state() == {"examples": 3, "labels": 15, "weights": 2.5}
        one.merge(other)
        one.merge(other.state())
        assert counted(one) == (9, 33)
        assert one.updates == 3
        with counting.metrics_session(initial_state=one.state()) as third:
            assert counted(third) == (9, 33)
            assert third.updates == 0
        state = counting.update_metrics_state(one.state(), zoo.counting_batch(2)[1], BatchOutput())
        assert state["labels"] == 39
        assert counted(other) == (3, 15)


def test_states_that_are_not_sums_are_not_merged_and_the_description_gives_the_reason(client):
    model = client.model("remembering")
    assert model.description.unmergeable_reason == "state['labels'] is not a sum over batches"
    with model.metrics_session() as session:
        with pytest.raises(errors.FunctionNotAvailable, match=r"remembering/1: merging .* is not a sum over batches"):
            session.merge({"labels": np.int64([1])})
        session.update(np.int64([3]), BatchOutput())
        assert session.state()["labels"].tolist() == [3]


def test_the_async_session_does_the_same(server):
    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("counting")
            weights = await model.initial_weights
            async with await model.metrics_session() as session:
                output = await session.forward_pass(weights, zoo.counting_batch(1))
                assert output.predictions.tolist() == [0, 1, 2]
                output = await session.forward_pass(weights, zoo.counting_batch(2), with_predictions=False)
                assert output.predictions is None
                labels = zoo.counting_batch(3)[1]
                updating = session.update(labels, output, np.float32([1, 1, 0]))
                # It was made by then.
                labels[:] = 100
                await updating
                again = await model.metrics_session(session.id)
                await asyncio.gather(*(again.update(zoo.counting_batch(4)[1], output) for _ in range(10)))
                other = await model.metrics_session(initial_state=await session.state())
                await other.merge(session)
                assert await other.result() == {"examples": 78, "labels": 2 * (18 + 120), "weights": 76.0}
                await other.close()
                assert (session.updates, again.updates) == (3, 13)
                with pytest.raises(errors.ShapeMismatch, match="labels"):
                    session.update(np.int64(1), output)
            with pytest.raises(errors.SessionNotFound):
                await session.result()
            session = await model.metrics_session()
            with contextlib.suppress(KeyError):
                async with session:
                    raise KeyError
            assert (await session.result())["examples"] == 0
            await session.close()

    asyncio.run(run())


def test_a_cancelled_async_update_counts_once_when_it_is_repeated(server):
    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("counting")
            async with await model.metrics_session() as session:
                for number in range(50):
                    updating = asyncio.ensure_future(session.update(zoo.counting_batch(number)[1], BatchOutput()))
                    await asyncio.sleep(number * 1e-4)
                    updating.cancel()
                    await asyncio.wait([updating])
                    if updating.cancelled():
                        await session.update(zoo.counting_batch(number)[1], BatchOutput())
                assert (await session.result())["labels"] == 3 * 49 * 25
                assert session.updates == (await model.metrics_session(session.id)).updates == 50

    asyncio.run(run())


def test_an_update_after_one_in_doubt_counts_in_addition(counting):
    with counting.metrics_session() as session:
        for number in range(20):
            with contextlib.suppress(errors.DeadlineExceeded):
                session.update(zoo.counting_batch(2**40)[1], BatchOutput(), timeout_s=number * 2e-4)
            session.update(zoo.counting_batch(1)[1], BatchOutput())
        in_doubt, others = divmod(int(session.result()["labels"]), 3 * 2**40)
        assert others == 60
        assert session.updates == 20 + in_doubt


def test_an_update_with_large_weights_is_the_same_by_value_and_by_id():
    with ServerProcess("--factory", "wide=support.zoo:wide_counting") as server:
        with forwardpass_client.connect(server.address) as client:
            model = client.model("wide")
            batch = np.ones((2, 4), np.float32), np.int64([1, 1])
            with model.metrics_session() as session:
                for number in range(20):
                    # The first time by value; then, since the same arrays come again, by id.
                    weights = zoo.wide_weights(2**20, number)
                    try:
                        session.forward_pass(weights, batch, timeout_s=number * 5e-4)
                    except errors.DeadlineExceeded:
                        session.forward_pass(weights, batch)
                assert session.result() == {"examples": 40}


def test_many_threads_may_share_a_session(counting):
    weights = counting.put_weights(counting.initial_weights)
    with counting.metrics_session() as session, concurrent.futures.ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda n: session.forward_pass(weights, zoo.counting_batch(n)), range(100)))
        assert len(outputs) == 100
        assert counted(session) == (300, 3 * 4950)


def test_long_batches_are_sent_in_pieces(client):
    model = client.model("counting")
    examples = 2**20 + 1
    with model.metrics_session() as session:
        output = session.forward_pass(model.initial_weights, zoo.counting_batch(1, examples))
        assert output.predictions.shape == (examples,)
        session.update(zoo.counting_batch(2, examples)[1], output)
        session.forward_pass(model.initial_weights, zoo.counting_batch(3, 2))
        assert counted(session) == (2 * examples + 2, 3 * examples + 6)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (
            errors.ShapeMismatch,
            r"labels: expected int64\[None\], got int64\[\]",
            lambda m, s: s.update(3, BatchOutput()),
        ),
        (errors.StructureMismatch, "labels: expected", lambda m, s: s.update({"y": [1]}, BatchOutput())),
        (errors.StructureMismatch, "batch_output: expected a BatchOutput", lambda m, s: s.update([1], 5)),
        (errors.ShapeMismatch, "sample_weight", lambda m, s: s.update([1], BatchOutput(), [[1.0]])),
        (errors.ModelRefusedInput, "assert", lambda m, s: s.update([-1], BatchOutput())),
        (errors.ModelRefusedInput, "", lambda m, s: s.forward_pass(m.initial_weights, ([77], [1]))),
        (
            errors.ShapeMismatch,
            r"model_weights\.trainable\[0\]",
            lambda m, s: s.forward_pass((([1.0],), ()), ([1], [1])),
        ),
        (errors.WeightsNotFound, "", lambda m, s: s.forward_pass(m.weights_handle("01" * 32), ([1], [1]))),
        (errors.StructureMismatch, "state: expected keys", lambda m, s: s.merge({"a": 1})),
        (errors.StructureMismatch, "initial_state: expected keys", lambda m, s: m.metrics_session(initial_state={})),
        (errors.SessionNotFound, "there is no metrics session 0101", lambda m, s: m.metrics_session("01" * 16)),
        (ValueError, "session_id: expected 32 hexadecimal digits, got 'x'", lambda m, s: m.metrics_session("x")),
        (ValueError, "has a state already", lambda m, s: m.metrics_session(s.id, initial_state=s.state())),
        (errors.InvalidRequest, "other_session_id: expected another session", lambda m, s: s.merge(s)),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(counting, error, message, call):
    with counting.metrics_session() as session:
        session.update([1], BatchOutput())
        with pytest.raises(error, match=message or None):
            call(counting, session)
        session.update([2], BatchOutput())
        assert counted(session) == (2, 3)
        assert session.updates == 2


def test_a_session_belongs_to_its_model(client, counting):
    with counting.metrics_session() as session:
        with pytest.raises(errors.InvalidRequest, match="model: expected counting/1, that of the session, got remem"):
            client.model("remembering").metrics_session(session.id)
    with client.model("keras_cnn", 1).metrics_session() as session:
        with pytest.raises(errors.InvalidRequest, match="model: expected keras_cnn/1, that of the session"):
            client.model("keras_cnn", 2).metrics_session(session.id)
    with pytest.raises(errors.FunctionNotAvailable, match="no TFF release saves metrics"):
        client.model("no_metrics").metrics_session()


def test_an_idle_session_raises_session_expired():
    with ServerProcess(*COUNTING, "--session-expiry", "1") as server:
        with forwardpass_client.connect(server.address) as client:
            session = client.model("counting").metrics_session()
            expired = "forwardpass_sessions_expired_total"
            session.update([1], BatchOutput())
            wait_until(lambda: server.metrics()[expired] == 1)
            for call in (session.result, lambda: session.update([1], BatchOutput()), session.state):
                with pytest.raises(errors.SessionExpired, match=f"{session.id} was idle for too long"):
                    call()
            assert server.metrics()["forwardpass_sessions"] == 0


def test_sessions_and_their_states_have_limits():
    arguments = (*COUNTING, "--factory", "remembering=support.zoo:remembering", "--max-sessions", "2")
    with ServerProcess(*arguments, "--max-state-mib", "1") as server:
        with forwardpass_client.connect(server.address) as client:
            first, second = (client.model("counting").metrics_session() for _ in range(2))
            with pytest.raises(errors.SessionLimitExceeded, match="open metrics sessions: expected at most 2, got 3"):
                client.model("counting").metrics_session()
            first.close()
            session = client.model("remembering").metrics_session()
            with pytest.raises(errors.SessionLimitExceeded, match="state: expected at most 1048576 bytes"):
                session.update(np.zeros(2**17 + 1, np.int64), BatchOutput())
            session.update([1], BatchOutput())
            second.update([1], BatchOutput())
            assert session.updates == second.updates == 1


def wait_until(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("method", ["update", "forward_pass"])
def test_a_killed_server_continues_its_sessions_and_no_client_call_fails(tmp_path, method):
    arguments = (*COUNTING, "--session-store", f"sqlite://{tmp_path}/sessions.sqlite3")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ServerProcess(*arguments))
        client = stack.enter_context(forwardpass_client.connect(server.address))
        model = client.model("counting")
        weights = model.initial_weights
        sessions = [model.metrics_session() for _ in range(4)]
        acknowledged = [0] * 4
        stop = False

        def count(index: int) -> None:
            while not stop:
                x, y = zoo.counting_batch(acknowledged[index] + 1)
                if method == "update":
                    sessions[index].update(y, BatchOutput())
                else:
                    assert sessions[index].forward_pass(weights, (x, y)).predictions.tolist() == [0, 1, 2]
                acknowledged[index] += 1

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            counting = [pool.submit(count, index) for index in range(4)]
            try:
                wait_until(lambda: min(acknowledged) > 50)
                server.process.kill()
                server.process.wait()
                before = list(acknowledged)
                stack.enter_context(ServerProcess(*arguments, port=server.port))
                wait_until(lambda: all(now > then + 50 for now, then in zip(acknowledged, before, strict=True)))
            finally:
                stop = True
            for one in counting:
                one.result()
        for session, count_ in zip(sessions, acknowledged, strict=True):
            assert counted(session) == (3 * count_, 3 * count_ * (count_ + 1) // 2)
            assert session.updates == model.metrics_session(session.id).updates == count_


def test_metrics_count_sessions_and_updates(server, counting):
    before = server.metrics()
    with counting.metrics_session() as session:
        for _ in range(3):
            session.update([1], BatchOutput())
        after = server.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["forwardpass_sessions"] == 1
    assert grown['forwardpass_session_updates_total{outcome="applied"}'] == 3
    assert grown["forwardpass_session_commit_seconds_count"] == 4


@pytest.fixture
def full_disk(tmp_path):
    """A server whose session store has no room for anything more, and a client."""
    store = f"--session-store=sqlite://{tmp_path}/sessions.sqlite3"
    with ServerProcess(*COUNTING, store) as process, forwardpass_client.connect(process.address) as client:
        session = client.model("counting").metrics_session()
        longest = max(path.stat().st_size for path in tmp_path.iterdir())
        # The kernel lets the server write no longer files.
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (longest, longest))
        yield process, session.id


# gRPC itself tries again for some 3 s, and the client after that.
@pytest.mark.parametrize("timeout_s", [2.0, 6.0])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_error_of_a_deadline_that_passes_while_the_store_fails_names_the_store(full_disk, kind, timeout_s):
    server, session_id = full_disk
    _, labels = zoo.counting_batch(1)

    def update() -> None:
        with forwardpass_client.connect(server.address) as client:
            session = client.model("counting").metrics_session(session_id)
            session.update(labels, BatchOutput(), timeout_s=timeout_s)

    async def update_async() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            session = await (await client.model("counting")).metrics_session(session_id)
            await session.update(labels, BatchOutput(), timeout_s=timeout_s)

    run = update if kind == "sync" else lambda: asyncio.run(update_async())
    with pytest.raises((errors.DeadlineExceeded, errors.SessionStoreUnavailable), match="the session store failed"):
        run()
