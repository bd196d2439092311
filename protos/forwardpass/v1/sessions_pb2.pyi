from forwardpass.v1 import model_pb2 as _model_pb2
from forwardpass.v1 import service_pb2 as _service_pb2
from forwardpass.v1 import structure_pb2 as _structure_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenSessionRequest(_message.Message):
    __slots__ = ("model", "session_id", "resume", "initial_state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    INITIAL_STATE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    session_id: bytes
    resume: bool
    initial_state: _model_pb2.MetricsState
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ..., session_id: _Optional[bytes] = ..., resume: bool = ..., initial_state: _Optional[_Union[_model_pb2.MetricsState, _Mapping]] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("model", "updates")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    updates: int
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., updates: _Optional[int] = ...) -> None: ...

class UpdateIdentity(_message.Message):
    __slots__ = ("session_id", "writer_id", "sequence", "update_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WRITER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    writer_id: bytes
    sequence: int
    update_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ..., writer_id: _Optional[bytes] = ..., sequence: _Optional[int] = ..., update_id: _Optional[bytes] = ...) -> None: ...

class UpdateSessionRequest(_message.Message):
    __slots__ = ("update", "labels", "batch_output", "sample_weight")
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    BATCH_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    update: UpdateIdentity
    labels: _structure_pb2.Structure
    batch_output: _model_pb2.BatchOutput
    sample_weight: _structure_pb2.Structure
    def __init__(self, update: _Optional[_Union[UpdateIdentity, _Mapping]] = ..., labels: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., batch_output: _Optional[_Union[_model_pb2.BatchOutput, _Mapping]] = ..., sample_weight: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class UpdateSessionResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ...) -> None: ...

class ForwardPassInSessionRequest(_message.Message):
    __slots__ = ("update", "training", "without_predictions", "model_weights", "weights_id", "batch_input", "sample_weight")
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    BATCH_INPUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    update: UpdateIdentity
    training: bool
    without_predictions: bool
    model_weights: _model_pb2.ModelWeights
    weights_id: bytes
    batch_input: _model_pb2.Batch
    sample_weight: _structure_pb2.Structure
    def __init__(self, update: _Optional[_Union[UpdateIdentity, _Mapping]] = ..., training: bool = ..., without_predictions: bool = ..., model_weights: _Optional[_Union[_model_pb2.ModelWeights, _Mapping]] = ..., weights_id: _Optional[bytes] = ..., batch_input: _Optional[_Union[_model_pb2.Batch, _Mapping]] = ..., sample_weight: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class ForwardPassInSessionResponse(_message.Message):
    __slots__ = ("model", "batch_output")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BATCH_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    batch_output: _model_pb2.BatchOutput
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., batch_output: _Optional[_Union[_model_pb2.BatchOutput, _Mapping]] = ...) -> None: ...

class MergeIntoSessionRequest(_message.Message):
    __slots__ = ("update", "other_session_id", "state")
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    OTHER_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    update: UpdateIdentity
    other_session_id: bytes
    state: _model_pb2.MetricsState
    def __init__(self, update: _Optional[_Union[UpdateIdentity, _Mapping]] = ..., other_session_id: _Optional[bytes] = ..., state: _Optional[_Union[_model_pb2.MetricsState, _Mapping]] = ...) -> None: ...

class MergeIntoSessionResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ...) -> None: ...

class GetSessionStateRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class GetSessionStateResponse(_message.Message):
    __slots__ = ("model", "state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    state: _model_pb2.MetricsState
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., state: _Optional[_Union[_model_pb2.MetricsState, _Mapping]] = ...) -> None: ...

class GetSessionResultRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class GetSessionResultResponse(_message.Message):
    __slots__ = ("model", "metrics")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    metrics: _structure_pb2.Structure
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., metrics: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EvaluateRequest(_message.Message):
    __slots__ = ("frames", "start")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[_service_pb2.CallFrame]
    start: EvaluationStart
    def __init__(self, frames: _Optional[_Iterable[_Union[_service_pb2.CallFrame, _Mapping]]] = ..., start: _Optional[_Union[EvaluationStart, _Mapping]] = ...) -> None: ...

class EvaluationStart(_message.Message):
    __slots__ = ("writer_id", "training", "targets", "allow_rounding")
    WRITER_ID_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_ROUNDING_FIELD_NUMBER: _ClassVar[int]
    writer_id: bytes
    training: bool
    targets: _containers.RepeatedCompositeFieldContainer[EvaluationTarget]
    allow_rounding: bool
    def __init__(self, writer_id: _Optional[bytes] = ..., training: bool = ..., targets: _Optional[_Iterable[_Union[EvaluationTarget, _Mapping]]] = ..., allow_rounding: bool = ...) -> None: ...

class EvaluationTarget(_message.Message):
    __slots__ = ("session_id", "weights_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    weights_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ..., weights_id: _Optional[bytes] = ...) -> None: ...

class EvaluationBatch(_message.Message):
    __slots__ = ("update_id", "batch_input", "sample_weight")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    BATCH_INPUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    update_id: bytes
    batch_input: _model_pb2.Batch
    sample_weight: _structure_pb2.Structure
    def __init__(self, update_id: _Optional[bytes] = ..., batch_input: _Optional[_Union[_model_pb2.Batch, _Mapping]] = ..., sample_weight: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class EvaluateResponse(_message.Message):
    __slots__ = ("frames", "position")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[_service_pb2.AnswerFrame]
    position: EvaluationPosition
    def __init__(self, frames: _Optional[_Iterable[_Union[_service_pb2.AnswerFrame, _Mapping]]] = ..., position: _Optional[_Union[EvaluationPosition, _Mapping]] = ...) -> None: ...

class EvaluationPosition(_message.Message):
    __slots__ = ("model", "sequence")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    sequence: int
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., sequence: _Optional[int] = ...) -> None: ...
