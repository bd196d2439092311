from forwardpass.v1 import model_pb2 as _model_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionRecord(_message.Message):
    __slots__ = ("model", "updates", "writers", "state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    WRITERS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    updates: int
    writers: _containers.RepeatedCompositeFieldContainer[SessionWriter]
    state: _model_pb2.MetricsState
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., updates: _Optional[int] = ..., writers: _Optional[_Iterable[_Union[SessionWriter, _Mapping]]] = ..., state: _Optional[_Union[_model_pb2.MetricsState, _Mapping]] = ...) -> None: ...

class SessionWriter(_message.Message):
    __slots__ = ("writer_id", "sequence", "update_id", "outcome")
    WRITER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    writer_id: bytes
    sequence: int
    update_id: bytes
    outcome: bytes
    def __init__(self, writer_id: _Optional[bytes] = ..., sequence: _Optional[int] = ..., update_id: _Optional[bytes] = ..., outcome: _Optional[bytes] = ...) -> None: ...
