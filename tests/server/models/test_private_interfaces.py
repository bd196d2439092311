"""Private interfaces of TensorFlow and Keras: where they are used, and what an upgrade that breaks them does."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

import forwardpass_server

ROOT = pathlib.Path(forwardpass_server.__file__).parent
PRIVATE = {"private_tensorflow.py", "private_keras.py", "private_pfor.py"}

# Public although they begin with an underscore; the last is a name of typeshed, for annotations.
PUBLIC = {"_fields", "_replace", "_exit", "_Hash"}

TESTS = str(pathlib.Path(__file__).parents[2])

# Each case breaks one interface, as an upgrade would, in a fork of a process that has imported TensorFlow and not
# started it. It prints the error with which the loader fails; or the warnings, and what a model predicts.
PROGRAM = """
import json, logging, os, sys, warnings
warnings.simplefilter("ignore")
import keras, numpy as np, tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.eager.polymorphic_function import atomic_function
from tensorflow.python.framework import convert_to_constants, function_def_to_graph
from forwardpass.wire.functions import Function
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.errors import UnsupportedLibrary
from forwardpass_server.models import masks, private_tensorflow
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.models.placement import TensorFlowDevice
from forwardpass_server.models.trial_process import TrialProcess


def refuse(*arguments, **options):
    raise TypeError("changed in this version")


def break_eager_tensor():
    # The class itself must go on working for tf.constant: an upgrade would change both.
    private_tensorflow._constructor = lambda: refuse


def break_atomic_function():
    # TensorFlow makes its own with a type.
    made = atomic_function.AtomicFunction.__init__

    def make(self, name, bound_context, function_type, *arguments, **options):
        if function_type is None:
            raise TypeError("changed in this version")
        made(self, name, bound_context, function_type, *arguments, **options)

    atomic_function.AtomicFunction.__init__ = make


def break_atomic_function_module():
    sys.modules["tensorflow.python.eager.polymorphic_function"].__dict__.pop("atomic_function")
    sys.modules["tensorflow.python.eager.polymorphic_function.atomic_function"] = None


def break_kernel_cache():
    del context.Context.clear_kernel_cache


def break_inliner():
    del convert_to_constants._run_inline_graph_optimization


def break_inlining():
    convert_to_constants._run_inline_graph_optimization = lambda concrete, *_, **__: concrete.graph.as_graph_def()


def break_function_bodies():
    del function_def_to_graph.function_def_to_graph_def


def break_calls():
    tf.raw_ops.StatefulPartitionedCall = refuse


def break_definitions():
    del context.Context.add_function_def


def break_seed_generators():
    del keras.Layer._flatten_layers


def break_masks():
    masks.ATTRIBUTE = "_mask_of_keras"


def break_optimizers():
    from keras.src.optimizers.base_optimizer import BaseOptimizer

    del BaseOptimizer._backend_update_step


def break_nothing():
    pass


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def outcome(name, batching, trial):
    lines = Lines()
    logging.getLogger("forwardpass_server").addHandler(lines)
    globals()["break_" + name]()
    process = TrialProcess(1) if trial else None
    try:
        loader = TensorFlowLoader("cpu", batching=batching, trial_process=process)
    except UnsupportedLibrary as error:
        return {"error": str(error)}
    model = loader.load(ModelSource("counting", 1, factory="support.zoo:counting"))
    placed = TensorFlowDevice("/device:CPU:0").place(np.arange(10, dtype=np.float32))
    x = np.arange(3, dtype=np.int32)
    predicted = model.run(Function.PREDICT_ON_BATCH, False, [placed, x])
    reloaded = loader.load(ModelSource("counting", 1, factory="support.zoo:counting"))
    private_tensorflow.clear_kernel_cache()
    again = reloaded.run(Function.PREDICT_ON_BATCH, False, [np.arange(10, dtype=np.float32), x])
    return {
        "warnings": [line for line in lines.lines if "private" in line],
        "predictions": [predicted[0].tolist(), again[0].tolist()],
        "batching": model.description.unbatchable_reason,
    }


for name, batching, trial in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            answer = outcome(name, batching, trial)
        except BaseException as error:
            answer = {"crash": repr(error)}
        with os.fdopen(writing, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        print(file.read(), flush=True)
    os.waitpid(child, 0)
"""

TENSORFLOW, KERAS = "TensorFlow {tensorflow} is not supported: ", "Keras {keras} is not supported: "

# Of (interface, batching, trial): the beginning of the error.
REFUSED = {
    ("inliner", True, False): TENSORFLOW
    + "batching needs its private _run_inline_graph_optimization, which failed (AttributeError: ",
    ("inlining", True, False): TENSORFLOW
    + "batching needs its private _run_inline_graph_optimization, which failed (ValueError: expected a graph without "
    "calls",
    ("calls", False, False): TENSORFLOW
    + "to run a function needs its private StatefulPartitionedCall with a named function, which failed (TypeError: "
    "changed in this version)",
    ("definitions", False, True): TENSORFLOW
    + "the trial of models needs its private Context.add_function_def, which failed (AttributeError: ",
    ("seed_generators", False, False): KERAS + "the list of a model's seed generators failed (AttributeError: ",
    ("optimizers", False, False): KERAS + "an optimizer step on tensors failed (KeyError: '_backend_update_step')",
    ("masks", False, False): KERAS
    + "the mask of a tensor failed (ValueError: a Masking layer sets no attribute _mask_of_keras)",
}

# What operators may switch off instead.
REMEDIES = {"inliner": "--no-batching", "inlining": "--no-batching", "definitions": "--no-trial"}

# Of (interface, batching, trial): the warnings of servers that go on.
SERVED = {
    ("nothing", True, False): [],
    ("inliner", False, False): [],
    ("definitions", True, False): [],
    ("eager_tensor", True, False): [
        "TensorFlow {tensorflow}: the private EagerTensor failed (TypeError: changed in this version): arrays are "
        "copied into tensors by tf.constant, so that calls with large arrays take longer"
    ],
    ("atomic_function", True, False): [
        "TensorFlow {tensorflow}: the private AtomicFunction failed (TypeError: changed in this version): models keep "
        "their graphs, so that each takes about twice the memory"
    ],
    ("atomic_function_module", True, False): [
        "TensorFlow {tensorflow}: the private AtomicFunction failed (ModuleNotFoundError: "
    ],
    ("kernel_cache", True, False): [
        "TensorFlow {tensorflow}: the private Context.clear_kernel_cache failed (AttributeError: "
    ],
    ("function_bodies", True, False): [
        "TensorFlow {tensorflow}: the private function_def_to_graph_def failed (AttributeError: "
    ],
}


@pytest.fixture(scope="module")
def outcomes():
    cases = [*REFUSED, *SERVED]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)],
        env={
            **os.environ,
            "PYTHONPATH": TESTS,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
            "KERAS_BACKEND": "tensorflow",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


def versions() -> dict[str, str]:
    import keras
    import tensorflow as tf

    return {"tensorflow": tf.__version__, "keras": keras.__version__}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_a_server_that_needs_a_broken_interface_does_not_start_and_says_what_to_do(outcomes, case):
    error = outcomes[case]["error"]
    assert error.startswith(REFUSED[case].format(**versions()))
    assert "TensorFlow version that forwardpass[server] asks for" in error
    remedy = REMEDIES.get(case[0])
    assert error.endswith(f", or start the server with {remedy}") if remedy else "start the server with" not in error


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case[0])
def test_a_server_without_an_optional_private_interface_serves_and_logs_the_cost(outcomes, case):
    found = outcomes[case]
    assert "predictions" in found, found
    assert found["predictions"] == [[0, 1, 2]] * 2
    expected = [line.format(**versions()) for line in SERVED[case]]
    assert len(found["warnings"]) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found["warnings"], expected, strict=True))
    assert found["batching"] == ("" if case[1] else "the operator forbids it")


def sources() -> list[pathlib.Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path.name not in PRIVATE]


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_no_other_module_imports_what_is_private_to_a_library():
    seen = 0
    for path in sources():
        for name in imported(ast.parse(path.read_text())):
            if not name.startswith(("tensorflow", "keras")):
                continue
            seen += 1
            private = name.startswith(("tensorflow.python", "tensorflow.core", "keras.src"))
            underscored = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
            assert not private, f"{path}: {name}"
            assert not underscored, f"{path}: {name}"
    assert seen > 20


def test_no_other_module_reads_private_attributes_of_other_objects():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert is_own or node.attr in PUBLIC, f"{path}:{node.lineno}: {node.attr}"
