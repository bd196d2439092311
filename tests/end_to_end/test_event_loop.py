"""No message within the limits keeps the event loop for itself, whatever method it is sent to, and however."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import errors, frames, messages, tensors, trees
from forwardpass.wire.frames import Outbox
from forwardpass.wire.methods import METHODS
from forwardpass.wire.structures import Structure
from forwardpass.wire.trees import LEAF, NONE, Kind, TreeDef
from forwardpass_server.app import parts as app_parts
from forwardpass_server.app.settings import Settings
from support import trainable_models
from support.turns import Turns

# A message of the limits that the event loop decodes itself takes a tenth of it, and a slice of a manifest as much.
# Each of the structures below would take a million.
MAX_CALLS = 30_000

PIPELINE, EVALUATE, TRAIN = (METHODS[name].path for name in ("Pipeline", "Evaluate", "Train"))


class Served:
    """A server on an event loop of this process. turns: of the loop."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(120)

    async def _serve(self) -> None:
        factories = {name: f"support.zoo:{name}" for name in ("counting", "words")}
        factories["many_leaves"] = "support.trainable_models:many_leaves"
        settings = Settings(host="127.0.0.1", port=0, factories=factories, metrics_port=None)
        parts = await app_parts.join(settings, None)
        await parts.management.load_all()
        self.address = f"127.0.0.1:{await parts.server.start()}"
        self.turns = Turns()
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        await parts.server._server.stop(None)
        await parts.calls.scheduler.close(10)
        await parts.sessions.store.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @contextlib.contextmanager
    def watched(self, most: int = MAX_CALLS) -> Iterator[None]:
        """Asserts that no turn meanwhile was a long one."""
        self.turns.most = 0
        self.turns.start()
        try:
            yield
        finally:
            self.turns.stop()
        assert 0 < self.turns.most <= most, (self.turns.most, self.turns.where)


@pytest.fixture(scope="module")
def served():
    with pytest.MonkeyPatch.context() as environment:
        # Other tests of this process may have started TensorFlow, whose threads cannot be set after that.
        environment.setenv("TF_NUM_INTRAOP_THREADS", "2")
        environment.setenv("TF_NUM_INTEROP_THREADS", "2")
        one = Served()
    yield one
    one.close()


@pytest.fixture(scope="module")
def client(served):
    with forwardpass_client.connect(served.address) as client:
        yield client


@pytest.fixture(scope="module")
def channel(served):
    options = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
    with grpc.insecure_channel(served.address, options) as channel:
        yield channel


# Far more than the event loop may look at, and little enough for a test.
COUNT = 2**14
EMPTY = np.empty(0, np.float32)


def flat(kind: Kind, child: TreeDef, count: int) -> TreeDef:
    names = [f"n{index}" for index in range(count)] if kind is Kind.DICT else ()
    return TreeDef(kind, [child] * count, names)


def strings(count: int) -> np.ndarray:
    array = np.empty(count, object)
    array[:] = b""
    return array


LEAVES = flat(Kind.TUPLE, LEAF, COUNT)

STRUCTURES: dict[str, Callable[[], Structure]] = {
    "many leaves": lambda: Structure(LEAVES, [EMPTY] * COUNT),
    "many names": lambda: Structure(flat(Kind.DICT, LEAF, COUNT), [EMPTY] * COUNT),
    "many containers": lambda: Structure(flat(Kind.LIST, NONE, COUNT), []),
    "many tensors of strings": lambda: Structure(flat(Kind.TUPLE, LEAF, 64), [strings(2**12)] * 64),
    "many strings": lambda: Structure(LEAF, [strings(2**18)]),
    "too many strings": lambda: Structure(flat(Kind.TUPLE, LEAF, 5), [strings(2**18)] * 5),
    "too many leaves": lambda: Structure(flat(Kind.TUPLE, LEAF, 2**16), [EMPTY] * 2**16),
}


TAKING = [name for name, method in METHODS.items() if method.is_unary and messages.places(method.request)]


@pytest.fixture(scope="module")
def session_id(client):
    return bytes.fromhex(client.model("counting").metrics_session().id)


def request_of(name: str, kind: str, session_id: bytes) -> bytes:
    """A request that is sound but for one structure, or for all of them where they are too many."""
    method = METHODS[name]
    header = method.request()
    described = method.request.DESCRIPTOR.fields_by_name
    if "model" in described:
        header.model.name = "counting"
    if "session_id" in described:
        header.session_id = bytes(16)
    if "update" in described:
        header.update.CopyFrom(
            v1.UpdateIdentity(session_id=session_id, writer_id=b"w" * 16, sequence=1, update_id=b"u" * 16)
        )
    found = messages.places(method.request)
    structure = STRUCTURES[kind]()
    return messages.encode(header, dict.fromkeys(found if kind.startswith("too many") else found[-1:], structure))


def answer(channel, path: str, request: bytes) -> bytes | grpc.RpcError:
    call = channel.unary_unary(path).future(request, timeout=120)
    error = call.exception()
    if error is None:
        return call.result()
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION), error
    return error


# Each kind of structure in one method, and one in each of the others.
CASES = [(name, kind) for name in TAKING for kind in STRUCTURES if name == "PredictOnBatch" or kind == "many leaves"]


@pytest.mark.parametrize("name, kind", CASES)
def test_a_request_of_many_parts_does_not_block_the_event_loop(served, channel, session_id, name, kind):
    request = request_of(name, kind, session_id)
    with served.watched():
        found = answer(channel, METHODS[name].path, request)
        assert isinstance(found, bytes) or len(found.details()) < 4000


@pytest.mark.parametrize("kind", ["many names", "many strings"])
def test_a_call_of_many_parts_in_pieces_does_not_block_the_event_loop(served, channel, session_id, kind):
    outbox = Outbox(answers=False)
    for call, name in enumerate(TAKING[:3], 1):
        request = request_of(name, kind, session_id)
        outbox.put(call, frames.encode_call(name, None, len(request)), request)

    def requests() -> Iterator[bytes]:
        while outbox:
            yield outbox.next_message()

    with served.watched():
        responses = list(channel.stream_stream(PIPELINE)(requests(), timeout=120))
    answers = [frame for one in responses for frame in v1.PipelineResponse.FromString(one).frames]
    assert {frame.call for frame in answers} == {1, 2, 3}


@pytest.mark.parametrize("kind", ["many leaves", "many strings"])
def test_a_batch_of_many_parts_does_not_block_the_event_loop(served, client, channel, kind):
    model = client.model("counting")
    handle = model.put_weights(model.initial_weights)
    target = v1.EvaluationTarget(
        session_id=bytes.fromhex(model.metrics_session().id), weights_id=bytes.fromhex(handle.id)
    )
    start = v1.EvaluationStart(writer_id=b"e" * 16, targets=[target])
    request = messages.encode(v1.EvaluationBatch(update_id=b"u" * 16), {"batch_input.x": STRUCTURES[kind]()})
    outbox = Outbox(answers=False, in_order=True)
    outbox.put(1, frames.encode_call("", None, len(request)), request)

    def requests() -> Iterator[bytes]:
        yield v1.EvaluateRequest(start=start).SerializeToString()
        while outbox:
            yield outbox.next_message()

    with served.watched(), pytest.raises(grpc.RpcError) as raised:
        list(channel.stream_stream(EVALUATE)(requests(), timeout=120))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "batch 1: " in raised.value.details()


def test_an_answer_of_many_strings_does_not_block_the_event_loop(served, client):
    model = client.model("words")
    x = strings(2**17)
    with served.watched():
        assert model.predict_on_batch(model.initial_weights, x).shape == x.shape


# A model of 2,000 leaves, whose load takes minutes, would need MAX_CALLS in a turn.
MAX_CALLS_OF_MANY_LEAVES = MAX_CALLS * trainable_models.MANY_LEAVES // 2_000
MASK = tuple(not index % 2 for index in range(trainable_models.MANY_LEAVES))


@pytest.mark.parametrize("options", [{}, {"trainable": MASK}], ids=["all leaves", "some leaves"])
def test_a_training_of_many_leaves_does_not_block_the_event_loop(served, client, options):
    model = client.model("many_leaves")
    handle = model.put_weights(model.initial_weights)
    batches = [(np.ones(3, np.float32), np.zeros(3, np.float32))] * 4
    options = {"learning_rate": 0.1, "optimizer": {"class_name": "SGD", "config": {"momentum": 0.9}}, **options}
    with served.watched(MAX_CALLS_OF_MANY_LEAVES):
        result = model.train(handle, batches, checkpoint_steps=2, keep_optimizer_state=True, **options)
        model.train(result.weights, batches, optimizer_state=result.optimizer_state, proximal=1.0, **options)
    assert result.num_steps == 4


def test_gradients_of_many_leaves_do_not_block_the_event_loop(served, client):
    model = client.model("many_leaves")
    handle = model.put_weights(model.initial_weights)
    batch = np.ones(3, np.float32), np.zeros(3, np.float32)
    with served.watched(MAX_CALLS_OF_MANY_LEAVES):
        _, kept = model.forward_backward(handle, batch, keep=True)
        _, gradients = model.forward_backward(handle, batch)
        model.vjp(handle, batch[0], np.ones(3, np.float32))
    assert len(gradients) == len(model.get_weights(kept)[0]) == trainable_models.MANY_LEAVES


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": [True] * 10_000_000},
        {"optimizer": '{"class_name":"SGD","config":{' + ",".join(f'"{n}":0' for n in range(400_000)) + "}}"},
        {"optimizer": '{"class_name":"SGD","config":{' + ",".join(f'"{n}":0' for n in range(1_500)) + "}}"},
        {"optimizer": "[" * 16_000},
    ],
    ids=["many booleans", "long optimizer", "optimizer of many options", "deep optimizer"],
)
def test_a_large_start_of_a_training_does_not_block_the_event_loop(served, client, channel, changes):
    model = client.model("many_leaves")
    weights_id = bytes.fromhex(model.put_weights(model.initial_weights).id)
    values = {"optimizer": "sgd", "learning_rate": 0.1, **changes}
    start = v1.TrainingStart(model=v1.ModelSelector(name="many_leaves"), weights_id=weights_id, **values)
    request = v1.TrainRequest(start=start, finish=True).SerializeToString()
    with served.watched(), pytest.raises(grpc.RpcError) as raised:
        list(channel.stream_stream(TRAIN)(iter([request]), timeout=120))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(raised.value.details()) < 4000


@pytest.mark.parametrize("kind", ["many leaves", "many strings"])
def test_a_training_batch_of_many_parts_does_not_block_the_event_loop(served, client, channel, kind):
    model = client.model("many_leaves")
    weights_id = bytes.fromhex(model.put_weights(model.initial_weights).id)
    start = v1.TrainingStart(
        model=v1.ModelSelector(name="many_leaves"), weights_id=weights_id, optimizer="sgd", learning_rate=0.1
    )
    request = messages.encode(v1.TrainingBatch(), {"batch_input.x": STRUCTURES[kind]()})
    outbox = Outbox(answers=False, in_order=True)
    outbox.put(1, frames.encode_call("", None, len(request)), request)

    def requests() -> Iterator[bytes]:
        yield v1.TrainRequest(start=start).SerializeToString()
        while outbox:
            yield outbox.next_message()

    with served.watched(), pytest.raises(grpc.RpcError) as raised:
        list(channel.stream_stream(TRAIN)(requests(), timeout=120))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "batch 1: " in raised.value.details()


UNKNOWN = b"\xa0\x06\x01"


@pytest.mark.parametrize(
    "request_",
    [
        UNKNOWN * 100_000,
        v1.PredictOnBatchRequest(model=v1.ModelSelector(name="counting")).SerializeToString()
        + b"".join([b"\x2a\x05\x12\x03" + UNKNOWN] * 100),
    ],
    ids=["in the request", "in many structures"],
)
def test_unknown_fields_do_not_block_the_event_loop(served, channel, request_):
    with served.watched():
        for name in TAKING:
            assert isinstance(answer(channel, METHODS[name].path, request_), grpc.RpcError)


def test_unknown_fields_of_tensors_do_not_block_the_event_loop(served, channel):
    tensor = tensors.encode_header(2, (0,), 0) + UNKNOWN * 50_000
    tree = trees.TreeDef(Kind.TUPLE, [LEAF] * 20)
    structure = v1.Structure(tree=v1.TreeDef.FromString(tree.encoded), leaves=[v1.Tensor.FromString(tensor)] * 20)
    request = v1.PredictOnBatchRequest(model=v1.ModelSelector(name="counting"), x=structure).SerializeToString()
    with served.watched():
        found = answer(channel, METHODS["PredictOnBatch"].path, request)
    assert isinstance(found, grpc.RpcError)
    assert "at most 524288 fields in a message" in found.details()


@pytest.mark.parametrize("path", [PIPELINE, EVALUATE, TRAIN])
def test_messages_of_many_frames_do_not_block_the_event_loop(served, channel, path):
    message = v1.PipelineRequest(frames=[v1.CallFrame(call=1, method="?")] * 50_000).SerializeToString()
    many_fields = b"\x0a" + frames.fields.varint(3 * 100_000) + UNKNOWN * 100_000
    with served.watched():
        for one in (message, many_fields, UNKNOWN * 100_000):
            with contextlib.suppress(grpc.RpcError):
                list(channel.stream_stream(path)(iter([one]), timeout=120))


def test_manifests_of_many_tensors_do_not_block_the_event_loop(served, channel):
    tree = flat(Kind.TUPLE, LEAF, COUNT)
    manifest = v1.WeightsManifest(tree=v1.TreeDef.FromString(tree.encoded))
    spec = v1.TensorSpec(data_type=v1.DataType.DATA_TYPE_FLOAT32, shape=[1])
    for index in range(COUNT):
        manifest.tensors.add(digest=hashlib.sha256(b"%d" % index).digest(), spec=spec, size_bytes=4)
    request = v1.PutWeightsRequest(manifest=manifest).SerializeToString()
    with served.watched():
        found = answer(channel, METHODS["PutWeights"].path, request)
    assert len(v1.PutWeightsResponse.FromString(found).missing) == COUNT


def test_combinations_of_many_terms_do_not_block_the_event_loop(served, client, channel):
    model = client.model("counting")
    weights_id = bytes.fromhex(model.put_weights(model.initial_weights).id)
    terms = [v1.WeightsTerm(weights_id=weights_id, coefficient=1)] * COUNT
    unknown = [v1.WeightsTerm(weights_id=b"u" * 32, coefficient=1)]
    with served.watched():
        for request in (terms, terms + terms, terms[1:] + unknown):
            with contextlib.suppress(grpc.RpcError):
                message = v1.CombineWeightsRequest(terms=request).SerializeToString()
                channel.unary_unary(METHODS["CombineWeights"].path)(message, timeout=120)


def test_a_call_of_a_missing_model_is_refused_before_its_structures_are_decoded(channel, session_id):
    request = request_of("PredictOnBatch", "too many leaves", session_id)
    nobody = request.replace(b"counting", b"nobody!!", 1)
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(METHODS["PredictOnBatch"].path)(nobody, timeout=120)
    detail = dict(raised.value.trailing_metadata())[errors.DETAIL_KEY]
    assert v1.ErrorDetail.FromString(detail).reason == "ModelNotFound"
