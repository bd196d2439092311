from forwardpass.v1 import model_pb2 as _model_pb2
from forwardpass.v1 import structure_pb2 as _structure_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ForwardPassRequest(_message.Message):
    __slots__ = ("model", "training", "model_weights", "weights_id", "batch_input", "allow_rounding")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    MODEL_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    BATCH_INPUT_FIELD_NUMBER: _ClassVar[int]
    ALLOW_ROUNDING_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    training: bool
    model_weights: _model_pb2.ModelWeights
    weights_id: bytes
    batch_input: _model_pb2.Batch
    allow_rounding: bool
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ..., training: bool = ..., model_weights: _Optional[_Union[_model_pb2.ModelWeights, _Mapping]] = ..., weights_id: _Optional[bytes] = ..., batch_input: _Optional[_Union[_model_pb2.Batch, _Mapping]] = ..., allow_rounding: bool = ...) -> None: ...

class ForwardPassResponse(_message.Message):
    __slots__ = ("model", "batch_output")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BATCH_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    batch_output: _model_pb2.BatchOutput
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., batch_output: _Optional[_Union[_model_pb2.BatchOutput, _Mapping]] = ...) -> None: ...

class PredictOnBatchRequest(_message.Message):
    __slots__ = ("model", "training", "model_weights", "weights_id", "x", "allow_rounding")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    MODEL_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    ALLOW_ROUNDING_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    training: bool
    model_weights: _model_pb2.ModelWeights
    weights_id: bytes
    x: _structure_pb2.Structure
    allow_rounding: bool
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ..., training: bool = ..., model_weights: _Optional[_Union[_model_pb2.ModelWeights, _Mapping]] = ..., weights_id: _Optional[bytes] = ..., x: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., allow_rounding: bool = ...) -> None: ...

class PredictOnBatchResponse(_message.Message):
    __slots__ = ("model", "predictions", "prediction_mask")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_MASK_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    predictions: _structure_pb2.Structure
    prediction_mask: _structure_pb2.Structure
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., predictions: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., prediction_mask: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class LossRequest(_message.Message):
    __slots__ = ("model", "output", "label", "sample_weight", "output_mask")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_MASK_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    output: _structure_pb2.Structure
    label: _structure_pb2.Structure
    sample_weight: _structure_pb2.Structure
    output_mask: _structure_pb2.Structure
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ..., output: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., label: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., sample_weight: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., output_mask: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class LossResponse(_message.Message):
    __slots__ = ("model", "loss")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    loss: _structure_pb2.Structure
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., loss: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class ForwardBackwardRequest(_message.Message):
    __slots__ = ("model", "training", "model_weights", "weights_id", "batch_input", "sample_weight", "keep_gradients")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    MODEL_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    BATCH_INPUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    KEEP_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    training: bool
    model_weights: _model_pb2.ModelWeights
    weights_id: bytes
    batch_input: _model_pb2.Batch
    sample_weight: _structure_pb2.Structure
    keep_gradients: bool
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ..., training: bool = ..., model_weights: _Optional[_Union[_model_pb2.ModelWeights, _Mapping]] = ..., weights_id: _Optional[bytes] = ..., batch_input: _Optional[_Union[_model_pb2.Batch, _Mapping]] = ..., sample_weight: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., keep_gradients: bool = ...) -> None: ...

class ForwardBackwardResponse(_message.Message):
    __slots__ = ("model", "batch_output", "gradients", "gradients_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BATCH_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_ID_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    batch_output: _model_pb2.BatchOutput
    gradients: _structure_pb2.Structure
    gradients_id: bytes
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., batch_output: _Optional[_Union[_model_pb2.BatchOutput, _Mapping]] = ..., gradients: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., gradients_id: _Optional[bytes] = ...) -> None: ...

class VjpRequest(_message.Message):
    __slots__ = ("model", "training", "model_weights", "weights_id", "x", "cotangents")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    MODEL_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    COTANGENTS_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    training: bool
    model_weights: _model_pb2.ModelWeights
    weights_id: bytes
    x: _structure_pb2.Structure
    cotangents: _structure_pb2.Structure
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ..., training: bool = ..., model_weights: _Optional[_Union[_model_pb2.ModelWeights, _Mapping]] = ..., weights_id: _Optional[bytes] = ..., x: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., cotangents: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class VjpResponse(_message.Message):
    __slots__ = ("model", "weights_cotangents", "x_cotangents")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_COTANGENTS_FIELD_NUMBER: _ClassVar[int]
    X_COTANGENTS_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    weights_cotangents: _structure_pb2.Structure
    x_cotangents: _structure_pb2.Structure
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., weights_cotangents: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., x_cotangents: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class InitializeMetricsStateRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ...) -> None: ...

class InitializeMetricsStateResponse(_message.Message):
    __slots__ = ("model", "state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    state: _model_pb2.MetricsState
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., state: _Optional[_Union[_model_pb2.MetricsState, _Mapping]] = ...) -> None: ...

class UpdateMetricsStateRequest(_message.Message):
    __slots__ = ("model", "state", "labels", "batch_output", "sample_weight")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    BATCH_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    state: _model_pb2.MetricsState
    labels: _structure_pb2.Structure
    batch_output: _model_pb2.BatchOutput
    sample_weight: _structure_pb2.Structure
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ..., state: _Optional[_Union[_model_pb2.MetricsState, _Mapping]] = ..., labels: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., batch_output: _Optional[_Union[_model_pb2.BatchOutput, _Mapping]] = ..., sample_weight: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class UpdateMetricsStateResponse(_message.Message):
    __slots__ = ("model", "state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    state: _model_pb2.MetricsState
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., state: _Optional[_Union[_model_pb2.MetricsState, _Mapping]] = ...) -> None: ...

class FinalizeMetricsRequest(_message.Message):
    __slots__ = ("model", "state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    state: _model_pb2.MetricsState
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ..., state: _Optional[_Union[_model_pb2.MetricsState, _Mapping]] = ...) -> None: ...

class FinalizeMetricsResponse(_message.Message):
    __slots__ = ("model", "metrics")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    metrics: _structure_pb2.Structure
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., metrics: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "versions", "max_request_bytes", "shares_weights")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARES_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelDescription
    versions: _containers.RepeatedCompositeFieldContainer[_model_pb2.ModelVersionStatus]
    max_request_bytes: int
    shares_weights: bool
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelDescription, _Mapping]] = ..., versions: _Optional[_Iterable[_Union[_model_pb2.ModelVersionStatus, _Mapping]]] = ..., max_request_bytes: _Optional[int] = ..., shares_weights: bool = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "unready_reasons")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    UNREADY_REASONS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[_model_pb2.ModelVersionStatus]
    unready_reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, models: _Optional[_Iterable[_Union[_model_pb2.ModelVersionStatus, _Mapping]]] = ..., unready_reasons: _Optional[_Iterable[str]] = ...) -> None: ...

class GetInitialWeightsRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ...) -> None: ...

class GetInitialWeightsResponse(_message.Message):
    __slots__ = ("model", "model_weights")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    model_weights: _model_pb2.ModelWeights
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., model_weights: _Optional[_Union[_model_pb2.ModelWeights, _Mapping]] = ...) -> None: ...

class PipelineRequest(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[CallFrame]
    def __init__(self, frames: _Optional[_Iterable[_Union[CallFrame, _Mapping]]] = ...) -> None: ...

class PipelineResponse(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[AnswerFrame]
    def __init__(self, frames: _Optional[_Iterable[_Union[AnswerFrame, _Mapping]]] = ...) -> None: ...

class CallFrame(_message.Message):
    __slots__ = ("call", "method", "timeout_s", "size_bytes", "data", "largest_array_offset")
    CALL_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LARGEST_ARRAY_OFFSET_FIELD_NUMBER: _ClassVar[int]
    call: int
    method: str
    timeout_s: float
    size_bytes: int
    data: bytes
    largest_array_offset: int
    def __init__(self, call: _Optional[int] = ..., method: _Optional[str] = ..., timeout_s: _Optional[float] = ..., size_bytes: _Optional[int] = ..., data: _Optional[bytes] = ..., largest_array_offset: _Optional[int] = ...) -> None: ...

class AnswerFrame(_message.Message):
    __slots__ = ("call", "status", "message", "error_detail", "size_bytes", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_DETAIL_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: int
    status: int
    message: str
    error_detail: bytes
    size_bytes: int
    data: bytes
    def __init__(self, call: _Optional[int] = ..., status: _Optional[int] = ..., message: _Optional[str] = ..., error_detail: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
