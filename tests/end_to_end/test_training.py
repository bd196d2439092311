"""Training over one stream: the weights of a local loop, whatever becomes of either end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import shutil
import signal
import subprocess
import sys
import threading

import grpc
import keras
import numpy as np
import pytest
from click.testing import CliRunner

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import frames, messages
from forwardpass.wire.methods import METHODS
from forwardpass.wire.structures import Structure
from forwardpass_client import errors
from forwardpass_client.cli import npz
from forwardpass_client.cli.commands import forwardpass
from support import zoo
from support.servers import ServerProcess, wait_until

CURVES = ("--factory", "curves=support.zoo:curves")
SGD = '{"class_name":"SGD","config":{"learning_rate":0.1}}'


@pytest.fixture(scope="module")
def server():
    with ServerProcess(*CURVES, "--factory", "counting=support.zoo:counting") as process:
        yield process


@pytest.fixture
def model(client):
    return client.model("curves")


def batches(count: int, size: int = 16):
    return [zoo.curves_batch(size, seed)[:2] for seed in range(count)]


def weighted(count: int):
    return [zoo.curves_batch(16, seed) for seed in range(count)]


def states_are_freed(server) -> bool:
    metrics = server.metrics()
    return not metrics["forwardpass_training_states_bytes"] and not metrics["forwardpass_messages_bytes"]


def test_training_equals_a_loop_over_gradients(model):
    data = batches(20)
    trainable, non_trainable = model.initial_weights
    losses = []
    for batch in data:
        output, gradients = model.forward_backward((trainable, non_trainable), batch)
        losses.append(float(output.loss))
        trainable = tuple(leaf - np.float32(0.1) * slope for leaf, slope in zip(trainable, gradients, strict=True))
    result = model.train(model.initial_weights, data, learning_rate=0.1)
    # float32: the graph of a step may add in another order than two calls do.
    zoo.assert_equal(model.get_weights(result.weights), (trainable, non_trainable), atol=1e-6)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert (result.num_examples, result.num_steps) == (320, 20)
    assert set(result.metrics) == {"roc", "pr", "binary_accuracy"}
    assert result.optimizer_state is None


def test_the_same_batches_give_the_same_weights_id(model):
    data = batches(12)
    ids = {
        model.train(model.initial_weights, source, learning_rate=0.1, epochs=epochs).weights.id
        for source, epochs in ((data * 3, 1), (iter(data * 3), 1), (data, 3), (lambda: iter(data), 3))
    }
    assert len(ids) == 1


def test_no_batches_return_the_weights_of_the_start(model):
    handle = model.put_weights(model.initial_weights)
    for result in (
        model.train(handle, [], learning_rate=0.1),
        model.train(handle, batches(3), learning_rate=1, epochs=0),
    ):
        assert result.weights.id == handle.id
        assert (result.loss, result.num_examples, result.num_steps) == (0.0, 0, 0)


def test_batches_have_sample_weights_as_the_first_one_has(model):
    data = weighted(6)
    plain = model.train(model.initial_weights, batches(6), learning_rate=0.1)
    result = model.train(model.initial_weights, data, learning_rate=0.1)
    assert result.weights.id != plain.weights.id
    mappings = [{"x": x, "y": y, "sample_weight": weight} for x, y, weight in data]
    assert model.train(model.initial_weights, mappings, learning_rate=0.1).weights.id == result.weights.id
    with pytest.raises(errors.StructureMismatch, match="sample_weight: expected sample weights, as in the first"):
        model.train(model.initial_weights, [data[0], data[1][:2]], learning_rate=0.1)


def test_frozen_leaves_do_not_change_and_a_proximal_term_holds_the_others(model):
    start = model.initial_weights
    frozen = model.train(start, batches(10), learning_rate=0.1, trainable=(False, False, True, True))
    before, after = start[0], model.get_weights(frozen.weights)[0]
    assert [bool(np.array_equal(*pair)) for pair in zip(before, after, strict=True)] == [True, True, False, False]

    def distance(**options):
        weights = model.get_weights(model.train(start, batches(30), learning_rate=0.1, **options).weights)[0]
        return sum(float(np.square(new - old).sum()) for new, old in zip(weights, before, strict=True))

    assert distance(proximal=5.0) < distance()


def test_an_optimizer_goes_on_with_its_state(model):
    data = batches(20)
    options = {"optimizer": {"class_name": "SGD", "config": {"momentum": 0.9, "learning_rate": 0.1}}}
    whole = model.train(model.initial_weights, data, **options)
    first = model.train(model.initial_weights, data[:10], keep_optimizer_state=True, **options)
    second = model.train(first.weights, data[10:], optimizer_state=first.optimizer_state, **options)
    assert second.weights.id == whole.weights.id
    assert second.num_steps == 10
    with pytest.raises(errors.StructureMismatch, match="optimizer_state"):
        model.train(first.weights, data, learning_rate=0.1, optimizer="adam", optimizer_state=first.optimizer_state)
    with pytest.raises(errors.StructureMismatch, match="model_weights"):
        model.train(first.optimizer_state, data, learning_rate=0.1)


def test_progress_tells_the_number_of_batches(model):
    told = []
    model.train(model.initial_weights, batches(50), learning_rate=0.1, epochs=2, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 100


def test_many_trainings_come_in_order(model):
    data = batches(8)
    starts = [None, model.initial_weights, model.train(model.initial_weights, data, learning_rate=0.1).weights]
    clients = [(data[: index % 9], starts[index % 3]) for index in range(20)]
    told = []
    options = {"learning_rate": 0.1, "max_streams": 3, "progress": told.append}
    results = list(model.train_many(clients, weights=model.initial_weights, **options))
    assert told == list(range(1, 21))
    for (own, start), result in zip(clients, results, strict=True):
        expected = model.train(model.initial_weights if start is None else start, own, learning_rate=0.1)
        assert (result.weights.id, result.num_steps) == (expected.weights.id, len(own))


def test_the_first_failure_of_many_trainings_ends_them_all(model, server):
    data = batches(4)
    clients = [(data, None)] * 3 + [([data[0], (np.zeros((2, 4), np.float32), np.zeros((3, 1), np.float32))], None)] * 9
    read = []

    def reading():
        for client in clients:
            read.append(1)
            yield client

    with pytest.raises((errors.ShapeMismatch, errors.ModelRefusedInput)):
        list(model.train_many(reading(), weights=model.initial_weights, learning_rate=0.1, max_streams=2))
    assert len(read) < len(clients)
    trainings = model.train_many([(data, None)] * 8, weights=model.initial_weights, learning_rate=0.1)
    next(trainings)
    trainings.close()
    wait_until(lambda: states_are_freed(server))
    with pytest.raises(ValueError, match=r"clients\[0\] has none of its own"):
        list(model.train_many([(data, None)], learning_rate=0.1))


def test_an_error_of_many_trainings_names_the_client(model):
    data, options = batches(2), {"weights": model.put_weights(model.initial_weights), "learning_rate": 0.1}
    with pytest.raises(errors.ShapeMismatch) as raised:
        list(model.train_many([(data, None), (data, None), ([*data, ("a", "b")], None)], **options))
    assert str(raised.value).startswith("clients[2]: batch_input.x")
    assert raised.value.place.startswith("clients[2].batch_input.x")
    # The batches themselves are no pair, also where they are two.
    with pytest.raises(TypeError, match=r"clients\[1\]: expected a tuple \(batches, weights\).*got list"):
        list(model.train_many([(data, None), data], **options))


def test_a_result_in_place_of_its_weights_is_refused_with_advice(client, model):
    result = model.train(model.initial_weights, [], learning_rate=0.1)
    for call in (model.evaluate, model.forward_pass):
        with pytest.raises(errors.StructureMismatch, match="got TrainingResult: pass its attribute weights"):
            call(result, batches(1)[0])
    with pytest.raises(TypeError, match="got TrainingResult: pass its attribute weights"):
        client.combine([(result, 1)])


def test_asyncio_does_the_same(server):
    data = batches(12)

    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("curves")
            start = await model.initial_weights

            async def slowly():
                for batch in data:
                    await asyncio.sleep(0)
                    yield batch

            one = await model.train(start, data, learning_rate=0.1, epochs=2)
            for source in (slowly, lambda: data):
                assert (await model.train(start, source, learning_rate=0.1, epochs=2)).weights.id == one.weights.id
            with pytest.raises(ValueError, match="got an iterator"):
                await model.train(start, slowly(), learning_rate=0.1, epochs=2)
            clients = [(data[:count], None) for count in range(10)]
            told = []
            options = {"learning_rate": 0.1, "progress": told.append}
            found = [result async for result in model.train_many(clients, weights=start, **options)]
            assert told == list(range(1, 11))
            assert [result.num_steps for result in found] == list(range(10))
            with pytest.raises(errors.OptimizerNotSupported):
                await model.train(start, data, optimizer="nobody", learning_rate=0.1)
            with pytest.raises(errors.ShapeMismatch, match=r"^clients\[[0-2]\]: batch_input\.x"):
                async for _ in model.train_many([([("a", "b")], start)] * 3, learning_rate=0.1):
                    pass

    asyncio.run(run())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"optimizer": "sgdd", "learning_rate": 1}, errors.OptimizerNotSupported, "expected one of Adadelta"),
        ({"optimizer": 5}, TypeError, "optimizer: expected a name"),
        ({}, ValueError, "learning_rate: expected a number"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate: expected a number >= 0, got nan"),
        ({"learning_rate": -1}, ValueError, "learning_rate: expected a number >= 0"),
        ({"learning_rate": "1"}, TypeError, "learning_rate: expected a number"),
        ({"learning_rate": 1, "proximal": -1}, ValueError, "proximal: expected a number >= 0"),
        ({"learning_rate": 1, "epochs": -1}, ValueError, "epochs: expected 0 or more"),
        ({"learning_rate": 1, "epochs": 1.5}, TypeError, "epochs: expected an int"),
        ({"learning_rate": 1, "trainable": (True, True)}, errors.StructureMismatch, "trainable: expected 4"),
        ({"learning_rate": 1, "trainable": False}, ValueError, "at least one leaf"),
        ({"learning_rate": 1, "trainable": (1, 1, 1, 1)}, errors.StructureMismatch, r"trainable\[0\]: expected True"),
        ({"learning_rate": 1, "checkpoint_steps": 0}, ValueError, "checkpoint_steps: expected 1 or more"),
        ({"learning_rate": 1, "optimizer_state": "1" * 64}, errors.StructureMismatch, "optimizer_state"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_is_sent(model, options, error, message):
    with pytest.raises(error, match=message):
        model.train(model.initial_weights, iter(()), **options)


def test_batches_that_are_none_are_refused(model):
    for source, error in ((5, TypeError), ("abc", TypeError), ({"x": 1}, TypeError)):
        with pytest.raises(error, match="batches: expected an iterable"):
            model.train(model.initial_weights, source, learning_rate=1)
    with pytest.raises(errors.ShapeMismatch, match=r"batch_input\.x"):
        model.train(model.initial_weights, [(np.zeros((3, 5), np.float32), np.zeros((3, 1)))], learning_rate=1)
    with pytest.raises(errors.WeightsNotFound, match="has no arrays to send"):
        model.train(model.weights_handle("01" * 32), batches(3), learning_rate=1)
    with pytest.raises(KeyError):
        model.train(model.initial_weights, failing(), learning_rate=1)


def failing():
    yield from batches(3)
    raise KeyError


def test_optimizers_may_be_names_in_any_case_mappings_and_objects(model):
    class SGD:
        def get_config(self):
            return {"name": "mine", "learning_rate": np.float32(0.5), "momentum": 0.0, "nesterov": False}

    forms = ["sgd", "SGD", {"class_name": "SGD", "config": {}}, SGD()]
    found = {
        model.train(model.initial_weights, batches(3), optimizer=form, learning_rate=0.5).weights.id for form in forms
    }
    assert len(found) == 1


# The protocol itself, as another client might use it.


def start_of(weights: bytes, **changes):
    values = {"model": v1.ModelSelector(name="curves"), "weights_id": weights, "optimizer": SGD, **changes}
    return v1.TrainingStart(**values)


def encoded(batch) -> bytes:
    parts = {"batch_input.x": Structure.of(batch[0]), "batch_input.y": Structure.of(batch[1])}
    if len(batch) > 2:
        parts["sample_weight"] = Structure.of(batch[2])
    return messages.encode(v1.TrainingBatch(), parts)


def framed(number: int, data: bytes) -> v1.TrainRequest:
    outbox = frames.Outbox(answers=False)
    outbox.put(number, frames.encode_call("", None, len(data)), data)
    return v1.TrainRequest.FromString(outbox.next_message())


def train(server, requests, timeout_s: float = 30) -> list[v1.TrainResponse]:
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(
            METHODS["Train"].path,
            request_serializer=v1.TrainRequest.SerializeToString,
            response_deserializer=v1.TrainResponse.FromString,
        )
        return list(call(iter(requests), timeout=timeout_s))


@pytest.fixture
def weights_id(model):
    return bytes.fromhex(model.put_weights(model.initial_weights).id)


def test_several_updates_may_be_sent_at_once(server, model, weights_id):
    data = batches(10)
    start = v1.TrainRequest(start=start_of(weights_id, checkpoint_steps=4))
    update = [start, *(framed(number, encoded(batch)) for number, batch in enumerate(data, 1))]
    update.append(v1.TrainRequest(finish=True))
    responses = train(server, [*update, *update, *update])
    results = [response.result for response in responses if response.HasField("result")]
    expected = model.train(model.initial_weights, data, learning_rate=0.1)
    assert [result.weights_id.hex() for result in results] == [expected.weights.id] * 3
    positions = [response.position.sequence for response in responses if response.HasField("position")]
    assert positions == [0, 0, 0]
    checkpoints = [response.checkpoint for response in responses if response.HasField("checkpoint")]
    assert [checkpoint.sequence for checkpoint in checkpoints] == [4, 8] * 3
    # An update goes on from a checkpoint to the same result.
    checkpoint = checkpoints[1]
    rest = start_of(
        checkpoint.weights_id,
        optimizer_state_id=checkpoint.optimizer_state_id,
        checkpoint_sequence=8,
    )
    frames_of_rest = [framed(number, encoded(data[number - 1])) for number in (9, 10)]
    responses = train(server, [v1.TrainRequest(start=rest), *frames_of_rest, v1.TrainRequest(finish=True)])
    assert responses[-1].result.weights_id.hex() == expected.weights.id
    assert responses[-1].result.num_steps == 10
    assert responses[-1].result.loss == pytest.approx(expected.loss, rel=1e-12)


def test_one_message_may_hold_a_whole_update(server, model, weights_id):
    message = framed(1, encoded(batches(1)[0]))
    message.start.CopyFrom(start_of(weights_id))
    message.finish = True
    assert train(server, [message])[-1].result.num_steps == 1
    assert train(server, []) == []


def hostile(weights_id: bytes):
    """Requests that are refused: the status, a part of the message, and the requests."""
    good = framed(1, encoded(batches(1)[0]))
    start = v1.TrainRequest(start=start_of(weights_id))
    finish = v1.TrainRequest(finish=True)

    def with_start(**changes):
        return [v1.TrainRequest(start=start_of(weights_id, **changes)), good, finish]

    invalid = "INVALID_ARGUMENT"
    wrong_shape = np.zeros((3, 5), np.float32), np.zeros((3, 1), np.float32)
    wrong_dtype = np.zeros((3, 4), np.float64), np.zeros((3, 1), np.float32)
    return {
        "frames first": (invalid, "first message: expected start", [good]),
        "finish first": (invalid, "first message: expected start", [finish]),
        "nothing first": (invalid, "first message: expected start", [v1.TrainRequest()]),
        "two starts": (invalid, "start: expected finish of the update before", [start, good, start]),
        "no finish": (invalid, "last message: expected finish", [start, good]),
        "a number left out": (invalid, "call: expected batch 1, got 2", [start, framed(2, encoded(batches(1)[0]))]),
        "another shape": (
            invalid,
            "batch 1: .*batch_input.x: expected",
            [start, framed(1, encoded(wrong_shape)), finish],
        ),
        "another dtype": (
            invalid,
            "batch 1: .*batch_input.x: expected",
            [start, framed(1, encoded(wrong_dtype)), finish],
        ),
        "sample weights": (
            invalid,
            "batch 1: sample_weight: expected None",
            [start, framed(1, encoded(weighted(1)[0])), finish],
        ),
        "no sample weights": (invalid, "batch 1: sample_weight", with_start(weighted=True)),
        "bytes": (invalid, "batch 1: ", [start, framed(1, b"\xff\xff\xff"), finish]),
        "no weights": (invalid, "start.weights_id: expected 32 bytes", with_start(weights_id=b"")),
        "unknown weights": ("NOT_FOUND", "does not hold weights", with_start(weights_id=bytes(32))),
        "unknown model": ("NOT_FOUND", "model", with_start(model=v1.ModelSelector(name="nobody"))),
        "unknown label": ("NOT_FOUND", "label", with_start(model=v1.ModelSelector(name="curves", label="none"))),
        "other weights": (invalid, "model_weights", with_start(model=v1.ModelSelector(name="counting"))),
        "short mask": (invalid, "start.trainable: expected 4", with_start(trainable=[True])),
        "frozen": (invalid, "start.trainable: expected a leaf", with_start(trainable=[False] * 4)),
        "NaN rate": (invalid, "start.learning_rate: expected a number", with_start(learning_rate=float("nan"))),
        "infinite rate": (invalid, "start.learning_rate", with_start(learning_rate=float("inf"))),
        "huge rate": (invalid, "start.learning_rate", with_start(learning_rate=1e300)),
        "negative rate": (invalid, "start.learning_rate", with_start(learning_rate=-0.1)),
        "no rate": (invalid, "start.learning_rate", with_start(optimizer='{"class_name":"SGD","config":{}}')),
        "NaN proximal": (invalid, "start.proximal", with_start(proximal=float("nan"))),
        "negative proximal": (invalid, "start.proximal", with_start(proximal=-1)),
        "huge proximal": (invalid, "start.proximal", with_start(proximal=1e300)),
        "a long optimizer": (invalid, "start.optimizer", with_start(optimizer="x" * 2**20)),
        "deep JSON": (invalid, "start.optimizer", with_start(optimizer='{"a":' + "[" * 5000)),
        "code": (
            invalid,
            "start.optimizer",
            with_start(optimizer='{"class_name":"Lambda","config":{"function":"import os"}}'),
        ),
        "negative steps": (invalid, "start.checkpoint_steps", with_start(checkpoint_steps=-1)),
        "a checkpoint without state": (invalid, "start.optimizer_state_id", with_start(checkpoint_sequence=5)),
        "unknown state": ("NOT_FOUND", "does not hold", with_start(optimizer_state_id=bytes(32))),
        "weights as state": (invalid, "optimizer_state", with_start(optimizer_state_id=weights_id)),
    }


@pytest.mark.parametrize("name", hostile(bytes(32)))
def test_hostile_requests_are_refused_and_leave_nothing(server, model, weights_id, name):
    status, message, requests = hostile(weights_id)[name]
    with pytest.raises(grpc.RpcError, match=f"(?s){message}") as caught:
        train(server, requests)
    assert caught.value.code().name == status
    wait_until(lambda: states_are_freed(server))


def test_metrics_that_overflow_and_weights_that_are_not_finite_are_a_result(model):
    x, y = np.full((4, 4), 1e30, np.float32), np.ones((4, 1), np.float32)
    result = model.train(model.initial_weights, [(x, y)] * 20, learning_rate=1e30)
    assert result.num_steps == 20
    assert model.train(result.weights, batches(3), learning_rate=0.1).num_steps == 3


def test_a_training_of_many_steps(model):
    batch = batches(1, 1)[0]
    result = model.train(model.initial_weights, [batch] * 1000, learning_rate=0.01, epochs=5)
    assert (result.num_steps, result.num_examples) == (5000, 5000)


def test_a_cancelled_training_frees_its_memory(server, model):
    seen = threading.Event()

    def endless():
        while True:
            yield batches(1)[0]

    def progress(count: int) -> None:
        if count > 50 and not seen.is_set():
            assert server.metrics()["forwardpass_training_states_bytes"] > 0
            seen.set()
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.train(model.initial_weights, endless(), learning_rate=0.1, progress=progress)
    wait_until(lambda: states_are_freed(server))
    with pytest.raises(errors.DeadlineExceeded):
        model.train(model.initial_weights, endless(), learning_rate=0.1, timeout_s=0.5)
    wait_until(lambda: states_are_freed(server))


def test_calls_are_answered_beside_many_trainings(server, model):
    """Each training goes on only after the caller has had answers since: neither side can starve the other."""
    handle, x = model.put_weights(model.initial_weights), batches(1)[0][0]
    answered = threading.Semaphore(0)
    is_over = threading.Event()

    def paced():
        for batch in batches(40):
            yield batch
            assert answered.acquire(timeout=60)

    def call() -> None:
        while not is_over.is_set():
            model.predict_on_batch(handle, x)
            answered.release()

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        calling = pool.submit(call)
        trainings = [pool.submit(model.train, handle, paced(), learning_rate=0.1) for _ in range(8)]
        ids = {training.result().weights.id for training in trainings}
        is_over.set()
        calling.result()
    assert ids == {model.train(handle, batches(40), learning_rate=0.1).weights.id}


def interrupted(data, at: int, reached: threading.Event, go_on: threading.Event):
    """A function that returns the batches. The first reading stops at a batch until the server has been replaced."""
    is_first = True

    def read():
        nonlocal is_first
        stops, is_first = is_first, False
        for index, batch in enumerate(data):
            if stops and index == at:
                reached.set()
                assert go_on.wait(60)
            yield batch

    return read


@pytest.mark.parametrize("keeps", [False, True])
def test_a_training_outlives_a_killed_server(tmp_path, keeps):
    data = batches(60)
    folder = ("--weights-folder", str(tmp_path / "weights")) if keeps else ()
    reached, go_on = threading.Event(), threading.Event()
    told = []
    with ServerProcess(*CURVES, *folder) as first:
        port = first.port
        with forwardpass_client.connect(first.address) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
            model = client.model("curves")
            start = model.initial_weights
            expected = model.train(start, data, learning_rate=0.1).weights.id
            training = pool.submit(
                model.train,
                start,
                interrupted(data, 40, reached, go_on),
                learning_rate=0.1,
                checkpoint_steps=10,
                progress=told.append,
            )
            assert reached.wait(60)
            wait_until(lambda: told[-1:] == [40])
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
            with ServerProcess(*CURVES, *folder, port=port) as second:
                go_on.set()
                result = training.result(60)
                steps = second.metrics()['forwardpass_training_step_seconds_count{model="curves"}']
    assert result.weights.id == expected
    assert (result.num_steps, result.num_examples) == (60, 960)
    # A server that keeps its weights on disk goes on at the checkpoint, and another one begins again.
    assert steps == (20 if keeps else 60)


def test_a_training_over_an_iterator_says_why_it_cannot_go_on():
    reached, go_on = threading.Event(), threading.Event()
    with ServerProcess(*CURVES) as first:
        with forwardpass_client.connect(first.address) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
            model = client.model("curves")
            source = interrupted(batches(60), 40, reached, go_on)()
            told = []
            training = pool.submit(model.train, model.initial_weights, source, learning_rate=0.1, progress=told.append)
            assert reached.wait(60)
            wait_until(lambda: told[-1:] == [40])
            # The drain does not wait for batches that have not been sent.
            assert first.terminate() == 0
            go_on.set()
            with pytest.raises(errors.ServerUnavailable, match="cannot continue, because its batches are an iterator"):
                training.result(60)


def test_an_optimizer_state_of_another_optimizer_or_model_names_what_differs(model):
    adam = {"optimizer": "adam", "learning_rate": 0.01}
    state = model.train(model.initial_weights, batches(2), keep_optimizer_state=True, **adam).optimizer_state
    frozen = {**adam, "trainable": (False, True, True, True)}
    for options in ({**adam, "optimizer": "rmsprop"}, {**adam, "optimizer": "adamax"}, frozen):
        with pytest.raises(errors.StructureMismatch, match=r"optimizer_state\['optimizer'\]: expected keys"):
            model.train(model.initial_weights, batches(2), optimizer_state=state, **options)
    # A change of numbers only: the state fits.
    changed = {"optimizer": {"class_name": "Adam", "config": {"beta_1": 0.8}}, "learning_rate": 0.5}
    assert model.train(model.initial_weights, batches(2), optimizer_state=state, **changed).num_steps == 2


def test_trainings_of_the_same_weights_by_different_optimizers_do_not_disturb_each_other(model):
    handle, data = model.put_weights(model.initial_weights), batches(20)
    optimizers = ["sgd", "adam", {"class_name": "SGD", "config": {"momentum": 0.9}}] * 3

    def train(optimizer) -> str:
        return model.train(handle, data, optimizer=optimizer, learning_rate=0.1).weights.id

    expected = [train(optimizer) for optimizer in optimizers]
    with concurrent.futures.ThreadPoolExecutor(len(optimizers)) as pool:
        assert list(pool.map(train, optimizers)) == expected
    assert len(set(expected)) == 3


ENDLESS = """
import sys
import forwardpass_client
from support import zoo

def forever():
    while True:
        yield zoo.curves_batch(16, 0)[:2]

with forwardpass_client.connect(sys.argv[1]) as client:
    model = client.model("curves")
    progress = lambda count: print(count, flush=True)
    model.train(model.initial_weights, forever(), learning_rate=0.1, checkpoint_steps=5, progress=progress)
"""


def test_a_client_that_is_killed_leaves_no_state(server):
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, server.address], stdout=subprocess.PIPE, text=True
    ) as process:
        while int(process.stdout.readline()) < 30:
            pass
        assert server.metrics()["forwardpass_training_states_bytes"] > 0
        process.kill()
    wait_until(lambda: states_are_freed(server))


def test_a_weights_store_without_room_refuses_a_training_before_its_first_step():
    batch = np.ones((2, 4), np.float32), np.ones(2, np.float32)
    arguments = ("--factory", "wide=support.zoo:wide_1m", "--weights-mib", "5")
    with ServerProcess(*arguments) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("wide")
        held = [model.put_weights(zoo.wide_weights(2**20, seed)) for seed in range(5)]
        for handle in held:
            handle.lease(600)
        told = []
        adam = {"optimizer": "adam", "learning_rate": 0.1, "progress": told.append}

        def steps_before_the_refusal(**options) -> list[int]:
            with pytest.raises(errors.WeightStoreFull, match="no room for"):
                model.train(held[0], [batch] * 40, **adam, **options)
            return told

        assert steps_before_the_refusal() == []
        held[1].lease(0)
        # There is room for the weights, and none for the two moments of each weight.
        for options in ({"keep_optimizer_state": True}, {"checkpoint_steps": 30}):
            assert steps_before_the_refusal(**options) == []
        assert model.train(held[0], [batch] * 40, **adam).num_steps == 40
        for handle in held[1:]:
            handle.lease(0)
        assert model.train(held[0], [batch] * 40, keep_optimizer_state=True, **adam).optimizer_state is not None
        wait_until(lambda: states_are_freed(server))


@pytest.mark.parametrize("method", ["ReloadModel", "UnloadModel"])
def test_a_training_goes_on_with_the_model_that_it_began_with(tmp_path, method):
    folder = tmp_path / "models"
    zoo.write_repository(folder)
    shutil.move(folder / "keras_cnn" / "1", tmp_path / "served" / "cnn" / "1")
    data = [(np.full((2, 6, 6, 1), value, np.float32), np.zeros(2, np.int64)) for value in range(20)]
    arguments = ("--model-repository", str(tmp_path / "served"), "--management-port", "0")
    with ServerProcess(*arguments) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("cnn")
        expected = model.train(model.initial_weights, data, learning_rate=0.1).weights.id
        told = []

        def changing():
            yield from data[:10]
            wait_until(lambda: told[-1:] == [10])
            request = METHODS[method].request(model=v1.ModelSelector(name="cnn", version=1))
            with grpc.insecure_channel(server.management_address) as channel:
                channel.unary_unary(METHODS[method].path)(request.SerializeToString(), timeout=60)
            yield from data[10:]

        result = model.train(model.initial_weights, changing(), learning_rate=0.1, progress=told.append)
        assert result.weights.id == expected
        if method == "UnloadModel":
            with pytest.raises(errors.ModelNotFound):
                model.train(model.initial_weights, data, learning_rate=0.1)


class WithoutTraining(grpc.GenericRpcHandler):
    """Passes calls on to a server, as if it were an older one that has no training."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def service(self, details):
        path, metadata = details.method, details.invocation_metadata
        if path == METHODS["Train"].path:
            return None
        own = next((method for method in METHODS.values() if method.path == path), None)
        if own is None or own.is_unary:
            call = self._channel.unary_unary(path)
            return grpc.unary_unary_rpc_method_handler(lambda request, context: call(request, metadata=metadata))
        stream = self._channel.stream_stream(path)
        return grpc.stream_stream_rpc_method_handler(lambda requests, context: stream(requests, metadata=metadata))


def test_a_server_without_training_says_so(server):
    options = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
    with grpc.insecure_channel(server.address, options) as channel:
        older = grpc.server(concurrent.futures.ThreadPoolExecutor(8), handlers=[WithoutTraining(channel)])
        port = older.add_insecure_port("127.0.0.1:0")
        older.start()
        try:
            with forwardpass_client.connect(f"127.0.0.1:{port}") as client:
                model = client.model("curves")
                data = batches(3)
                with pytest.raises(errors.MethodNotSupported, match="older than the client"):
                    model.train(model.initial_weights, data, learning_rate=0.1)
                with pytest.raises(errors.MethodNotSupported, match="older than the client"):
                    list(model.train_many([(data, None)] * 3, weights=model.initial_weights, learning_rate=0.1))
                # What the server has goes on.
                assert model.forward_backward(model.initial_weights, data[0])[0].num_examples == 16
        finally:
            older.stop(None).wait()


def test_only_prepared_optimizers_train_where_the_operator_says_so():
    with ServerProcess(*CURVES, "--training-optimizers", "prepared") as server:
        with forwardpass_client.connect(server.address) as client:
            model = client.model("curves")
            traced = server.metrics()["forwardpass_traces_total"]
            # A Keras optimizer writes all of its options.
            spellings = [
                "adam",
                {"class_name": "adam", "config": {"beta_1": 0.9}},
                keras.optimizers.serialize(keras.optimizers.Adam(1e-3)),
                keras.optimizers.Adam(1e-3),
            ]
            for _ in range(2):
                ids = {
                    model.train(model.initial_weights, batches(2), optimizer=one, learning_rate=1e-3).weights.id
                    for one in spellings
                }
                assert len(ids) == 1
            refused = {"optimizer": {"class_name": "Adam", "config": {"beta_1": 0.8}}}
            for options in ({"optimizer": "rmsprop"}, refused, {"proximal": 1.0}):
                with pytest.raises(errors.OptimizerNotSupported, match="prepares optimizers only with their model"):
                    model.train(model.initial_weights, batches(2), learning_rate=1e-3, **options)
            unknown = {"class_name": "Adam", "config": {"nonsense": 1}}
            with pytest.raises(errors.OptimizerNotSupported, match="keys among"):
                model.train(model.initial_weights, batches(2), learning_rate=1e-3, optimizer=unknown)
            assert server.metrics()["forwardpass_traces_total"] == traced


def test_metrics_of_trainings(server, model):
    before = server.metrics()
    model.train(model.initial_weights, batches(7), optimizer="adagrad", learning_rate=0.1)
    with pytest.raises(errors.OptimizerNotSupported):
        model.train(
            model.initial_weights,
            batches(1),
            optimizer={"class_name": "SGD", "config": {"nonsense": 1}},
            learning_rate=1,
        )
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('forwardpass_training_updates_total{outcome="finished"}') == 1
    assert grown('forwardpass_training_updates_total{outcome="failed"}') == 1
    assert grown('forwardpass_training_step_seconds_count{model="curves"}') == 7
    assert grown('forwardpass_training_prepare_seconds_count{outcome="prepared"}') == 1
    assert grown('forwardpass_training_prepare_seconds_count{outcome="refused"}') == 1


def test_the_command_trains_prints_the_id_and_saves_the_weights(server, model, tmp_path):
    x, y = (np.concatenate(leaves) for leaves in zip(*batches(10), strict=True))
    data, saved = tmp_path / "data.npz", tmp_path / "weights.npz"
    npz.save(data, {"x": x, "y": y})

    def command(*arguments: str, code: int = 0) -> str:
        words = ["train", server.address, "curves", "--data", str(data), "--batch-size", "16", *arguments]
        done = CliRunner().invoke(forwardpass, words)
        assert done.exit_code == code, done.output
        return done.output

    shown = command("--learning-rate", "0.1", "--epochs", "3", "--save", str(saved))
    expected = model.train(model.initial_weights, batches(10), learning_rate=0.1, epochs=3)
    assert expected.weights.id in shown
    assert "over 480 examples in 30 steps" in shown
    assert "binary_accuracy" in shown
    arrays = npz.load(saved)
    zoo.assert_equal(tuple(arrays[f"trainable/{index}"] for index in range(4)), model.get_weights(expected.weights)[0])
    momentum = '{"class_name": "SGD", "config": {"momentum": 0.9, "learning_rate": 0.1}}'
    assert expected.weights.id not in command("--optimizer", momentum, "--weights", str(saved))
    assert "learning_rate: expected a number" in command(code=1)
    assert "expected one of Adadelta" in command("--optimizer", "sgdd", code=1)


def test_callers_of_the_same_optimizer_share_its_preparation(server, model):
    name = 'forwardpass_training_prepare_seconds_count{outcome="prepared"}'
    before = server.metrics()[name]
    optimizer = {"class_name": "RMSprop", "config": {"rho": 0.75}}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        trainings = [
            pool.submit(model.train, model.initial_weights, batches(2), optimizer=optimizer, learning_rate=0.01)
            for _ in range(6)
        ]
        assert len({training.result().weights.id for training in trainings}) == 1
    assert server.metrics()[name] == before + 1


def test_states_take_half_of_the_messages_memory_and_others_wait():
    x, y = np.ones((2, 4), np.float32), np.ones(2, np.float32)
    go_on, began = threading.Event(), threading.Event()

    def slowly():
        yield x, y
        began.set()
        assert go_on.wait(60)

    with ServerProcess("--factory", "wide=support.zoo:wide_1m", "--max-concurrent-mib", "4") as server:
        with forwardpass_client.connect(server.address) as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
            model = client.model("wide")
            start = model.put_weights(model.initial_weights)
            with pytest.raises(errors.OutOfMemory, match="the state of this training: expected at most 2097152 bytes"):
                model.train(start, [], optimizer="adam", learning_rate=0.1)
            first = pool.submit(model.train, start, slowly(), learning_rate=0.1)
            assert began.wait(60)
            # The client reads its second batch before the server has begun.
            wait_until(lambda: 2**20 <= server.metrics()["forwardpass_training_states_bytes"] < 2**21)
            second = pool.submit(model.train, start, [(x, y)], learning_rate=0.1)
            wait_until(lambda: server.metrics()['forwardpass_training_updates_total{outcome="failed"}'] >= 2)
            assert not second.done()
            # Calls, and batches of the first training, still have room.
            model.predict_on_batch(start, x)
            go_on.set()
            assert first.result(60).weights.id == second.result(60).weights.id
            wait_until(lambda: states_are_freed(server))
