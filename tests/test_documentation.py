"""Docstrings: every public class and function has one; the SDK's name array shapes and the errors that they raise.

Classes whose methods are documented elsewhere are excused, each with the reason.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping

import pytest

import forwardpass_client
from forwardpass.wire import errors
from forwardpass_client.pipeline import AsyncPipeline, Pipeline
from support.environments import ROOT

PACKAGES = {"forwardpass.wire": "protos", "forwardpass_client": "client", "forwardpass_server": "server"}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

_RPC = "each method is an RPC, which its .proto file documents"
_STORE = "each method is documented in sessions.store.SessionStore"
_MODEL = "each method is documented in model_api.FunctionalModelApi"

EXCUSED = {
    "forwardpass_client.async_model.AsyncRemoteFunctionalModel": _MODEL,
    "forwardpass_client.model.RemoteFunctionalModel": _MODEL,
    "forwardpass_server.rpc.health.HealthServicer": _RPC,
    "forwardpass_server.rpc.management_servicer.ManagementServicer": _RPC,
    "forwardpass_server.rpc.servicer.FunctionalModelServicer": _RPC,
    "forwardpass_server.rpc.sessions_servicer.SessionsServicer": _RPC,
    "forwardpass_server.rpc.weights_servicer.WeightsServicer": _RPC,
    "forwardpass_server.sessions.stores.memory.MemorySessionStore": _STORE,
    "forwardpass_server.sessions.stores.redis.RedisSessionStore": _STORE,
    "forwardpass_server.sessions.stores.sqlite.SqliteSessionStore": _STORE,
}
"""Classes whose methods need no docstring, with the reason."""


def modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    """The modules of a package, by their full names."""
    root = ROOT / PACKAGES[package]
    for path in sorted((root / package.replace(".", "/")).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def definitions(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, ast.AST]]:
    """Every class, method and function of a module that is public, by its full name."""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, *FUNCTIONS)) and not child.name.startswith("_"):
            yield f"{name}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{name}.{child.name}")


def inherits(name: str, public: Mapping[str, ast.AST]) -> bool:
    """Whether a method has the docstring of the same method of a base class in its module, which help() then shows."""
    owner, _, method = name.rpartition(".")
    bases = getattr(public.get(owner), "bases", [])
    inherited = [public.get(f"{owner.rpartition('.')[0]}.{getattr(base, 'id', '')}.{method}") for base in bases]
    return any(isinstance(one, FUNCTIONS) and ast.get_docstring(one) for one in inherited)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_class_and_function_has_a_docstring(package):
    public = [one for name, module in modules(package) for one in definitions(module, name)]
    assert len(public) > 100
    by_name = dict(public)
    found = {name for name, node in public if not ast.get_docstring(node) and not inherits(name, by_name)}
    assert {name for name in found if name.rpartition(".")[0] not in EXCUSED} == set()


def test_each_excused_class_exists_and_has_methods_without_docstrings():
    found = {
        name.rpartition(".")[0]
        for package in PACKAGES
        for module_name, module in modules(package)
        for name, node in definitions(module, module_name)
        if not ast.get_docstring(node)
    }
    assert EXCUSED.keys() <= found


ARRAYS = {
    *("model_weights", "batch_input", "x", "batches", "output", "label", "labels", "sample_weight", "mask"),
    *("state", "initial_state", "batch_output"),
}
"""Parameters of the SDK that take arrays, or structures of arrays."""

SHAPE = re.compile(r"\bshapes?\b|\[B\b")

REFERENCE = re.compile(
    r"(?:[Ss]ee|as of|[Aa]s|of the model's|Otherwise as|Arguments as of the model's) `(?:\w+\.)?(\w+)`"
)


CLASSES = [
    *(getattr(forwardpass_client, name) for name in forwardpass_client.__all__),
    Pipeline,
    AsyncPipeline,
]


@functools.cache
def sdk() -> dict[str, Callable[..., object]]:
    """The functions and methods that users of the SDK call, by name."""
    found = {}
    for one in CLASSES:
        if inspect.isfunction(one):
            found[one.__name__] = one
        elif inspect.isclass(one) and one.__module__.startswith("forwardpass_client."):
            for name, method in inspect.getmembers(one, inspect.isfunction):
                # Not what a class inherits from numpy or from Python's exceptions.
                if not name.startswith("_") and method.__module__.startswith("forwardpass_client."):
                    found[f"{one.__name__}.{name}"] = method
    return found


def shown(function: Callable[..., object], depth: int = 2) -> str:
    """The help of a function, and of the functions that it refers to for its arguments."""
    text = inspect.getdoc(function) or ""
    if depth:
        for reference in REFERENCE.findall(text):
            for other, target in sdk().items():
                if other.rpartition(".")[2] == reference and target is not function:
                    text += shown(target, depth - 1)
    return text


def test_every_function_of_the_sdk_that_takes_arrays_gives_their_shapes():
    # A client's `label` is the label of a version.
    functions = {
        name: one
        for name, one in sdk().items()
        if ARRAYS & set(inspect.signature(one).parameters) and not name.startswith(("Client.", "AsyncClient."))
    }
    assert len(functions) > 20
    assert {name for name, one in functions.items() if not SHAPE.search(shown(one))} == set()


def raised(function: ast.AST, helpers: dict[str, ast.AST], visited: frozenset[str] = frozenset()) -> set[str]:
    """The errors of the catalogue that a function raises, itself or in private functions of its module."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = getattr(node.exc.func, "attr", getattr(node.exc.func, "id", ""))
            found |= {name} & errors.CATALOGUE.keys()
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in helpers and name not in visited:
                found |= raised(helpers[name], helpers, visited | {name})
    return found


def named(text: str) -> set[str]:
    """The errors that a docstring covers: those that it names and their subclasses; all if it refers to another."""
    if re.search(r"[Rr]aises? what |[Ee]rrors( and rules)?: see|[Rr]ules and errors: see|[Ee]rrors as of", text):
        return set(errors.CATALOGUE)
    bases = [one for name, one in errors.CATALOGUE.items() if re.search(rf"\b{name}\b", text)]
    covered = {name for name, one in errors.CATALOGUE.items() if issubclass(one, tuple(bases))}
    return covered | (set(errors.CATALOGUE) if "or a subclass" in text and not bases else set())


@pytest.mark.parametrize("package", ["forwardpass.wire", "forwardpass_client"])
def test_every_function_that_raises_an_error_of_the_catalogue_names_it(package):
    found = set()
    for module_name, module in modules(package):
        functions = [node for node in ast.walk(module) if isinstance(node, FUNCTIONS)]
        helpers = {node.name: node for node in functions if node.name.startswith("_") and not node.name.endswith("__")}
        for name, node in definitions(module, module_name):
            if isinstance(node, FUNCTIONS):
                text = ast.get_docstring(node) or ""
                found |= {f"{name}: {error}" for error in raised(node, helpers) - named(text)}
    assert found == set()


def class_help(name: str) -> str:
    """The docstrings of a method's class and of its bases."""
    owners = [one for one in CLASSES if inspect.isclass(one) and one.__name__ == name.partition(".")[0]]
    return "".join(base.__doc__ or "" for owner in owners for base in owner.__mro__)


def test_every_function_of_the_sdk_says_what_it_raises_or_its_class_does():
    helps = {name: shown(one) + class_help(name) for name, one in sdk().items()}
    assert len(helps) > 60
    silent = {name for name, text in helps.items() if not re.search(r"\b([Rr]aises?|may raise)\b", text)}
    assert silent == set()
