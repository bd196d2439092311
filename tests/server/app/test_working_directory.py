"""The working directory's modules, from the installed command as a user types it: no PYTHONPATH, no `python -m`."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import forwardpass_client
from support.servers import START_S

COMMAND = pathlib.Path(sys.executable).parent / "forwardpass-server"

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FORWARDPASS_TRIAL")}

MODEL = """
import multiprocessing

import numpy as np
import sizes
import tensorflow as tf

from forwardpass_server import FunctionalModel


@tf.function
def predict(model_weights, x, training):
    (kernel,), _ = model_weights
    return tf.matmul(x, kernel)


def scaling(width=sizes.width()):
    return FunctionalModel(
        initial_weights=((2 * np.eye(width, dtype=np.float32),), ()),
        predict_on_batch_fn=predict,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output - label),
        input_spec=(tf.TensorSpec([None, width], tf.float32), tf.TensorSpec([None, width], tf.float32)),
    )


def scaling_of_a_child():
    # The spawned process is given the function by its name, and imports its module.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return scaling(pool.apply(sizes.width))
"""


@pytest.fixture
def folder(tmp_path):
    """A working directory with a model's module, one that it imports, and one for `--import`."""
    (tmp_path / "scaling_model.py").write_text(MODEL)
    (tmp_path / "sizes.py").write_text("def width():\n    return 3\n")
    (tmp_path / "scaling_layers.py").write_text("open('imported', 'w').close()\n")
    return tmp_path


def run(folder: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=folder,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_S,
    )


@contextlib.contextmanager
def serving(folder: pathlib.Path, *arguments: str):
    """The address of a server that was started in a folder, once it is ready."""
    process = subprocess.Popen(
        [COMMAND, "serve", "--port", "0", "--metrics-port", "0", "--drain-delay", "0.1", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith(("ready on ", "not ready")):
                break
        assert lines, "the server printed nothing"
        assert lines[-1].startswith("ready on "), "".join(lines)
        yield next(line.removeprefix("listening on ").strip() for line in lines if line.startswith("listening on "))
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_export_finds_a_module_of_the_working_directory_and_installed_packages_first(folder):
    for name in ("random", "logging", "secrets", "click", "grpc", "keras", "numpy", "tensorflow"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working directory was imported')\n")
    done = run(folder, "export", "--import", "scaling_layers", "scaling_model:scaling", "models", "mine")
    assert done.returncode == 0, done.stdout
    assert done.stdout.strip().endswith("wrote models/mine/1")
    assert (folder / "models" / "mine" / "1" / "saved_model.pb").exists()
    assert (folder / "imported").exists()


def test_a_server_and_a_process_that_it_spawns_find_modules_of_the_working_directory(folder):
    with serving(folder, "--factory", "mine=scaling_model:scaling_of_a_child", "--import", "scaling_layers") as address:
        with forwardpass_client.connect(address) as client:
            model = client.model("mine")
            x = np.arange(6, dtype=np.float32).reshape(2, 3)
            np.testing.assert_array_equal(model.predict_on_batch(model.initial_weights, x), 2 * x)
    assert (folder / "imported").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_a_safe_path_does_not_contain_the_working_directory(folder):
    done = run(folder, "export", "scaling_model:scaling", "models", "mine", PYTHONSAFEPATH="1")
    assert done.returncode == 1
    assert "No module named 'scaling_model'" in done.stdout
