"""Nothing of the data, nor of a token, in error texts, log or metrics: calls that fail with marked values."""

from __future__ import annotations

import dataclasses
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import chunks, errors, manifests, messages
from forwardpass.wire.methods import METHODS
from forwardpass.wire.structures import Structure
from forwardpass_server.access import tokens
from forwardpass_server.access.tokens import Role
from support import zoo
from support.servers import ServerProcess

# As they would be printed, wherever they were.
NUMBER, INTEGER, TEXT = 74747.5, 74747, b"marked-74747"
MARK = "74747"


@pytest.fixture(scope="module")
def caller(tmp_path_factory, repository):
    """A server that logs all it can, and what it takes to call it."""
    secret, token = tokens.create("alice", [Role.CALL], None)
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text(token.line() + "\n")
    factories = [argument for factory in zoo.FACTORIES for argument in ("--factory", factory)]
    patient = ("--factory", "patient=support.zoo:patient")
    security = ("--tokens", str(file), "--log-level", "debug")
    with ServerProcess(*zoo.serving(repository), *factories, *patient, *security) as server:
        with forwardpass_client.connect(server.address, token=secret) as client:
            yield Caller(server, secret, client)


@dataclasses.dataclass
class Caller:
    server: ServerProcess
    token: str
    client: forwardpass_client.Client

    def send(self, method: str, header: Any, **parts: Any) -> None:
        """A request past the client's checks."""
        structures = {name.replace("__", "."): Structure.of(value) for name, value in parts.items()}
        self.send_bytes(METHODS[method].path, messages.encode(header, structures), self.token)

    def send_bytes(self, path: str, *requests: bytes | str) -> None:
        """requests: and the token after them."""
        *data, token = requests
        with grpc.insecure_channel(self.server.address) as channel:
            kind = channel.stream_unary if METHODS[path.rpartition("/")[2]].streams_requests else channel.unary_unary
            sent = iter(data) if kind == channel.stream_unary else data[0]
            try:
                kind(path)(sent, metadata=(("authorization", f"Bearer {token}"),), timeout=30)
            except grpc.RpcError as error:
                detail = dict(error.trailing_metadata()).get(errors.DETAIL_KEY)
                raise errors.decode(error.code().name, error.details(), detail) from None

    def upload(self) -> None:
        """A tensor that is another than was announced."""
        weights = ((np.full((50, 2), NUMBER, np.float32),), ())
        manifest = manifests.of_structure(Structure.of(weights), "weights")
        put = v1.PutWeightsRequest(manifest=manifests.encode(manifest)).SerializeToString()
        self.send_bytes(METHODS["PutWeights"].path, put, self.token)
        header = v1.UploadTensorsRequest(digest=manifest.tensors[0].digest)
        other = np.full((50, 2), -NUMBER, np.float32)
        chunk = chunks.encode(header, [other.reshape(-1).view(np.uint8).data])
        self.send_bytes(METHODS["UploadTensors"].path, chunk, self.token)


def selector(name: str) -> v1.ModelSelector:
    return v1.ModelSelector(name=name)


def cnn(caller: Caller) -> tuple[Any, Any, np.ndarray]:
    model = caller.client.model("keras_cnn")
    return model, model.initial_weights, np.full((3, 6, 6, 1), NUMBER, np.float32)


def pipelined(caller: Caller) -> None:
    model = caller.client.model("crashing")
    with model.pipeline(model.initial_weights) as calls:
        future = calls.predict_on_batch(np.float32([NUMBER]))
    future.result()


def weights_of_another_shape(caller: Caller) -> None:
    caller.send(
        "PredictOnBatch",
        v1.PredictOnBatchRequest(model=selector("patient")),
        model_weights__trainable=(np.full((7, 2), NUMBER, np.float32),),
        model_weights__non_trainable=(),
        x=np.int32([INTEGER]),
    )


FAILURES: dict[str, Callable[[Caller], Any]] = {
    "a crash": lambda c: c.client.model("crashing").predict_on_batch(((), ()), np.float32([NUMBER])),
    "a crash in a pipeline": pipelined,
    "a label out of range": lambda c: cnn(c)[0].forward_pass(cnn(c)[1], (cnn(c)[2], np.full(3, INTEGER))),
    "an index out of range": lambda c: c.client.model("patient").predict_on_batch(
        c.client.model("patient").initial_weights, np.int32([INTEGER])
    ),
    "examples of another shape": lambda c: c.send(
        "PredictOnBatch",
        v1.PredictOnBatchRequest(model=selector("keras_cnn")),
        model_weights__trainable=cnn(c)[1][0],
        model_weights__non_trainable=cnn(c)[1][1],
        x=cnn(c)[2][:, :5],
    ),
    "examples of another type": lambda c: c.send(
        "PredictOnBatch",
        v1.PredictOnBatchRequest(model=selector("keras_cnn")),
        model_weights__trainable=cnn(c)[1][0],
        model_weights__non_trainable=cnn(c)[1][1],
        x=np.array([TEXT], object),
    ),
    "weights of another shape": weights_of_another_shape,
    "labels of another type": lambda c: c.send(
        "Loss",
        v1.LossRequest(model=selector("keras_cnn")),
        output=np.full((1, 5), NUMBER, np.float32),
        label=np.array([TEXT], object),
    ),
    "a metrics state of another kind": lambda c: c.send(
        "FinalizeMetrics", v1.FinalizeMetricsRequest(model=selector("keras_cnn")), state=(TEXT, NUMBER)
    ),
    "a tensor of another hash": Caller.upload,
    "weights that are not there": lambda c: c.client.model("patient").get_weights(
        c.client.model("patient").weights_handle("ab" * 32)
    ),
    "bytes that are no message": lambda c: c.send_bytes(METHODS["ForwardPass"].path, TEXT, c.token),
    "bytes that are no manifest": lambda c: c.send_bytes(METHODS["PutWeights"].path, TEXT, c.token),
    "a token that is none": lambda c: c.send_bytes(METHODS["ListModels"].path, b"", f"secret-{MARK}"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_the_error_of_a_failed_call_contains_no_data(caller, failure):
    with pytest.raises(errors.ForwardPassError) as caught:
        failure(caller)
    error = caught.value
    assert MARK not in f"{error} {error.place} {error.expected} {error.found}"
    # What the server says of a crash comes last, and the log is read behind it.
    with pytest.raises(errors.InternalError) as last:
        caller.client.model("crashing").predict_on_batch(((), ()), np.float32([NUMBER]))
    log = caller.server.wait_for_log(last.value.request_id)
    with urllib.request.urlopen(caller.server.metrics_url) as response:
        metrics = response.read().decode()
    for secret in (MARK, caller.token):
        assert secret not in log
        assert secret not in metrics
