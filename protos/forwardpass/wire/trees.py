"""Trees: the containers of structures, flattened to leaves and rebuilt; encoded as `forwardpass.v1.TreeDef`."""

from __future__ import annotations

import collections
import enum
import functools
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, cast

from google.protobuf.message import DecodeError

from forwardpass import v1
from forwardpass.wire import errors
from forwardpass.wire.limits import DEFAULT, Budget, Limits

Nested: TypeAlias = Any
"""A leaf, or a tuple, list, dict, OrderedDict or namedtuple of nested values, or None."""


class Kind(enum.Enum):
    """The kind of a node. The value is the name of its field in TreeDef."""

    LEAF = "leaf"
    TUPLE = "tuple"
    LIST = "list"
    DICT = "dict"
    ORDERED_DICT = "ordered_dict"
    NAMED_TUPLE = "named_tuple"
    NONE = "none"


_SEQUENCES = (Kind.TUPLE, Kind.LIST)
_MAPPINGS = (Kind.DICT, Kind.ORDERED_DICT)


class TreeDef:
    """The containers of one structure. Immutable. Equal if kinds, names and their order are equal.

    kind: the kind of the root.
    names: the keys of a mapping or the fields of a named tuple, in order; () otherwise.
    type_name: the class name of a named tuple; "" otherwise.
    children: the subtrees, in order. Leaves are numbered depth first in this order.
    is_flat: whether every child is a leaf.
    named_tuple_class: creates a named tuple from its items; not compared and not encoded.
    """

    __slots__ = ("__dict__", "children", "is_flat", "kind", "named_tuple_class", "names", "num_leaves", "type_name")

    def __init__(
        self,
        kind: Kind,
        children: Sequence[TreeDef] = (),
        names: Sequence[str] = (),
        type_name: str = "",
        named_tuple_class: Callable[..., Any] | None = None,
    ) -> None:
        self.kind = kind
        self.children = tuple(children)
        self.names = tuple(names)
        self.type_name = type_name
        self.num_leaves: int = 1 if kind is Kind.LEAF else sum(child.num_leaves for child in self.children)
        self.is_flat = all(child.kind is Kind.LEAF for child in self.children)
        self.named_tuple_class = named_tuple_class

    def __eq__(self, other: object) -> bool:
        # Stops at the first difference: comparing any received tree costs no more than comparing the model's own.
        return self is other or (
            isinstance(other, TreeDef)
            and self.kind is other.kind
            and self.names == other.names
            and self.type_name == other.type_name
            and len(self.children) == len(other.children)
            and self.children == other.children
        )

    def __hash__(self) -> int:
        return hash(self.encoded)

    def __repr__(self) -> str:
        return f"TreeDef({self.describe()})"

    def describe(self) -> str:
        """The containers as Python literals, with `*` for a leaf."""
        if self.kind is Kind.LEAF:
            return "*"
        if self.kind is Kind.NONE:
            return "None"
        inner = [child.describe() for child in self.children]
        if self.kind is Kind.LIST:
            return f"[{', '.join(inner)}]"
        if self.kind is Kind.TUPLE:
            return f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"
        if self.kind is Kind.NAMED_TUPLE:
            return f"{self.type_name}({', '.join(map('='.join, zip(self.names, inner, strict=True)))})"
        body = "{" + ", ".join(f"{name!r}: {child}" for name, child in zip(self.names, inner, strict=True)) + "}"
        return body if self.kind is Kind.DICT else f"OrderedDict({body})"

    def keeping(self, kept: Sequence[bool]) -> TreeDef:
        """The same containers with None in place of each leaf whose item of `kept` is false."""
        remaining = iter(kept)

        def of(tree: TreeDef) -> TreeDef:
            if tree.kind is Kind.LEAF:
                return LEAF if next(remaining) else NONE
            children = tuple(map(of, tree.children))
            return TreeDef(tree.kind, children, tree.names, tree.type_name, tree.named_tuple_class)

        return of(self)

    @functools.cached_property
    def encoded(self) -> bytes:
        """The tree as a serialized TreeDef message. Equal trees give equal bytes."""
        return self._message().SerializeToString(deterministic=True)

    def _message(self) -> v1.TreeDef:
        values = [child._message() for child in self.children]
        message = v1.TreeDef()
        node = getattr(message, self.kind.value)
        node.SetInParent()
        if self.kind in _SEQUENCES:
            node.items.extend(values)
        elif self.kind in _MAPPINGS:
            node.keys.extend(self.names)
            node.values.extend(values)
        elif self.kind is Kind.NAMED_TUPLE:
            node.type_name = self.type_name
            node.fields.extend(self.names)
            node.values.extend(values)
        return message

    def unflatten(self, leaves: Sequence[Any]) -> Nested:
        """Rebuilds the structure from its leaves. Raises StructureMismatch for another number of leaves."""
        if len(leaves) != self.num_leaves:
            raise errors.StructureMismatch(
                place="structure", expected=f"{self.num_leaves} leaves", found=f"{len(leaves)}"
            )
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Nested:
        kind = self.kind
        if kind is Kind.LEAF:
            return next(leaves)
        if kind is Kind.NONE:
            return None
        values = [child._build(leaves) for child in self.children]
        if kind is Kind.TUPLE:
            return tuple(values)
        if kind is Kind.LIST:
            return values
        if kind is Kind.NAMED_TUPLE:
            return (self.named_tuple_class or named_tuple_class(self.type_name, self.names))(*values)
        items = zip(self.names, values, strict=True)
        return dict(items) if kind is Kind.DICT else collections.OrderedDict(items)

    def paths(self, root: str) -> list[str]:
        """The path of each leaf as a Python expression: `root[0]['dense']`."""
        if self.kind is Kind.LEAF:
            return [root]
        return [path for index, child in enumerate(self.children) for path in child.paths(self.child_path(root, index))]

    def file_names(self, root: str) -> list[str]:
        """The name of each leaf in an .npz file, its path joined by "/": `root/0/dense`."""
        if self.kind is Kind.LEAF:
            return [root]
        keys = self.names or [str(index) for index in range(len(self.children))]
        return [
            name
            for key, child in zip(keys, self.children, strict=True)
            for name in child.file_names(f"{root}/{key}" if root else key)
        ]

    def child_path(self, path: str, index: int) -> str:
        """The path of child `index` of a tree at `path`."""
        if self.kind in _SEQUENCES:
            return f"{path}[{index}]"
        if self.kind is Kind.NAMED_TUPLE:
            return f"{path}.{self.names[index]}"
        return f"{path}[{self.names[index]!r}]"


LEAF = TreeDef(Kind.LEAF)
NONE = TreeDef(Kind.NONE)


def flatten(
    value: Nested,
    place: str = "structure",
    limits: Limits = DEFAULT,
    is_leaf: Callable[[Any], bool] = lambda value: False,
) -> tuple[TreeDef, list[Any]]:
    """Flattens a structure to its tree and its leaves. Each value that is not a container is a leaf.

    is_leaf: declares further values as leaves.
    Raises StructureMismatch for keys that are not strings and for structures over `limits`.
    """
    leaves: list[Any] = []
    return _flatten(value, place, limits, is_leaf, limits.max_depth, leaves), leaves


def _flatten(
    value: Nested,
    place: str,
    limits: Limits,
    is_leaf: Callable[[Any], bool],
    depth: int,
    leaves: list[Any],
) -> TreeDef:
    if value is None:
        return NONE
    if is_leaf(value) or not isinstance(value, (tuple, list, Mapping)):
        leaves.append(value)
        if len(leaves) > limits.max_leaves:
            raise errors.StructureMismatch(place=place, expected=f"at most {limits.max_leaves} leaves", found="more")
        return LEAF
    if not depth:
        raise errors.StructureMismatch(place=place, expected=f"at most {limits.max_depth} levels", found="more")
    names: Sequence[str] = ()
    items: Sequence[Nested]
    type_name = ""
    if isinstance(value, Mapping):
        kind = Kind.ORDERED_DICT if isinstance(value, collections.OrderedDict) else Kind.DICT
        names, items = list(value), list(value.values())
    elif isinstance(value, list):
        kind, items = Kind.LIST, value
    elif is_named_tuple(value):
        kind, items = Kind.NAMED_TUPLE, value
        names, type_name = value._fields, type(value).__name__
        check_type_name(type_name, place)
    else:
        kind, items = Kind.TUPLE, value
    for name in names:
        check_name(name, place, limits)
    tree = TreeDef(kind, (), names, type_name)
    children = [
        _flatten(item, tree.child_path(place, index), limits, is_leaf, depth - 1, leaves)
        for index, item in enumerate(items)
    ]
    return TreeDef(kind, children, names, type_name, type(value) if kind is Kind.NAMED_TUPLE else None)


def is_named_tuple(value: object) -> TypeGuard[Any]:
    """Whether a value is a named tuple."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def check_name(name: object, place: str, limits: Limits = DEFAULT) -> None:
    """Raises StructureMismatch for a key that cannot be encoded."""
    if not isinstance(name, str):
        raise errors.StructureMismatch(place=place, expected="keys that are strings", found=f"{type(name).__name__}")
    try:
        size_bytes = len(name.encode())
    except UnicodeEncodeError:
        raise errors.StructureMismatch(place=place, expected="keys of valid Unicode", found=ascii(name)[:40]) from None
    if size_bytes > limits.max_name_bytes:
        raise errors.StructureMismatch(
            place=place, expected=f"keys of at most {limits.max_name_bytes} bytes", found=f"{size_bytes}"
        )


def check_type_name(name: str, place: str) -> None:
    """Raises StructureMismatch for an invalid class name of a named tuple."""
    if not name.isidentifier() or keyword.iskeyword(name) or len(name.encode()) > DEFAULT.max_name_bytes:
        raise errors.StructureMismatch(place=place, expected="a named tuple's type name", found=f"{name[:40]!r}")


@functools.lru_cache(maxsize=256)
def named_tuple_class(type_name: str, fields: tuple[str, ...]) -> Callable[..., Any]:
    """The class for named tuples with this name and these fields; cached.

    Its instances can be pickled: the process that unpickles one creates the class in the same way.
    """

    def reduce(self: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return named_tuple, (type_name, fields, tuple(self))

    # Any: mypy would analyse `made = collections.namedtuple(...)` as a definition with literal names.
    namedtuple: Any = collections.namedtuple
    made = namedtuple(type_name, fields)
    made.__reduce__ = reduce
    return cast(Callable[..., Any], made)


def named_tuple(type_name: str, fields: tuple[str, ...], items: Sequence[Any]) -> Any:
    """A named tuple of these items. Pickles refer to this function: keep its name and arguments."""
    return named_tuple_class(type_name, fields)(*items)


# Decoded trees are cached by their bytes: every structure comes with a tree, and there are few different ones. Longer
# trees are not cached: any client can send them, and must not fill the memory.
_CACHED_BYTES = 4096


class _Cache:
    """Decoded trees by their bytes, in two generations: trees that are not used are dropped. Thread-safe."""

    _GENERATION = 512

    def __init__(self) -> None:
        self._young: dict[bytes, TreeDef] = {}
        self._old: dict[bytes, TreeDef] = {}

    def find(self, encoded: bytes) -> TreeDef | None:
        """The tree of these bytes, if it is cached."""
        tree = self._young.get(encoded)
        if tree is None:
            tree = self._old.get(encoded)
            if tree is not None:
                self.keep(encoded, tree)
        return tree

    def keep(self, encoded: bytes, tree: TreeDef) -> None:
        """Caches a tree."""
        if len(self._young) >= self._GENERATION:
            self._young, self._old = {}, self._young
        self._young[encoded] = tree


_cache = _Cache()


def decode(encoded: bytes, place: str = "structure", limits: Limits = DEFAULT, budget: Budget | None = None) -> TreeDef:
    """Decodes a TreeDef message. Equal bytes usually give the same object.

    budget: of the message that holds the tree; a cached tree costs nothing.
    Raises InvalidRequest or StructureMismatch for an invalid tree or one over `limits`, or LimitExceeded.
    """
    is_short = limits is DEFAULT and len(encoded) <= _CACHED_BYTES
    tree = _cache.find(encoded) if is_short else None
    if tree is not None:
        return tree
    if budget is not None:
        budget.take_tree_bytes(len(encoded))
    tree = _decode(encoded, place, limits, budget)
    if is_short:
        _cache.keep(encoded, tree)
    return tree


def _decode(encoded: bytes, place: str, limits: Limits, budget: Budget | None) -> TreeDef:
    if len(encoded) > limits.max_tree_bytes:
        raise errors.StructureMismatch(
            place=place, expected=f"a tree of at most {limits.max_tree_bytes} bytes", found=f"{len(encoded)}"
        )
    message = v1.TreeDef()
    try:
        message.ParseFromString(encoded)
    except DecodeError:
        raise errors.InvalidRequest("malformed tree", place=place) from None
    tree = _from_message(message, place, limits, limits.max_depth, budget)
    if tree.num_leaves > limits.max_leaves:
        raise errors.StructureMismatch(
            place=place, expected=f"at most {limits.max_leaves} leaves", found=f"{tree.num_leaves}"
        )
    return tree


def _from_message(message: v1.TreeDef, place: str, limits: Limits, depth: int, budget: Budget | None) -> TreeDef:
    field = message.WhichOneof("node")
    if field is None:
        raise errors.InvalidRequest("malformed tree: an empty node", place=place)
    kind = Kind(field)
    if kind is Kind.LEAF:
        return LEAF
    if kind is Kind.NONE:
        return NONE
    if not depth:
        raise errors.StructureMismatch(place=place, expected=f"at most {limits.max_depth} levels", found="more")
    node = getattr(message, field)
    names: tuple[str, ...] = ()
    type_name = ""
    values = node.items if kind in _SEQUENCES else node.values
    if budget is not None:
        budget.take_nodes(len(values))
    if kind not in _SEQUENCES:
        names = tuple(node.keys if kind in _MAPPINGS else node.fields)
        if len(names) != len(values) or len(set(names)) != len(names):
            raise errors.StructureMismatch(
                place=place, expected=f"{len(values)} different names", found=f"{len(set(names))} of {len(names)}"
            )
        for name in names:
            check_name(name, place, limits)
    if kind is Kind.NAMED_TUPLE:
        type_name = node.type_name
        check_type_name(type_name, place)
        for name in names:
            # collections.namedtuple rejects these names.
            if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
                raise errors.StructureMismatch(place=place, expected="names of fields", found=f"{name[:40]!r}")
    return TreeDef(kind, [_from_message(value, place, limits, depth - 1, budget) for value in values], names, type_name)
