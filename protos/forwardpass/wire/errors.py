"""The error catalogue: one class for each thing a caller can do something about, the same on both ends."""

from __future__ import annotations

from typing import ClassVar

from google.protobuf.message import DecodeError

from forwardpass import v1

DETAIL_KEY = "forwardpass-error-bin"
"""The trailing metadata key that carries a serialized `forwardpass.v1.ErrorDetail`."""


class ForwardPassError(Exception):
    """Base of every error of the service.

    status: the gRPC status code's name.
    sentence: what the class means, for people; the message where nothing more is known.
    place: the argument or leaf that is wrong, e.g. `model_weights.trainable[3]`; "" where there is none.
    expected, found: what the place should hold and what it holds.
    request_id: names the call in the server's log; "" for an error that never left the client.
    retry_after_s: when a server that has too much to do thinks that trying again makes sense; 0 where it says nothing.
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
    status = "INVALID_ARGUMENT"
    sentence = "The request is not a valid message of its method."


class StructureMismatch(InvalidRequest):
    status = "INVALID_ARGUMENT"
    sentence = "The containers of an argument differ from the model's."


class DTypeMismatch(InvalidRequest, TypeError):
    status = "INVALID_ARGUMENT"
    sentence = "An array's element type differs from the model's."


class ShapeMismatch(InvalidRequest):
    status = "INVALID_ARGUMENT"
    sentence = "An array's shape differs from the model's."


class ModelRefusedInput(InvalidRequest):
    status = "INVALID_ARGUMENT"
    sentence = "The model's graph refused the values or shapes that it was given."


class Unauthenticated(ForwardPassError):
    status = "UNAUTHENTICATED"
    sentence = "The server wants to know who calls, and cannot tell."


class PermissionDenied(ForwardPassError, PermissionError):
    status = "PERMISSION_DENIED"
    sentence = "The caller may not call this method."


class ModelNotFound(ForwardPassError, LookupError):
    status = "NOT_FOUND"
    sentence = "The server has no model of this name."


class ModelVersionNotFound(ModelNotFound):
    status = "NOT_FOUND"
    sentence = "The server has no such version of the model."


class ModelLoading(ForwardPassError):
    status = "UNAVAILABLE"
    sentence = "The model is still being loaded."


class ModelFailed(ForwardPassError):
    status = "FAILED_PRECONDITION"
    sentence = "The model failed to load."


class ModelInUse(ForwardPassError):
    status = "FAILED_PRECONDITION"
    sentence = "The version has metric sessions that are open, and the server unloads none that has."


class ModelChanged(ForwardPassError):
    status = "FAILED_PRECONDITION"
    sentence = "Another model answered than the one that was looked up."


class FunctionNotAvailable(ForwardPassError, NotImplementedError):
    status = "FAILED_PRECONDITION"
    sentence = "The model has no such function."


class MessageTooLarge(ForwardPassError):
    status = "RESOURCE_EXHAUSTED"
    sentence = "A message is longer than its limit."


class WeightsNotFound(ForwardPassError, LookupError):
    status = "NOT_FOUND"
    sentence = "The server does not hold these weights, or no longer."


class TensorCorrupted(InvalidRequest):
    status = "INVALID_ARGUMENT"
    sentence = "The bytes of a tensor have another hash than was announced."


class UploadOutOfStep(ForwardPassError):
    status = "ABORTED"
    sentence = "The server does not hold what this upload goes on from: put the weights again."


class WeightStoreFull(ForwardPassError):
    status = "RESOURCE_EXHAUSTED"
    sentence = "The server has no room for these weights beside those that are in use."


class SessionNotFound(ForwardPassError, LookupError):
    status = "NOT_FOUND"
    sentence = "The server holds no such metrics session, or it was closed."


class SessionExpired(SessionNotFound):
    status = "NOT_FOUND"
    sentence = "The metrics session was idle for too long, and was dropped."


class SequenceMismatch(ForwardPassError):
    status = "FAILED_PRECONDITION"
    sentence = "The update does not follow the last one that this writer had applied to the session."


class SessionLimitExceeded(ForwardPassError):
    status = "RESOURCE_EXHAUSTED"
    sentence = "There are as many metrics sessions, or bytes of them, as may be."


class SessionStoreUnavailable(ForwardPassError):
    status = "UNAVAILABLE"
    sentence = "The server cannot reach or write its session store: what was sent may have counted or not."


class ServerOverloaded(ForwardPassError):
    status = "RESOURCE_EXHAUSTED"
    sentence = "The server has as many calls as it takes."


class OutOfMemory(ForwardPassError, MemoryError):
    status = "RESOURCE_EXHAUSTED"
    sentence = "The device has too little memory for this call."


class DeadlineExceeded(ForwardPassError, TimeoutError):
    status = "DEADLINE_EXCEEDED"
    sentence = "The call did not end before its deadline."


class CallCancelled(ForwardPassError):
    status = "CANCELLED"
    sentence = "The call was cancelled."


class ServerUnavailable(ForwardPassError, ConnectionError):
    status = "UNAVAILABLE"
    sentence = "The server cannot be reached."


class MethodNotSupported(ForwardPassError):
    status = "UNIMPLEMENTED"
    sentence = "The server does not know this method: it is older than the client, or another service."


class InternalError(ForwardPassError):
    status = "INTERNAL"
    sentence = "The server failed; its log says more under the request id."


CATALOGUE: dict[str, type[ForwardPassError]] = {
    cls.__name__: cls
    for cls in (
        InvalidRequest,
        StructureMismatch,
        DTypeMismatch,
        ShapeMismatch,
        ModelRefusedInput,
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

# What a bare status means where no detail came with it: gRPC itself, or something between, answered.
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


# gRPC refuses trailing metadata of more than 8 KiB, all of it: the caller would then learn nothing at all.
_MAX_MESSAGE_BYTES = 3000
_MAX_FIELD_BYTES = 800


def encode_message(error: ForwardPassError) -> str:
    """The error's message, cut so that it fits into a header, where what is not ASCII takes three bytes for one."""
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
    """The error as the value of `DETAIL_KEY`. What is long is cut."""
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
    """The error that a failed call stands for.

    status: the gRPC status code's name. message: its details.
    detail: the value of `DETAIL_KEY` in the trailing metadata, where there was one.
    An unknown reason, of a newer server, falls back to what the status means.
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
