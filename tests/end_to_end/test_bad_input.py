"""Every kind of bad input: the class, the status and the message that a caller meets. One table, nothing left out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import errors, messages
from forwardpass.wire.methods import METHODS
from forwardpass.wire.structures import Structure
from support import zoo


@dataclasses.dataclass
class Situation:
    """A connection to the real server, a model and good arguments for it."""

    client: forwardpass_client.Client
    channel: grpc.Channel
    address: str

    def __post_init__(self) -> None:
        self.model = self.client.model("keras_cnn")
        self.weights = self.model.initial_weights
        self.x, self.y = zoo.keras_batch(4)

    def send(self, method: str, header: Any, parts: dict[str, Any]) -> None:
        """A request as a client without our checks would send it."""
        structures = {name: Structure.of(value) for name, value in parts.items()}
        self.send_bytes(method, messages.encode(header, structures))

    def send_bytes(self, method: str, request: bytes, timeout_s: float = 30) -> None:
        try:
            self.channel.unary_unary(METHODS[method].path)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            raise errors.decode(error.code().name, error.details(), trailing.get(errors.DETAIL_KEY)) from None

    def upload(self, *requests: Any) -> None:
        """Chunks, as a client without our checks would send them."""
        chunks = [one if isinstance(one, bytes) else one.SerializeToString() for one in requests]
        try:
            self.channel.stream_unary(METHODS["UploadTensors"].path)(iter(chunks), timeout=30)
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            raise errors.decode(error.code().name, error.details(), trailing.get(errors.DETAIL_KEY)) from None

    def evaluate(self, *requests: Any) -> None:
        """The messages of an evaluation, as a client without our checks would send them."""
        sent = [one if isinstance(one, bytes) else one.SerializeToString() for one in requests]
        try:
            list(self.channel.stream_stream(METHODS["Evaluate"].path)(iter(sent), timeout=30))
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            raise errors.decode(error.code().name, error.details(), trailing.get(errors.DETAIL_KEY)) from None

    def predictions(self) -> Any:
        return self.model.predict_on_batch(self.weights, self.x, training=False)

    def forward(self, **changes: Any) -> None:
        """A forward pass, some of whose parts are others, sent without our checks."""
        parts = {
            "model_weights.trainable": self.weights[0],
            "model_weights.non_trainable": self.weights[1],
            "batch_input.x": self.x,
            "batch_input.y": self.y,
        }
        for name, value in changes.items():
            key = name.replace("__", ".")
            if value is None:
                del parts[key]
            else:
                parts[key] = value
        self.send("ForwardPass", v1.ForwardPassRequest(model=v1.ModelSelector(name="keras_cnn")), parts)


@dataclasses.dataclass
class Row:
    """What is done wrong, and what comes of it. sdk: through the client's methods; wire: past its checks."""

    name: str
    error: type[errors.ForwardPassError]
    status: str
    message: str
    sdk: Callable[[Situation], Any] | None = None
    wire: Callable[[Situation], Any] | None = None


X_SPEC = "float32[None,6,6,1]"
ROWS = [
    Row(
        "wrong dtype",
        errors.DTypeMismatch,
        "INVALID_ARGUMENT",
        f"batch_input.x: expected {X_SPEC}, got complex128[4,6,6,1]",
        sdk=lambda s: s.model.forward_pass(s.weights, (s.x.astype(complex), s.y)),
        wire=lambda s: s.forward(batch_input__x=s.x.astype(complex)),
    ),
    Row(
        "a dtype that only a client casts",
        errors.DTypeMismatch,
        "INVALID_ARGUMENT",
        f"batch_input.x: expected {X_SPEC}, got float64[4,6,6,1]",
        wire=lambda s: s.forward(batch_input__x=s.x.astype(np.float64)),
    ),
    Row(
        "wrong shape",
        errors.ShapeMismatch,
        "INVALID_ARGUMENT",
        f"batch_input.x: expected {X_SPEC}, got float32[4,6,5,1]",
        sdk=lambda s: s.model.forward_pass(s.weights, (s.x[:, :, :5], s.y)),
        wire=lambda s: s.forward(batch_input__x=s.x[:, :, :5]),
    ),
    Row(
        "wrong rank",
        errors.ShapeMismatch,
        "INVALID_ARGUMENT",
        f"batch_input.x: expected {X_SPEC}, got float32[6,6,1]",
        sdk=lambda s: s.model.forward_pass(s.weights, (s.x[0], s.y)),
        wire=lambda s: s.forward(batch_input__x=s.x[0]),
    ),
    Row(
        "batch sizes that differ",
        errors.ShapeMismatch,
        "INVALID_ARGUMENT",
        "batch_input.y: expected 4 examples as in batch_input.x, got 3",
        sdk=lambda s: s.model.forward_pass(s.weights, (s.x, s.y[:3])),
        wire=lambda s: s.forward(batch_input__y=s.y[:3]),
    ),
    Row(
        "wrong structure",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        f"batch_input.x: expected {X_SPEC}, got a mapping with keys ['image']",
        sdk=lambda s: s.model.forward_pass(s.weights, ({"image": s.x}, s.y)),
        wire=lambda s: s.forward(batch_input__x={"image": s.x}),
    ),
    Row(
        "a batch that is no pair",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "batch_input: expected a pair (x, y) or a mapping with x and y, got a tuple of 1",
        sdk=lambda s: s.model.forward_pass(s.weights, (s.x,)),
    ),
    Row(
        "labels left out",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "batch_input.y: expected int64[None], got None",
        sdk=lambda s: s.model.forward_pass(s.weights, (s.x, None)),
        wire=lambda s: s.forward(batch_input__y=None),
    ),
    Row(
        "missing weight",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "model_weights.trainable: expected 6 items, got 5",
        sdk=lambda s: s.model.forward_pass((s.weights[0][:5], s.weights[1]), (s.x, s.y)),
        wire=lambda s: s.forward(model_weights__trainable=s.weights[0][:5]),
    ),
    Row(
        "a weight of another shape",
        errors.ShapeMismatch,
        "INVALID_ARGUMENT",
        "model_weights.trainable[1]: expected float32[4], got float32[3]",
        sdk=lambda s: s.model.forward_pass(
            ((s.weights[0][0], s.weights[0][1][:3], *s.weights[0][2:]), s.weights[1]), (s.x, s.y)
        ),
        wire=lambda s: s.forward(model_weights__trainable=(s.weights[0][0], s.weights[0][1][:3], *s.weights[0][2:])),
    ),
    Row(
        "no weights",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "model_weights: expected a tuple of 2, got None",
        sdk=lambda s: s.model.forward_pass(None, (s.x, s.y)),
    ),
    Row(
        "no weights on the wire",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "model_weights.trainable: expected (float32[3,3,1,4], ",
        wire=lambda s: s.forward(model_weights__trainable=None, model_weights__non_trainable=None),
    ),
    Row(
        "containers with endless names",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "model_weights.trainable: expected a tuple of 6, got a mapping with keys ['aaaa",
        wire=lambda s: s.forward(model_weights__trainable={"a" * 200 + str(index): 1.0 for index in range(5000)}),
    ),
    Row(
        "integers that do not fit",
        errors.DTypeMismatch,
        "INVALID_ARGUMENT",
        "batch_input.y: expected int64[None], got uint64[1] with integers that do not fit",
        sdk=lambda s: s.model.forward_pass(s.weights, (s.x[:1], np.uint64([2**63]))),
    ),
    Row(
        "a label out of range",
        errors.ModelRefusedInput,
        "INVALID_ARGUMENT",
        "Received a label value of # which is outside the valid range of [0, 5).",
        sdk=lambda s: s.model.forward_pass(s.weights, (s.x, s.y + 77)),
        wire=lambda s: s.forward(batch_input__y=s.y + 77),
    ),
    Row(
        "a batch output without predictions",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "batch_output.predictions: expected float32[None,5], got None",
        sdk=lambda s: s.model.update_metrics_state(
            s.model.initialize_metrics_state(), s.y, forwardpass_client.BatchOutput(loss=0.0)
        ),
        wire=lambda s: s.send(
            "UpdateMetricsState",
            v1.UpdateMetricsStateRequest(model=v1.ModelSelector(name="keras_cnn")),
            {"state": s.model.initialize_metrics_state(), "labels": s.y},
        ),
    ),
    Row(
        "no batch output",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "batch_output: expected a BatchOutput('loss', 'predictions', 'num_examples'), got float32[4,5]",
        sdk=lambda s: s.model.update_metrics_state(
            s.model.initialize_metrics_state(), s.y, np.zeros((4, 5), np.float32)
        ),
    ),
    Row(
        "the state of another model",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "state: expected keys ['sparse_categorical_accuracy', 'sparse_top_k_categorical_accuracy'], got keys ['a']",
        sdk=lambda s: s.model.finalize_metrics({"a": 1.0}),
        wire=lambda s: s.send(
            "FinalizeMetrics",
            v1.FinalizeMetricsRequest(model=v1.ModelSelector(name="keras_cnn")),
            {"state": {"a": np.float32(1)}},
        ),
    ),
    Row(
        "unknown model",
        errors.ModelNotFound,
        "NOT_FOUND",
        "model: expected one of broken, counting, crashing, ",
        sdk=lambda s: s.client.model("nonsense"),
        wire=lambda s: s.send("GetModel", v1.GetModelRequest(model=v1.ModelSelector(name="nonsense")), {}),
    ),
    Row(
        "a model without a name",
        errors.ModelNotFound,
        "NOT_FOUND",
        "got ''",
        sdk=lambda s: s.client.model(""),
        wire=lambda s: s.send("PredictOnBatch", v1.PredictOnBatchRequest(), {}),
    ),
    Row(
        "a name like a path",
        errors.ModelNotFound,
        "NOT_FOUND",
        "got '../../etc/passwd'",
        sdk=lambda s: s.client.model("../../etc/passwd"),
    ),
    Row(
        "unknown version",
        errors.ModelVersionNotFound,
        "NOT_FOUND",
        "version of model 'keras_cnn': expected one of 1, 2, got 9",
        sdk=lambda s: s.client.model("keras_cnn", 9),
        wire=lambda s: s.send("GetModel", v1.GetModelRequest(model=v1.ModelSelector(name="keras_cnn", version=9)), {}),
    ),
    Row(
        "a version that no server can have",
        errors.ModelVersionNotFound,
        "NOT_FOUND",
        "version: expected an integer from 1 on, or None, got 1180591620717411303424",
        sdk=lambda s: s.client.model("keras_cnn", 2**70),
    ),
    Row(
        "a name that is no text",
        errors.ModelNotFound,
        "NOT_FOUND",
        "model: expected a name, got 'a\\udcff'",
        sdk=lambda s: s.client.model("a\udcff"),
    ),
    Row(
        "a version below 1",
        errors.ModelVersionNotFound,
        "NOT_FOUND",
        "version: expected an integer from 1 on, or None, got 0",
        sdk=lambda s: s.client.model("keras_cnn", 0),
    ),
    Row(
        "a model that failed to load",
        errors.ModelFailed,
        "FAILED_PRECONDITION",
        "model broken/1 failed to load: expected a saved_model.pb or one .keras file, found ['notes.txt']",
        sdk=lambda s: s.client.model("broken"),
        wire=lambda s: s.send("PredictOnBatch", v1.PredictOnBatchRequest(model=v1.ModelSelector(name="broken")), {}),
    ),
    Row(
        "a function that the model lacks",
        errors.FunctionNotAvailable,
        "FAILED_PRECONDITION",
        "initialize_metrics_state is not available: no TFF release saves metrics",
        sdk=lambda s: s.client.model("no_metrics").initialize_metrics_state(),
        wire=lambda s: s.send(
            "InitializeMetricsState",
            v1.InitializeMetricsStateRequest(model=v1.ModelSelector(name="no_metrics")),
            {},
        ),
    ),
    Row(
        "too large a request for the client",
        errors.MessageTooLarge,
        "RESOURCE_EXHAUSTED",
        "PredictOnBatchRequest: expected at most 1048576 bytes, got 144",
        sdk=lambda s: small_client(
            s, lambda model: model.predict_on_batch(s.weights, np.zeros((10_000, 6, 6, 1), "f4"))
        ),
    ),
    Row(
        "too large a request for the server",
        errors.MessageTooLarge,
        "RESOURCE_EXHAUSTED",
        "larger than max",
        wire=lambda s: s.forward(batch_input__x=np.zeros((2 * 10**6, 6, 6, 1), np.float32)),
    ),
    Row(
        "too large a response for the client",
        errors.MessageTooLarge,
        "RESOURCE_EXHAUSTED",
        "larger than max",
        sdk=lambda s: forwardpass_client.connect(s.address, max_message_bytes=100).model("keras_cnn"),
    ),
    Row(
        "garbage bytes",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "malformed message: ",
        wire=lambda s: s.send_bytes("ForwardPass", b"\xff\xfe\x00garbage"),
    ),
    Row(
        "a message cut off",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "malformed message: a field of ",
        wire=lambda s: s.send_bytes(
            "PredictOnBatch", messages.encode(v1.PredictOnBatchRequest(), {"x": Structure.of(s.x)})[:-3]
        ),
    ),
    Row(
        "a shape that its bytes do not have",
        errors.ShapeMismatch,
        "INVALID_ARGUMENT",
        "x: expected 4000000000000 bytes for float32[1000000, 1000000], got 4 bytes",
        wire=lambda s: s.send_bytes(
            "PredictOnBatch",
            v1.PredictOnBatchRequest(
                model=v1.ModelSelector(name="keras_cnn"),
                x=v1.Structure(
                    tree=v1.TreeDef(leaf=v1.TreeDef.Leaf()),
                    leaves=[v1.Tensor(data_type=2, shape=[10**6, 10**6], data=b"1234")],
                ),
            ).SerializeToString(),
        ),
    ),
    Row(
        "weights that nobody has put",
        errors.WeightsNotFound,
        "NOT_FOUND",
        "does not hold weights 0101",
        sdk=lambda s: s.model.forward_pass(s.model.weights_handle("01" * 32), (s.x, s.y)),
        wire=lambda s: s.send(
            "ForwardPass",
            v1.ForwardPassRequest(model=v1.ModelSelector(name="keras_cnn"), weights_id=b"\1" * 32),
            {"batch_input.x": s.x, "batch_input.y": s.y},
        ),
    ),
    Row(
        "a weights id that is none",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "weights_id: expected 32 bytes, got 5",
        wire=lambda s: s.send(
            "ForwardPass",
            v1.ForwardPassRequest(model=v1.ModelSelector(name="keras_cnn"), weights_id=b"short"),
            {"batch_input.x": s.x, "batch_input.y": s.y},
        ),
    ),
    Row(
        "weights of another model by their id",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "model_weights[0]: expected 6 items, got 4",
        sdk=lambda s: s.model.forward_pass(put_other_weights(s), (s.x, s.y)),
    ),
    Row(
        "weights larger than the store",
        errors.WeightStoreFull,
        "RESOURCE_EXHAUSTED",
        "manifest: expected at most ",
        wire=lambda s: s.send("PutWeights", v1.PutWeightsRequest(manifest=manifest([2**45])), {}),
    ),
    Row(
        "a tensor of another size than its shape's",
        errors.ShapeMismatch,
        "INVALID_ARGUMENT",
        "manifest.tensors[0]: expected the bytes of float32[2], got 9",
        wire=lambda s: s.send("PutWeights", v1.PutWeightsRequest(manifest=manifest([2], size_bytes=9)), {}),
    ),
    Row(
        "a tensor that nobody announced",
        errors.UploadOutOfStep,
        "ABORTED",
        "was not announced",
        wire=lambda s: s.upload(v1.UploadTensorsRequest(digest=b"\2" * 32, data=b"x")),
    ),
    Row(
        "a tensor with another hash than announced",
        errors.TensorCorrupted,
        "INVALID_ARGUMENT",
        "tensor: expected the hash 0303",
        wire=lambda s: (
            s.send("PutWeights", v1.PutWeightsRequest(manifest=manifest([2], digest=b"\3" * 32)), {}),
            s.upload(v1.UploadTensorsRequest(digest=b"\3" * 32, data=bytes(8))),
        ),
    ),
    Row(
        "a chunk beyond the end of its tensor",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "data: expected a tensor of 8 bytes, got bytes 0 to 9",
        wire=lambda s: (
            s.send("PutWeights", v1.PutWeightsRequest(manifest=manifest([2], digest=b"\4" * 32)), {}),
            s.upload(v1.UploadTensorsRequest(digest=b"\4" * 32, data=bytes(9))),
        ),
    ),
    Row(
        "garbage in place of a chunk",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "malformed message",
        wire=lambda s: s.upload(b"\xff\xfe"),
    ),
    Row(
        "a lease without a name",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "lease_id: expected 16 bytes, got 0",
        wire=lambda s: s.send("LeaseWeights", v1.LeaseWeightsRequest(weights_id=b"\1" * 32, ttl_s=1), {}),
    ),
    Row(
        "a session that is not there",
        errors.SessionNotFound,
        "NOT_FOUND",
        "there is no metrics session 0505",
        sdk=lambda s: s.model.metrics_session("05" * 16),
        wire=lambda s: s.send("GetSessionResult", v1.GetSessionResultRequest(session_id=b"\5" * 16), {}),
    ),
    *(
        Row(
            f"a session id that is none, in {method}",
            errors.InvalidRequest,
            "INVALID_ARGUMENT",
            "session_id: expected 16 bytes, got 5",
            wire=lambda s, method=method: s.send(method, METHODS[method].request(session_id=b"short"), {}),
        )
        for method in ("GetSessionState", "GetSessionResult", "CloseSession")
    ),
    Row(
        "a session opened under an id that is none",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "session_id: expected 16 bytes, got 0",
        wire=lambda s: s.send("OpenSession", v1.OpenSessionRequest(model=v1.ModelSelector(name="keras_cnn")), {}),
    ),
    *(
        Row(
            f"an update that does not say which, in {method}",
            errors.InvalidRequest,
            "INVALID_ARGUMENT",
            "update.session_id: expected 16 bytes, got 0",
            wire=lambda s, method=method: s.send(method, METHODS[method].request(), {}),
        )
        for method in ("UpdateSession", "ForwardPassInSession", "MergeIntoSession")
    ),
    Row(
        "an update out of order",
        errors.SequenceMismatch,
        "FAILED_PRECONDITION",
        "update.sequence: expected 1, got 7",
        wire=lambda s: in_session(s, "UpdateSession", 7, {"labels": s.y, "batch_output.predictions": s.predictions()}),
    ),
    Row(
        "an update of other labels",
        errors.ShapeMismatch,
        "INVALID_ARGUMENT",
        "labels: expected int64[None], got int64[]",
        sdk=lambda s: session_of(s).update(3, forwardpass_client.BatchOutput(predictions=s.predictions())),
        wire=lambda s: in_session(s, "UpdateSession", 1, {"labels": 3, "batch_output.predictions": s.predictions()}),
    ),
    Row(
        "a forward pass in a session without weights",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "model_weights.trainable: expected (float32[3,3,1,4], ",
        wire=lambda s: in_session(s, "ForwardPassInSession", 1, {"batch_input.x": s.x, "batch_input.y": s.y}),
    ),
    Row(
        "a state of another model to begin with",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "initial_state: expected keys ['sparse_categorical_accuracy', 'sparse_top_k_categorical_accuracy'], got",
        sdk=lambda s: s.model.metrics_session(initial_state={"a": 1.0}),
        wire=lambda s: s.send(
            "OpenSession",
            v1.OpenSessionRequest(model=v1.ModelSelector(name="keras_cnn"), session_id=b"\6" * 16),
            {"initial_state": {"a": 1.0}},
        ),
    ),
    Row(
        "a state of another model to be merged",
        errors.StructureMismatch,
        "INVALID_ARGUMENT",
        "state: expected keys ['sparse_categorical_accuracy', 'sparse_top_k_categorical_accuracy'], got keys ['a']",
        sdk=lambda s: session_of(s).merge({"a": 1.0}),
        wire=lambda s: in_session(s, "MergeIntoSession", 1, {"state": {"a": 1.0}}),
    ),
    Row(
        "an evaluation that does not begin",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "first message: expected start, got another message",
        wire=lambda s: s.evaluate(v1.EvaluateRequest()),
    ),
    Row(
        "an evaluation of nothing",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "start.targets: expected 1 to 1024, got 0",
        wire=lambda s: s.evaluate(v1.EvaluateRequest(start=v1.EvaluationStart(writer_id=bytes(16)))),
    ),
    Row(
        "an evaluation in a session that is not there",
        errors.SessionNotFound,
        "NOT_FOUND",
        "there is no metrics session 0000",
        wire=lambda s: s.evaluate(start_of(bytes(16), bytes(32))),
    ),
    Row(
        "an evaluation of weights that nobody has put",
        errors.WeightsNotFound,
        "NOT_FOUND",
        "does not hold weights 0101",
        sdk=lambda s: s.model.evaluate(s.model.weights_handle("01" * 32), [(s.x, s.y)]),
        wire=lambda s: s.evaluate(start_of(bytes.fromhex(session_of(s).id), b"\1" * 32)),
    ),
    Row(
        "garbage in place of a batch",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "batch 1: malformed message",
        wire=lambda s: s.evaluate(good_start(s), call_frame(1, b"\xff\xfe")),
    ),
    Row(
        "garbage in place of a frame",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "malformed message",
        wire=lambda s: s.evaluate(good_start(s), b"\xff\xfe"),
    ),
    Row(
        "a batch out of order",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "call: expected batch 1, got 2",
        wire=lambda s: s.evaluate(good_start(s), call_frame(2, batch_of(s))),
    ),
    Row(
        "a batch longer than any message",
        errors.MessageTooLarge,
        "RESOURCE_EXHAUSTED",
        "call 1: expected at most ",
        wire=lambda s: s.evaluate(
            good_start(s), v1.EvaluateRequest(frames=[v1.CallFrame(call=1, size_bytes=2**40, data=b"x")])
        ),
    ),
    Row(
        "a batch of an evaluation that the model refuses",
        errors.ModelRefusedInput,
        "INVALID_ARGUMENT",
        "batch 1: Received a label value of # which is outside the valid range of [0, 5).",
        sdk=lambda s: s.model.evaluate(s.weights, [(s.x, s.y + 77)]),
        wire=lambda s: s.evaluate(good_start(s), call_frame(1, batch_of(s, s.y + 77))),
    ),
    Row(
        "a batch of an evaluation of another shape",
        errors.ShapeMismatch,
        "INVALID_ARGUMENT",
        f"batch_input.x: expected {X_SPEC}, got float32[6,6,1]",
        sdk=lambda s: s.model.evaluate(s.weights, [(s.x[0], s.y)]),
    ),
    Row(
        "an update without a writer",
        errors.InvalidRequest,
        "INVALID_ARGUMENT",
        "update.writer_id: expected 16 bytes, got 0",
        wire=lambda s: in_session(s, "UpdateSession", 1, {"labels": s.y}, writer_id=b""),
    ),
    Row(
        "labels of another dtype for a session",
        errors.DTypeMismatch,
        "INVALID_ARGUMENT",
        "labels: expected int64[None], got float32[4]",
        wire=lambda s: in_session(s, "UpdateSession", 1, {"labels": s.y.astype(np.float32)}),
    ),
    Row(
        "a deadline that passes",
        errors.DeadlineExceeded,
        "DEADLINE_EXCEEDED",
        "The call did not end before its deadline: retry it, or raise timeout_s.",
        sdk=lambda s: s.client.model("slow").predict_on_batch(((), ()), [10**6], timeout_s=0.3),
    ),
    Row(
        "a model that crashes",
        errors.InternalError,
        "INTERNAL",
        "the server failed; request ",
        sdk=lambda s: s.client.model("crashing").predict_on_batch(((), ()), [42.5]),
    ),
    Row(
        "a method that the server does not know",
        errors.MethodNotSupported,
        "UNIMPLEMENTED",
        "gRPC says UNIMPLEMENTED",
        wire=lambda s: call_unknown_method(s),
    ),
    Row(
        "no server",
        errors.ServerUnavailable,
        "UNAVAILABLE",
        "gRPC says UNAVAILABLE",
        sdk=lambda s: forwardpass_client.connect("127.0.0.1:1").is_ready(),
    ),
    Row(
        "a closed client",
        errors.CallCancelled,
        "CANCELLED",
        "gRPC says CANCELLED",
        sdk=lambda s: cancelled(s),
    ),
]

# Shown where they can be brought about: a server that starts, changes, is full, waits for long, or asks who calls.
ELSEWHERE = {
    "ModelLoading",
    "OptimizerNotSupported",
    "ModelInUse",
    "ModelChanged",
    "ServerOverloaded",
    "OutOfMemory",
    "Unauthenticated",
    "PermissionDenied",
    "SessionExpired",
    "SessionLimitExceeded",
    "SessionStoreUnavailable",
    "WeightStoreUnavailable",
}


def session_of(situation: Situation) -> forwardpass_client.MetricsSession:
    return situation.model.metrics_session()


def in_session(
    situation: Situation, method: str, sequence: int, parts: dict[str, Any], writer_id: bytes = bytes(16)
) -> None:
    """An update of a session, as a client without our checks would send it."""
    session_id = bytes.fromhex(session_of(situation).id)
    update = v1.UpdateIdentity(session_id=session_id, writer_id=writer_id, sequence=sequence, update_id=bytes(16))
    situation.send(method, METHODS[method].request(update=update), parts)


def start_of(session_id: bytes, weights_id: bytes) -> v1.EvaluateRequest:
    target = v1.EvaluationTarget(session_id=session_id, weights_id=weights_id)
    return v1.EvaluateRequest(start=v1.EvaluationStart(writer_id=bytes(16), targets=[target]))


def good_start(situation: Situation) -> v1.EvaluateRequest:
    handle = situation.model.put_weights(situation.weights)
    return start_of(bytes.fromhex(session_of(situation).id), bytes.fromhex(handle.id))


def call_frame(number: int, data: bytes) -> v1.EvaluateRequest:
    return v1.EvaluateRequest(frames=[v1.CallFrame(call=number, size_bytes=len(data), data=data)])


def batch_of(situation: Situation, y: Any = None) -> bytes:
    parts = {
        "batch_input.x": Structure.of(situation.x),
        "batch_input.y": Structure.of(situation.y if y is None else y),
    }
    return messages.encode(v1.EvaluationBatch(update_id=bytes(16)), parts)


def manifest(shape: list[int], digest: bytes = bytes(32), size_bytes: int | None = None) -> v1.WeightsManifest:
    """Of weights that are one float32 tensor."""
    spec = v1.TensorSpec(data_type=v1.DataType.DATA_TYPE_FLOAT32, shape=shape)
    size_bytes = 4 * int(np.prod(shape, dtype=object)) if size_bytes is None else size_bytes
    tensor = v1.TensorManifest(digest=digest, spec=spec, size_bytes=size_bytes)
    return v1.WeightsManifest(tree=v1.TreeDef(leaf=v1.TreeDef.Leaf()), tensors=[tensor])


def put_other_weights(situation: Situation) -> Any:
    other = situation.client.model("no_metrics")
    return other.put_weights(other.initial_weights)


def small_client(situation: Situation, use: Callable[[Any], Any]) -> None:
    with forwardpass_client.connect(situation.address, max_message_bytes=2**20) as client:
        use(client.model("keras_cnn"))


def call_unknown_method(situation: Situation) -> None:
    try:
        situation.channel.unary_unary("/forwardpass.v1.FunctionalModelService/Nonsense")(b"", timeout=10)
    except grpc.RpcError as error:
        raise errors.decode(error.code().name, error.details(), None) from None


def cancelled(situation: Situation) -> None:
    import threading

    client = forwardpass_client.connect(situation.address)
    model = client.model("slow")
    threading.Timer(0.3, client.close).start()
    model.predict_on_batch(((), ()), [10**6])


@pytest.fixture
def situation(server, client):
    with grpc.insecure_channel(
        server.address, [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
    ) as channel:
        yield Situation(client, channel, server.address)


@pytest.mark.parametrize(
    "row, way",
    [(row, way) for row in ROWS for way in ("sdk", "wire") if getattr(row, way)],
    ids=lambda value: value.name if isinstance(value, Row) else value,
)
def test_bad_input_is_refused_with_its_class_status_and_message(situation, row, way):
    with pytest.raises(row.error) as caught:
        getattr(row, way)(situation)
    assert type(caught.value) is row.error
    assert caught.value.status == row.status
    assert row.message in str(caught.value)
    # The server is none the worse for it.
    output = situation.model.forward_pass(situation.weights, (situation.x, situation.y), training=False)
    assert output.num_examples == 4


def test_every_class_of_the_catalogue_has_its_row():
    shown = {row.error.__name__ for row in ROWS}
    assert shown | ELSEWHERE == set(errors.CATALOGUE)
    assert not shown & ELSEWHERE


def test_a_crash_is_logged_under_its_request_id_and_without_the_data(situation, server):
    request_ids = []
    for value in (98765.5, 98766.5):
        with pytest.raises(errors.InternalError) as caught:
            situation.client.model("crashing").predict_on_batch(((), ()), [value])
        assert re.fullmatch(r"[0-9a-f]{16}", caught.value.request_id)
        assert caught.value.request_id in str(caught.value)
        assert "9876" not in str(caught.value)
        request_ids.append(caught.value.request_id)
    # Once the second is there, nothing of the first is still to come.
    for request_id in request_ids:
        log = server.wait_for_log(f"request {request_id}: /forwardpass.v1.FunctionalModelService/PredictOnBatch failed")
    assert "9876" not in log
