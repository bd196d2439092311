from forwardpass.v1 import structure_pb2 as _structure_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_AVAILABLE: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]

class Function(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FUNCTION_UNSPECIFIED: _ClassVar[Function]
    FUNCTION_PREDICT_ON_BATCH: _ClassVar[Function]
    FUNCTION_FORWARD_PASS: _ClassVar[Function]
    FUNCTION_LOSS: _ClassVar[Function]
    FUNCTION_WEIGHTED_LOSS: _ClassVar[Function]
    FUNCTION_INITIALIZE_METRICS_STATE: _ClassVar[Function]
    FUNCTION_UPDATE_METRICS_STATE: _ClassVar[Function]
    FUNCTION_WEIGHTED_UPDATE_METRICS_STATE: _ClassVar[Function]
    FUNCTION_FINALIZE_METRICS: _ClassVar[Function]
    FUNCTION_FORWARD_BACKWARD: _ClassVar[Function]
    FUNCTION_WEIGHTED_FORWARD_BACKWARD: _ClassVar[Function]
    FUNCTION_VJP: _ClassVar[Function]
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_AVAILABLE: ModelState
MODEL_STATE_FAILED: ModelState
FUNCTION_UNSPECIFIED: Function
FUNCTION_PREDICT_ON_BATCH: Function
FUNCTION_FORWARD_PASS: Function
FUNCTION_LOSS: Function
FUNCTION_WEIGHTED_LOSS: Function
FUNCTION_INITIALIZE_METRICS_STATE: Function
FUNCTION_UPDATE_METRICS_STATE: Function
FUNCTION_WEIGHTED_UPDATE_METRICS_STATE: Function
FUNCTION_FINALIZE_METRICS: Function
FUNCTION_FORWARD_BACKWARD: Function
FUNCTION_WEIGHTED_FORWARD_BACKWARD: Function
FUNCTION_VJP: Function

class ModelWeights(_message.Message):
    __slots__ = ("trainable", "non_trainable")
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    NON_TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    trainable: _structure_pb2.Structure
    non_trainable: _structure_pb2.Structure
    def __init__(self, trainable: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., non_trainable: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("x", "y")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    x: _structure_pb2.Structure
    y: _structure_pb2.Structure
    def __init__(self, x: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., y: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class BatchOutput(_message.Message):
    __slots__ = ("loss", "predictions", "num_examples", "prediction_mask")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_MASK_FIELD_NUMBER: _ClassVar[int]
    loss: _structure_pb2.Structure
    predictions: _structure_pb2.Structure
    num_examples: _structure_pb2.Structure
    prediction_mask: _structure_pb2.Structure
    def __init__(self, loss: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., predictions: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., num_examples: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ..., prediction_mask: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class MetricsState(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: _structure_pb2.Structure
    def __init__(self, value: _Optional[_Union[_structure_pb2.Structure, _Mapping]] = ...) -> None: ...

class ModelSelector(_message.Message):
    __slots__ = ("name", "version", "label")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    label: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., label: _Optional[str] = ...) -> None: ...

class ModelIdentity(_message.Message):
    __slots__ = ("name", "version", "content_hash")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    content_hash: bytes
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., content_hash: _Optional[bytes] = ...) -> None: ...

class ModelVersionStatus(_message.Message):
    __slots__ = ("name", "version", "state", "error", "content_hash", "labels")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    state: ModelState
    error: str
    content_hash: bytes
    labels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., state: _Optional[_Union[ModelState, str]] = ..., error: _Optional[str] = ..., content_hash: _Optional[bytes] = ..., labels: _Optional[_Iterable[str]] = ...) -> None: ...

class FunctionDescription(_message.Message):
    __slots__ = ("function", "available", "unavailable_reason")
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_REASON_FIELD_NUMBER: _ClassVar[int]
    function: Function
    available: bool
    unavailable_reason: str
    def __init__(self, function: _Optional[_Union[Function, str]] = ..., available: bool = ..., unavailable_reason: _Optional[str] = ...) -> None: ...

class ModelDescription(_message.Message):
    __slots__ = ("identity", "format", "functions", "has_own_forward_pass", "weights", "input", "predictions", "batch_output", "sample_weight", "loss", "metrics_state", "metrics", "unused_batch_output_fields", "unbatchable_reason", "unmergeable_reason", "prediction_mask", "guard", "warnings", "unreached_weights", "optimizers", "vectorization")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    FUNCTIONS_FIELD_NUMBER: _ClassVar[int]
    HAS_OWN_FORWARD_PASS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    BATCH_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    METRICS_STATE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    UNUSED_BATCH_OUTPUT_FIELDS_FIELD_NUMBER: _ClassVar[int]
    UNBATCHABLE_REASON_FIELD_NUMBER: _ClassVar[int]
    UNMERGEABLE_REASON_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_MASK_FIELD_NUMBER: _ClassVar[int]
    GUARD_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    UNREACHED_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZERS_FIELD_NUMBER: _ClassVar[int]
    VECTORIZATION_FIELD_NUMBER: _ClassVar[int]
    identity: ModelIdentity
    format: str
    functions: _containers.RepeatedCompositeFieldContainer[FunctionDescription]
    has_own_forward_pass: bool
    weights: _structure_pb2.StructureSpec
    input: _structure_pb2.StructureSpec
    predictions: _structure_pb2.StructureSpec
    batch_output: _structure_pb2.StructureSpec
    sample_weight: _structure_pb2.StructureSpec
    loss: _structure_pb2.StructureSpec
    metrics_state: _structure_pb2.StructureSpec
    metrics: _structure_pb2.StructureSpec
    unused_batch_output_fields: _containers.RepeatedScalarFieldContainer[str]
    unbatchable_reason: str
    unmergeable_reason: str
    prediction_mask: _structure_pb2.StructureSpec
    guard: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    unreached_weights: _containers.RepeatedScalarFieldContainer[str]
    optimizers: _containers.RepeatedScalarFieldContainer[str]
    vectorization: Vectorization
    def __init__(self, identity: _Optional[_Union[ModelIdentity, _Mapping]] = ..., format: _Optional[str] = ..., functions: _Optional[_Iterable[_Union[FunctionDescription, _Mapping]]] = ..., has_own_forward_pass: bool = ..., weights: _Optional[_Union[_structure_pb2.StructureSpec, _Mapping]] = ..., input: _Optional[_Union[_structure_pb2.StructureSpec, _Mapping]] = ..., predictions: _Optional[_Union[_structure_pb2.StructureSpec, _Mapping]] = ..., batch_output: _Optional[_Union[_structure_pb2.StructureSpec, _Mapping]] = ..., sample_weight: _Optional[_Union[_structure_pb2.StructureSpec, _Mapping]] = ..., loss: _Optional[_Union[_structure_pb2.StructureSpec, _Mapping]] = ..., metrics_state: _Optional[_Union[_structure_pb2.StructureSpec, _Mapping]] = ..., metrics: _Optional[_Union[_structure_pb2.StructureSpec, _Mapping]] = ..., unused_batch_output_fields: _Optional[_Iterable[str]] = ..., unbatchable_reason: _Optional[str] = ..., unmergeable_reason: _Optional[str] = ..., prediction_mask: _Optional[_Union[_structure_pb2.StructureSpec, _Mapping]] = ..., guard: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., unreached_weights: _Optional[_Iterable[str]] = ..., optimizers: _Optional[_Iterable[str]] = ..., vectorization: _Optional[_Union[Vectorization, _Mapping]] = ...) -> None: ...

class Vectorization(_message.Message):
    __slots__ = ("unavailable_reason", "largest_difference", "allows_rounding")
    UNAVAILABLE_REASON_FIELD_NUMBER: _ClassVar[int]
    LARGEST_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    ALLOWS_ROUNDING_FIELD_NUMBER: _ClassVar[int]
    unavailable_reason: str
    largest_difference: float
    allows_rounding: bool
    def __init__(self, unavailable_reason: _Optional[str] = ..., largest_difference: _Optional[float] = ..., allows_rounding: bool = ...) -> None: ...
