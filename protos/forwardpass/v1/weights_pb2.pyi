from forwardpass.v1 import structure_pb2 as _structure_pb2
from forwardpass.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorManifest(_message.Message):
    __slots__ = ("digest", "spec", "size_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    spec: _tensor_pb2.TensorSpec
    size_bytes: int
    def __init__(self, digest: _Optional[bytes] = ..., spec: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class WeightsManifest(_message.Message):
    __slots__ = ("tree", "tensors")
    TREE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tree: _structure_pb2.TreeDef
    tensors: _containers.RepeatedCompositeFieldContainer[TensorManifest]
    def __init__(self, tree: _Optional[_Union[_structure_pb2.TreeDef, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorManifest, _Mapping]]] = ...) -> None: ...

class PutWeightsRequest(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: WeightsManifest
    def __init__(self, manifest: _Optional[_Union[WeightsManifest, _Mapping]] = ...) -> None: ...

class PutWeightsResponse(_message.Message):
    __slots__ = ("weights_id", "missing")
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    weights_id: bytes
    missing: _containers.RepeatedCompositeFieldContainer[MissingTensor]
    def __init__(self, weights_id: _Optional[bytes] = ..., missing: _Optional[_Iterable[_Union[MissingTensor, _Mapping]]] = ...) -> None: ...

class MissingTensor(_message.Message):
    __slots__ = ("digest", "received_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    received_bytes: int
    def __init__(self, digest: _Optional[bytes] = ..., received_bytes: _Optional[int] = ...) -> None: ...

class UploadTensorsRequest(_message.Message):
    __slots__ = ("digest", "offset", "data")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    data: bytes
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadTensorsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeWeightsRequest(_message.Message):
    __slots__ = ("weights_id",)
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    weights_id: bytes
    def __init__(self, weights_id: _Optional[bytes] = ...) -> None: ...

class DescribeWeightsResponse(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: WeightsManifest
    def __init__(self, manifest: _Optional[_Union[WeightsManifest, _Mapping]] = ...) -> None: ...

class DownloadTensorRequest(_message.Message):
    __slots__ = ("weights_id", "leaf", "offset")
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    weights_id: bytes
    leaf: int
    offset: int
    def __init__(self, weights_id: _Optional[bytes] = ..., leaf: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class DownloadTensorResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class LeaseWeightsRequest(_message.Message):
    __slots__ = ("weights_id", "lease_id", "ttl_s")
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    weights_id: bytes
    lease_id: bytes
    ttl_s: float
    def __init__(self, weights_id: _Optional[bytes] = ..., lease_id: _Optional[bytes] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class LeaseWeightsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeleteWeightsRequest(_message.Message):
    __slots__ = ("weights_id",)
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    weights_id: bytes
    def __init__(self, weights_id: _Optional[bytes] = ...) -> None: ...

class DeleteWeightsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CombineWeightsRequest(_message.Message):
    __slots__ = ("terms", "float64", "integers_of_first")
    TERMS_FIELD_NUMBER: _ClassVar[int]
    FLOAT64_FIELD_NUMBER: _ClassVar[int]
    INTEGERS_OF_FIRST_FIELD_NUMBER: _ClassVar[int]
    terms: _containers.RepeatedCompositeFieldContainer[WeightsTerm]
    float64: bool
    integers_of_first: bool
    def __init__(self, terms: _Optional[_Iterable[_Union[WeightsTerm, _Mapping]]] = ..., float64: bool = ..., integers_of_first: bool = ...) -> None: ...

class WeightsTerm(_message.Message):
    __slots__ = ("weights_id", "coefficient")
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    weights_id: bytes
    coefficient: float
    def __init__(self, weights_id: _Optional[bytes] = ..., coefficient: _Optional[float] = ...) -> None: ...

class CombineWeightsResponse(_message.Message):
    __slots__ = ("weights_id",)
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    weights_id: bytes
    def __init__(self, weights_id: _Optional[bytes] = ...) -> None: ...
