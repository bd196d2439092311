"""Docstrings: every public class and function has one; the SDK's name array shapes and the errors that they raise.

The lists of gaps only shrink: a new gap fails its test, and so does a listed gap that is closed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator

import pytest

import forwardpass_client
from forwardpass.wire import errors
from forwardpass_client.pipeline import AsyncPipeline, Pipeline
from support.environments import ROOT

PACKAGES = {"forwardpass.wire": "protos", "forwardpass_client": "client", "forwardpass_server": "server"}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

_RPC = "each method is an RPC, which its .proto file documents"
_STORE = "each method is documented in sessions.store.SessionStore"

EXCUSED = {
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

WITHOUT_DOCSTRING = {
    "forwardpass.wire.description.ModelIdentity.message",
    "forwardpass.wire.description.ModelSpec.x",
    "forwardpass.wire.description.ModelSpec.y",
    "forwardpass_client.calls.ModelCalls.finalize_metrics",
    "forwardpass_client.calls.ModelCalls.forward_pass",
    "forwardpass_client.calls.ModelCalls.initial_weights",
    "forwardpass_client.calls.ModelCalls.initialize_metrics_state",
    "forwardpass_client.calls.ModelCalls.loss",
    "forwardpass_client.calls.ModelCalls.predict_on_batch",
    "forwardpass_client.calls.ModelCalls.update_metrics_state",
    "forwardpass_client.calls.list_models",
    "forwardpass_client.calls.unready_reasons",
    "forwardpass_client.calls.x_and_y",
    "forwardpass_client.calls_in_flight.CallsInFlight.completed",
    "forwardpass_client.calls_in_flight.CallsInFlight.has_message",
    "forwardpass_client.calls_in_flight.CallsInFlight.next_message",
    "forwardpass_client.cli.evaluation.Evaluation.is_complete",
    "forwardpass_client.evaluation.BatchesInFlight.completed",
    "forwardpass_client.evaluation.BatchesInFlight.fail_all",
    "forwardpass_client.evaluation.BatchesInFlight.has_message",
    "forwardpass_client.evaluation.BatchesInFlight.next_message",
    "forwardpass_client.model.FunctionalModelApi.name",
    "forwardpass_client.replicas.Transports.all",
    "forwardpass_client.session_calls.SessionCalls.session_result",
    "forwardpass_client.session_calls.SessionCalls.session_state",
    "forwardpass_client.session_calls.SessionCalls.update_session",
    "forwardpass_client.session_calls.close_session",
    "forwardpass_client.streams.Future.done",
    "forwardpass_client.streams.Future.set_exception",
    "forwardpass_client.streams.Future.set_result",
    "forwardpass_client.transport.AsyncTransport.close",
    "forwardpass_client.transport.AsyncTransport.is_closed",
    "forwardpass_client.transport.Transport.close",
    "forwardpass_client.transport.Transport.is_closed",
    "forwardpass_client.weights.WeightsHandle",
    "forwardpass_server.app.logs.JsonFormatter.format",
    "forwardpass_server.calls.arrivals.Arrivals.count",
    "forwardpass_server.calls.batching.BatchObserver.batched_calls",
    "forwardpass_server.calls.execution.CallObserver.batch",
    "forwardpass_server.calls.model.LoadedModel.description",
    "forwardpass_server.calls.plans.Servable.plan",
    "forwardpass_server.calls.scheduling.Estimates.is_short",
    "forwardpass_server.models.examples.Runs.run",
    "forwardpass_server.models.functional.FunctionalModel.initial_weights",
    "forwardpass_server.models.functional.FunctionalModel.input_spec",
    "forwardpass_server.models.functional.FunctionalModel.sample_weight_spec",
    "forwardpass_server.models.functional.empty_metrics_state",
    "forwardpass_server.models.functional.noop_finalize_metrics",
    "forwardpass_server.models.functional.noop_update_metrics",
    "forwardpass_server.models.loading.TensorFlowLoader.load",
    "forwardpass_server.models.loading.TensorFlowModel.has_loops",
    "forwardpass_server.models.loading.TensorFlowModel.run",
    "forwardpass_server.models.placement.TensorFlowDevice.fetch",
    "forwardpass_server.models.placement.TensorFlowDevice.place",
    "forwardpass_server.models.placement.TensorFlowDevice.try_out",
    "forwardpass_server.models.trial_child.main",
    "forwardpass_server.sessions.cache.KnownSessions.forget",
    "forwardpass_server.sessions.cache.KnownSessions.keep",
    "forwardpass_server.sessions.stores.refusals.not_found",
    "forwardpass_server.sessions.stores.sqlite_file.SqliteFile.load",
    "forwardpass_server.sessions.stores.sqlite_file.SqliteFile.replace",
}

WITHOUT_SHAPES = {
    "AsyncMetricsSession.open",
    "AsyncPipeline.forward_pass",
    "AsyncPipeline.predict_on_batch",
    "AsyncRemoteFunctionalModel.evaluate",
    "AsyncRemoteFunctionalModel.evaluate_many",
    "AsyncRemoteFunctionalModel.finalize_metrics",
    "AsyncRemoteFunctionalModel.metrics_session",
    "AsyncRemoteFunctionalModel.pipeline",
    "AsyncRemoteFunctionalModel.put_weights",
    "MetricsSession.open",
    "Pipeline.forward_pass",
    "Pipeline.predict_on_batch",
    "RemoteFunctionalModel.evaluate",
    "RemoteFunctionalModel.evaluate_many",
    "RemoteFunctionalModel.finalize_metrics",
    "RemoteFunctionalModel.metrics_session",
    "RemoteFunctionalModel.pipeline",
    "RemoteFunctionalModel.put_weights",
}

WITHOUT_ERRORS = {
    "forwardpass_client.calls.ModelCalls.finalize_metrics: FunctionNotAvailable",
    "forwardpass_client.calls.ModelCalls.finalize_metrics: ModelChanged",
    "forwardpass_client.calls.ModelCalls.forward_pass: FunctionNotAvailable",
    "forwardpass_client.calls.ModelCalls.forward_pass: ModelChanged",
    "forwardpass_client.calls.ModelCalls.initial_weights: ModelChanged",
    "forwardpass_client.calls.ModelCalls.initialize_metrics_state: FunctionNotAvailable",
    "forwardpass_client.calls.ModelCalls.initialize_metrics_state: ModelChanged",
    "forwardpass_client.calls.ModelCalls.loss: FunctionNotAvailable",
    "forwardpass_client.calls.ModelCalls.loss: ModelChanged",
    "forwardpass_client.calls.ModelCalls.loss: StructureMismatch",
    "forwardpass_client.calls.ModelCalls.predict_on_batch: FunctionNotAvailable",
    "forwardpass_client.calls.ModelCalls.predict_on_batch: ModelChanged",
    "forwardpass_client.calls.ModelCalls.update_metrics_state: FunctionNotAvailable",
    "forwardpass_client.calls.ModelCalls.update_metrics_state: ModelChanged",
    "forwardpass_client.calls.ModelCalls.update_metrics_state: StructureMismatch",
    "forwardpass_client.calls.batch_output_values: StructureMismatch",
    "forwardpass_client.calls.get_model: ModelNotFound",
    "forwardpass_client.calls.get_model: ModelVersionNotFound",
    "forwardpass_client.calls.x_and_y: StructureMismatch",
    "forwardpass_client.long_calls.steps: ServerUnavailable",
    "forwardpass_client.session_calls.SessionCalls.merge_into_session: FunctionNotAvailable",
    "forwardpass_client.streams.AsyncStream.submit: CallCancelled",
    "forwardpass_client.streams.Stream.submit: CallCancelled",
    "forwardpass_client.streams.Stream.submit: DeadlineExceeded",
}

WITHOUT_RAISES = {
    "AsyncClient.models",
    "AsyncClient.unready_reasons",
    "AsyncPipeline.close",
    "AsyncPipeline.forward_pass",
    "AsyncPipeline.predict_on_batch",
    "Client.models",
    "Client.unready_reasons",
    "Pipeline.close",
    "Pipeline.forward_pass",
    "Pipeline.predict_on_batch",
}


def compare(gaps: set[str], listed: set[str]) -> None:
    """Fails for gaps that are not listed, and for listed ones that are closed."""
    assert sorted(gaps - listed) == [], "new gaps: close them"
    assert sorted(listed - gaps) == [], "these gaps are closed: take them off the list"


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


def undocumented(package: str) -> set[str]:
    """The public names of a package for which `help` shows nothing: a method shows the text that it inherits."""
    public = {name: node for module_name, module in modules(package) for name, node in definitions(module, module_name)}
    assert len(public) > 100
    classes = {node.name: (name, node) for name, node in public.items() if isinstance(node, ast.ClassDef)}

    def inherits(class_node: ast.ClassDef, method: str) -> bool:
        for base in class_node.bases:
            name, node = classes.get(getattr(base, "id", ""), ("", None))
            if node is not None:
                own = public.get(f"{name}.{method}")
                if (own is not None and ast.get_docstring(own)) or inherits(node, method):
                    return True
        return False

    found = set()
    for name, node in public.items():
        owner = public.get(name.rpartition(".")[0])
        is_inherited = isinstance(owner, ast.ClassDef) and inherits(owner, name.rpartition(".")[2])
        if not ast.get_docstring(node) and not is_inherited:
            found.add(name)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_class_and_function_has_a_docstring(package):
    missing = {name for name in undocumented(package) if name.rpartition(".")[0] not in EXCUSED}
    compare(missing, {name for name in WITHOUT_DOCSTRING if name.startswith(package + ".")})


def test_each_excused_class_exists_and_has_methods_without_docstrings():
    owners = {name.rpartition(".")[0] for package in PACKAGES for name in undocumented(package)}
    assert EXCUSED.keys() <= owners


ARRAYS = {
    *("model_weights", "batch_input", "x", "batches", "output", "label", "labels", "sample_weight", "mask"),
    *("state", "initial_state", "batch_output"),
}
"""Parameters of the SDK that take arrays, or structures of arrays."""

SHAPE = re.compile(r"\bshapes?\b|\[B\b")

REFERENCE = re.compile(r"(?:[Ss]ee|[Aa]s|[Aa]s of|of the model's) `(?:\w+\.)?(\w+)`")
"""A docstring that refers to another function for its arguments."""


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
    compare({name for name, one in functions.items() if not SHAPE.search(shown(one))}, WITHOUT_SHAPES)


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
    compare(found, {one for one in WITHOUT_ERRORS if one.startswith(package + ".")})


def class_help(name: str) -> str:
    """The docstrings of a method's class and of its bases."""
    owners = [one for one in CLASSES if inspect.isclass(one) and one.__name__ == name.partition(".")[0]]
    return "".join(base.__doc__ or "" for owner in owners for base in owner.__mro__)


def test_every_function_of_the_sdk_says_what_it_raises_or_its_class_does():
    helps = {name: shown(one) + class_help(name) for name, one in sdk().items()}
    assert len(helps) > 60
    compare({name for name, text in helps.items() if not re.search(r"\b[Rr]aises?\b", text)}, WITHOUT_RAISES)
