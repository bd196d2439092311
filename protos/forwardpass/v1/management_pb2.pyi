from forwardpass.v1 import model_pb2 as _model_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersionDetail
    def __init__(self, model: _Optional[_Union[ModelVersionDetail, _Mapping]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelSelector
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelSelector, _Mapping]] = ...) -> None: ...

class ReloadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersionDetail
    def __init__(self, model: _Optional[_Union[ModelVersionDetail, _Mapping]] = ...) -> None: ...

class DescribeModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelVersionDetail]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelVersionDetail, _Mapping]]] = ...) -> None: ...

class ModelVersionDetail(_message.Message):
    __slots__ = ("status", "is_loadable", "format", "unbatchable_reason")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    IS_LOADABLE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    UNBATCHABLE_REASON_FIELD_NUMBER: _ClassVar[int]
    status: _model_pb2.ModelVersionStatus
    is_loadable: bool
    format: str
    unbatchable_reason: str
    def __init__(self, status: _Optional[_Union[_model_pb2.ModelVersionStatus, _Mapping]] = ..., is_loadable: bool = ..., format: _Optional[str] = ..., unbatchable_reason: _Optional[str] = ...) -> None: ...
