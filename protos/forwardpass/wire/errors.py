"""The error catalogue: one class for each kind of failure that a caller can handle, the same in client and server."""

from __future__ import annotations

from typing import ClassVar

from google.protobuf.message import DecodeError

from forwardpass import v1

DETAIL_KEY = "forwardpass-error-bin"
"""The trailing metadata key that carries a serialized `forwardpass.v1.ErrorDetail`."""


class ForwardPassError(Exception):
    """Base class of all errors of the service.

    status: the name of the gRPC status code.
    sentence: the default message of the class.
    place: the argument or leaf that is wrong, such as `model_weights.trainable[3]`; "" if the error concerns none.
    expected, found: what the place should hold, and what it holds.
    request_id: identifies the call in the server's log; "" for an error that was raised in the client.
    retry_after_s: the time after which an overloaded server expects to have room; 0 if it gives none.
    """

    status: ClassVar[str] = "UNKNOWN"
    sentence: ClassVar[str] = "The call failed."

    def __init__(
        self,
        message: str = "",
        *,
        place: str = "",
        expected: str = "",
        found: str = "",
        request_id: str = "",
        retry_after_s: float = 0.0,
    ) -> None:
        if not message and expected:
            message = f"{place}: expected {expected}, got {found}"
        elif message and place:
            message = f"{place}: {message}"
        super().__init__(message or self.sentence)
        self.place = place
        self.expected = expected
        self.found = found
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class InvalidRequest(ForwardPassError, ValueError):
    """Raised for an invalid argument. Also the base of the more specific classes below."""

    status = "INVALID_ARGUMENT"
    sentence = (
        "The request is not a valid message of its method: the client may use other .proto files than the server."
    )


class StructureMismatch(InvalidRequest):
    """Raised if the containers of an argument (nesting, keys, lengths) differ from the model's."""

    status = "INVALID_ARGUMENT"
    sentence = "The containers of an argument differ from the model's: `forwardpass describe` shows the expected ones."


class DTypeMismatch(InvalidRequest, TypeError):
    """Raised if the dtype of an array cannot be cast to the model's. Convert the array."""

    status = "INVALID_ARGUMENT"
    sentence = "An array's element type differs from the model's: convert the array."


class ShapeMismatch(InvalidRequest):
    """Raised if the shape of an array does not fit the model's. Reshape the array."""

    status = "INVALID_ARGUMENT"
    sentence = "An array's shape differs from the model's: reshape the array."


class ModelRefusedInput(InvalidRequest):
    """Raised if the model's graph rejects the values or shapes of a call, as a local model would."""

    status = "INVALID_ARGUMENT"
    sentence = "The model's graph refused the values or shapes of the arguments: check them."


class OptimizerNotSupported(InvalidRequest):
    """Raised for an optimizer that the server cannot use: unknown, not permitted, or wrong without state of its own."""

    status = "INVALID_ARGUMENT"
    sentence = "The server cannot train with this optimizer: the message names the reason; use another one."


class Unauthenticated(ForwardPassError):
    """Raised for missing or invalid credentials."""

    status = "UNAUTHENTICATED"
    sentence = "Missing or invalid credentials: send a bearer token (connect(token=...)) or a client certificate."


class PermissionDenied(ForwardPassError, PermissionError):
    """Raised if the caller's role does not permit the method."""

    status = "PERMISSION_DENIED"
    sentence = "The caller is not permitted to call this method: use a token with the role that the method requires."


class ModelNotFound(ForwardPassError, LookupError):
    """Raised for the name of a model that the server does not have."""

    status = "NOT_FOUND"
    sentence = "The server has no model of this name: `forwardpass models` lists the models."


class ModelVersionNotFound(ModelNotFound):
    """Raised for a version or label that the model does not have."""

    status = "NOT_FOUND"
    sentence = "The server has no such version of the model: `forwardpass models` lists the versions and labels."


class ModelLoading(ForwardPassError):
    """Raised while the model is being loaded. Retryable."""

    status = "UNAVAILABLE"
    sentence = "The model is still being loaded: retry later."


class ModelFailed(ForwardPassError):
    """Raised for a model that failed to load. The message gives the reason."""

    status = "FAILED_PRECONDITION"
    sentence = "The model failed to load: `forwardpass models` and the server's log show the reason."


class ModelInUse(ForwardPassError):
    """Raised by unload for a version with open metric sessions, under --unload-with-sessions refuse."""

    status = "FAILED_PRECONDITION"
    sentence = (
        "The version has open metric sessions, and the server does not unload versions with sessions: close them first."
    )


class ModelChanged(ForwardPassError):
    """Raised if the server now serves another model under the same name and version. Look the model up again."""

    status = "FAILED_PRECONDITION"
    sentence = "The server answered with another model than the one that was looked up: look the model up again."


class FunctionNotAvailable(ForwardPassError, NotImplementedError):
    """Raised for a function that the model does not have, such as metrics."""

    status = "FAILED_PRECONDITION"
    sentence = "The model has no such function: `forwardpass describe` shows the reason."


class MessageTooLarge(ForwardPassError):
    """Raised for a request or response over the server's limit (--max-message-mib). Use smaller batches."""

    status = "RESOURCE_EXHAUSTED"
    sentence = "A message is longer than its limit: use smaller batches."


class WeightsNotFound(ForwardPassError, LookupError):
    """Raised for weights that the server does not hold (any more). Put them again."""

    status = "NOT_FOUND"
    sentence = "The server does not hold these weights: put them again."


class TensorCorrupted(InvalidRequest):
    """Raised if received tensor data does not match its announced hash. Put the weights again."""

    status = "INVALID_ARGUMENT"
    sentence = "The bytes of a tensor do not match the announced hash: put the weights again."


class UploadOutOfStep(ForwardPassError):
    """Raised if an upload does not continue where the server's copy ends. Put the weights again."""

    status = "ABORTED"
    sentence = "The upload does not continue where the server's copy ends: put the weights again."


class WeightStoreFull(ForwardPassError):
    """Raised if weights do not fit beside those that are in use. Delete or release weights, or retry later."""

    status = "RESOURCE_EXHAUSTED"
    sentence = "The server has no room for these weights beside those that are in use: delete or release weights."


class WeightStoreUnavailable(ForwardPassError):
    """Raised if the server cannot reach the weight store that it shares with other servers. Retryable."""

    status = "UNAVAILABLE"
    sentence = "The server cannot reach or write the weight store that it shares with other servers: retry later."


class SessionNotFound(ForwardPassError, LookupError):
    """Raised for a metric session that does not exist or was closed."""

    status = "NOT_FOUND"
    sentence = "The server has no such metrics session: it was never opened, or it was closed. Open a new one."


class SessionExpired(SessionNotFound):
    """Raised for a metric session that was deleted because it was idle for too long (--session-expiry)."""

    status = "NOT_FOUND"
    sentence = "The metrics session was idle for too long and was deleted: open a new one."


class SequenceMismatch(ForwardPassError):
    """Raised if updates of a session arrive out of order, for example from two writers with the same id."""

    status = "FAILED_PRECONDITION"
    sentence = (
        "The update does not follow the last update of this writer to the session: another writer may use the same id."
    )


class SessionLimitExceeded(ForwardPassError):
    """Raised if the caller has reached the limit of sessions or of their size. Close sessions."""

    status = "RESOURCE_EXHAUSTED"
    sentence = "The limit of metrics sessions, or of their size, is reached: close sessions, or retry later."


class SessionStoreUnavailable(ForwardPassError):
    """Raised if the server cannot reach its session store. Sending the same update again is safe: it counts once."""

    status = "UNAVAILABLE"
    sentence = "The server cannot reach or write its session store: send the same update again, which counts it once."


class ServerOverloaded(ForwardPassError):
    """Raised if the server has reached its limit of concurrent calls or bytes. Retryable: see `retry_after_s`."""

    status = "RESOURCE_EXHAUSTED"
    sentence = "The server has reached its limit of concurrent calls: retry later."


class OutOfMemory(ForwardPassError, MemoryError):
    """Raised if the device has too little memory for a call. Use smaller batches, or retry later."""

    status = "RESOURCE_EXHAUSTED"
    sentence = "The device has too little memory for this call: use smaller batches, or retry later."


class DeadlineExceeded(ForwardPassError, TimeoutError):
    """Raised if a call does not end within its timeout."""

    status = "DEADLINE_EXCEEDED"
    sentence = "The call did not end before its deadline: retry it, or raise timeout_s."


class CallCancelled(ForwardPassError):
    """Raised for a call that was cancelled."""

    status = "CANCELLED"
    sentence = "The call was cancelled."


class ServerUnavailable(ForwardPassError, ConnectionError):
    """Raised if the server cannot be reached, or is stopping. Retryable."""

    status = "UNAVAILABLE"
    sentence = "The server cannot be reached: check its address, and that it runs."


class MethodNotSupported(ForwardPassError):
    """Raised for a method that the server does not have."""

    status = "UNIMPLEMENTED"
    sentence = "The server does not have this method: it is older than the client, or a different service."


class InternalError(ForwardPassError):
    """Raised for an unexpected failure of the server. Its log has the details under `request_id`."""

    status = "INTERNAL"
    sentence = "The server failed: its log has the details under the request id."


CATALOGUE: dict[str, type[ForwardPassError]] = {
    cls.__name__: cls
    for cls in (
        InvalidRequest,
        StructureMismatch,
        DTypeMismatch,
        ShapeMismatch,
        ModelRefusedInput,
        OptimizerNotSupported,
        Unauthenticated,
        PermissionDenied,
        ModelNotFound,
        ModelVersionNotFound,
        ModelLoading,
        ModelFailed,
        ModelInUse,
        ModelChanged,
        FunctionNotAvailable,
        MessageTooLarge,
        WeightsNotFound,
        TensorCorrupted,
        UploadOutOfStep,
        WeightStoreFull,
        WeightStoreUnavailable,
        SessionNotFound,
        SessionExpired,
        SequenceMismatch,
        SessionLimitExceeded,
        SessionStoreUnavailable,
        ServerOverloaded,
        OutOfMemory,
        DeadlineExceeded,
        CallCancelled,
        ServerUnavailable,
        MethodNotSupported,
        InternalError,
    )
}

# The class for a status without an ErrorDetail: gRPC itself or a proxy has answered.
_BY_STATUS: dict[str, type[ForwardPassError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "RESOURCE_EXHAUSTED": ServerOverloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": CallCancelled,
    "UNAVAILABLE": ServerUnavailable,
    "UNIMPLEMENTED": MethodNotSupported,
    "INTERNAL": InternalError,
}


# gRPC drops trailing metadata of more than 8 KiB completely: the caller would not get the error.
_MAX_MESSAGE_BYTES = 3000
_MAX_FIELD_BYTES = 800


def encode_message(error: ForwardPassError) -> str:
    """The error's message, shortened to fit into a header, where each byte that is not ASCII takes three."""
    message = str(error)
    size_bytes = 0
    for index, character in enumerate(message):
        size_bytes += 1 if " " <= character <= "~" else 3 * len(character.encode(errors="replace"))
        if size_bytes > _MAX_MESSAGE_BYTES:
            return message[:index] + "..."
    return message


def _cut(text: str) -> str:
    encoded = text.encode(errors="replace")
    return text if len(encoded) <= _MAX_FIELD_BYTES else encoded[:_MAX_FIELD_BYTES].decode(errors="ignore") + "..."


def encode_detail(error: ForwardPassError) -> bytes:
    """The error as the value of `DETAIL_KEY`. Long texts are cut."""
    detail = v1.ErrorDetail(
        reason=type(error).__name__,
        place=_cut(error.place),
        expected=_cut(error.expected),
        found=_cut(error.found),
        request_id=error.request_id,
        retry_after_ms=round(error.retry_after_s * 1000),
    )
    return detail.SerializeToString()


def decode(status: str, message: str, detail: bytes | None) -> ForwardPassError:
    """The error of a failed call.

    status: the name of the gRPC status code. message: its details.
    detail: the value of `DETAIL_KEY` in the trailing metadata; None without one.
    An unknown reason (from a newer server) gives the class for the status.
    """
    found = v1.ErrorDetail()
    try:
        found.ParseFromString(detail or b"")
    except DecodeError:
        found.Clear()
    cls = CATALOGUE.get(found.reason)
    if cls is None:
        cls = _BY_STATUS.get(status, ForwardPassError)
        if status == "RESOURCE_EXHAUSTED" and "larger than max" in message:
            cls = MessageTooLarge
        message = f"{cls.sentence} gRPC says {status}: {message}"
    error = cls(message, request_id=found.request_id, retry_after_s=found.retry_after_ms / 1000)
    error.place, error.expected, error.found = found.place, found.expected, found.found
    return error
