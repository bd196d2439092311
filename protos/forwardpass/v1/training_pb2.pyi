from forwardpass.v1 import model_pb2 as _model_pb2
from forwardpass.v1 import service_pb2 as _service_pb2
from forwardpass.v1 import structure_pb2 as _structure_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TrainRequest(_message.Message):
    __slots__ = ("frames", "start", "finish")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[_service_pb2.CallFrame]
    start: TrainingStart
    finish: bool
    def __init__(self, frames: _Optional[_Iterable[_Union[_service_pb2.CallFrame, _Mapping]]] = ..., start: _Optional[_Union[TrainingStart, _Mapping]] = ..., finish: bool = ...) -> None: ...

class TrainingStart(_message.Message):
    __slots__ = ("model", "weights_id", "optimizer", "learning_rate", "proximal", "trainable", "optimizer_state_id", "weighted", "checkpoint_steps", "keep_optimizer_state", "checkpoint_sequence", "start_weights_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_STATE_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_STEPS_FIELD_NUMBER: _ClassVar[int]
    KEEP_OPTIMIZER_STATE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    weights_id: bytes
    optimizer: str
    learning_rate: float
    proximal: float
    trainable: _containers.RepeatedScalarFieldContainer[bool]
    optimizer_state_id: bytes
    weighted: bool
    checkpoint_steps: int
    keep_optimizer_state: bool
    checkpoint_sequence: int
    start_weights_id: bytes
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ..., weights_id: _Optional[bytes] = ..., optimizer: _Optional[str] = ..., learning_rate: _Optional[float] = ..., proximal: _Optional[float] = ..., trainable: _Optional[_Iterable[bool]] = ..., optimizer_state_id: _Optional[bytes] = ..., weighted: bool = ..., checkpoint_steps: _Optional[int] = ..., keep_optimizer_state: bool = ..., checkpoint_sequence: _Optional[int] = ..., start_weights_id: _Optional[bytes] = ...) -> None: ...

class TrainingBatch(_message.Message):
    __slots__ = ("batch_input", "sample_weight")
    BATCH_INPUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    batch_input: _model_pb2.Batch
    sample_weight: _structure_pb2.Structure
    def __init__(self, batch_input: _Optional[_Union[_model_pb2.Batch, _Mapping]] = ..., sample_weight: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class TrainResponse(_message.Message):
    __slots__ = ("frames", "position", "checkpoint", "result", "metrics")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[_service_pb2.AnswerFrame]
    position: TrainingPosition
    checkpoint: TrainingCheckpoint
    result: TrainingResult
    metrics: _structure_pb2.Structure
    def __init__(self, frames: _Optional[_Iterable[_Union[_service_pb2.AnswerFrame, _Mapping]]] = ..., position: _Optional[_Union[TrainingPosition, _Mapping]] = ..., checkpoint: _Optional[_Union[TrainingCheckpoint, _Mapping]] = ..., result: _Optional[_Union[TrainingResult, _Mapping]] = ..., metrics: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class TrainingPosition(_message.Message):
    __slots__ = ("model", "sequence")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    sequence: int
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., sequence: _Optional[int] = ...) -> None: ...

class TrainingCheckpoint(_message.Message):
    __slots__ = ("sequence", "weights_id", "optimizer_state_id")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_STATE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    weights_id: bytes
    optimizer_state_id: bytes
    def __init__(self, sequence: _Optional[int] = ..., weights_id: _Optional[bytes] = ..., optimizer_state_id: _Optional[bytes] = ...) -> None: ...

class TrainingResult(_message.Message):
    __slots__ = ("weights_id", "loss", "num_examples", "num_steps", "optimizer_state_id")
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_STATE_ID_FIELD_NUMBER: _ClassVar[int]
    weights_id: bytes
    loss: float
    num_examples: int
    num_steps: int
    optimizer_state_id: bytes
    def __init__(self, weights_id: _Optional[bytes] = ..., loss: _Optional[float] = ..., num_examples: _Optional[int] = ..., num_steps: _Optional[int] = ..., optimizer_state_id: _Optional[bytes] = ...) -> None: ...
