from forwardpass.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TreeDef(_message.Message):
    __slots__ = ("leaf", "tuple", "list", "dict", "ordered_dict", "named_tuple", "none")
    class Leaf(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Absent(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Sequence(_message.Message):
        __slots__ = ("items",)
        ITEMS_FIELD_NUMBER: _ClassVar[int]
        items: _containers.RepeatedCompositeFieldContainer[TreeDef]
        def __init__(self, items: _Optional[_Iterable[_Union[TreeDef, _Mapping]]] = ...) -> None: ...
    class Mapping(_message.Message):
        __slots__ = ("keys", "values")
        KEYS_FIELD_NUMBER: _ClassVar[int]
        VALUES_FIELD_NUMBER: _ClassVar[int]
        keys: _containers.RepeatedScalarFieldContainer[str]
        values: _containers.RepeatedCompositeFieldContainer[TreeDef]
        def __init__(self, keys: _Optional[_Iterable[str]] = ..., values: _Optional[_Iterable[_Union[TreeDef, _Mapping]]] = ...) -> None: ...
    class NamedTuple(_message.Message):
        __slots__ = ("type_name", "fields", "values")
        TYPE_NAME_FIELD_NUMBER: _ClassVar[int]
        FIELDS_FIELD_NUMBER: _ClassVar[int]
        VALUES_FIELD_NUMBER: _ClassVar[int]
        type_name: str
        fields: _containers.RepeatedScalarFieldContainer[str]
        values: _containers.RepeatedCompositeFieldContainer[TreeDef]
        def __init__(self, type_name: _Optional[str] = ..., fields: _Optional[_Iterable[str]] = ..., values: _Optional[_Iterable[_Union[TreeDef, _Mapping]]] = ...) -> None: ...
    LEAF_FIELD_NUMBER: _ClassVar[int]
    TUPLE_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    DICT_FIELD_NUMBER: _ClassVar[int]
    ORDERED_DICT_FIELD_NUMBER: _ClassVar[int]
    NAMED_TUPLE_FIELD_NUMBER: _ClassVar[int]
    NONE_FIELD_NUMBER: _ClassVar[int]
    leaf: TreeDef.Leaf
    tuple: TreeDef.Sequence
    list: TreeDef.Sequence
    dict: TreeDef.Mapping
    ordered_dict: TreeDef.Mapping
    named_tuple: TreeDef.NamedTuple
    none: TreeDef.Absent
    def __init__(self, leaf: _Optional[_Union[TreeDef.Leaf, _Mapping]] = ..., tuple: _Optional[_Union[TreeDef.Sequence, _Mapping]] = ..., list: _Optional[_Union[TreeDef.Sequence, _Mapping]] = ..., dict: _Optional[_Union[TreeDef.Mapping, _Mapping]] = ..., ordered_dict: _Optional[_Union[TreeDef.Mapping, _Mapping]] = ..., named_tuple: _Optional[_Union[TreeDef.NamedTuple, _Mapping]] = ..., none: _Optional[_Union[TreeDef.Absent, _Mapping]] = ...) -> None: ...

class Structure(_message.Message):
    __slots__ = ("tree", "leaves")
    TREE_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    tree: TreeDef
    leaves: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    def __init__(self, tree: _Optional[_Union[TreeDef, _Mapping]] = ..., leaves: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ...) -> None: ...

class StructureSpec(_message.Message):
    __slots__ = ("tree", "leaves")
    TREE_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    tree: TreeDef
    leaves: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    def __init__(self, tree: _Optional[_Union[TreeDef, _Mapping]] = ..., leaves: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ...) -> None: ...
