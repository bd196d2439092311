"""The command that loads models without serving them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import keras
import pytest
from click.testing import CliRunner

from forwardpass_server.app.cli import main
from forwardpass_server.models import private_tensorflow
from support.golden import FOLDER

SPEC = {"x": {"dtype": "float32", "shape": [None, 4]}, "y": {"dtype": "float32", "shape": [None, 2]}}


def check(folder, *arguments):
    return CliRunner().invoke(main, ["check", str(folder), "--no-trial", *arguments])


def put(folder, **config):
    folder.mkdir(parents=True)
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(folder / "model.keras")
    (folder / "forwardpass.json").write_text(json.dumps({"input_spec": SPEC, "loss": "mse", **config}))
    return folder


def test_a_version_that_loads_is_described(tmp_path):
    done = check(put(tmp_path / "digits" / "3"))
    assert done.exit_code == 0, done.output
    shown = done.output.splitlines()
    assert "digits/3 loads" in shown
    for line in ("  format: keras", "  x: float32[None,4]", "  batching: yes", "  predict_on_batch: yes"):
        assert line in shown
    assert any(line.startswith("  guard: not tried: the operator forbids it") for line in shown)


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"loss": "no_such_loss"}, "m/1 fails to load: forwardpass.json: "),
        ({"metrics": ["NoSuchMetric"]}, "m/1 fails to load: forwardpass.json: "),
        ({"lost": "mse"}, "m/1 fails to load: forwardpass.json: expected an object with keys among"),
        (
            {"input_spec": {**SPEC, "x": {"dtype": "float32", "shape": [None, 5]}}},
            "m/1 fails to load: forwardpass.json: ",
        ),
        (
            {"input_spec": {**SPEC, "y": {"dtype": "float32", "shape": [None, 3]}}},
            "m/1 fails to load: forwardpass.json: loss: ",
        ),
    ],
)
def test_a_mistake_in_the_configuration_is_one_sentence(config, sentence, tmp_path):
    done = check(put(tmp_path / "m" / "1", **config))
    assert done.exit_code == 1
    (line,) = [line for line in done.output.splitlines() if "fails to load" in line]
    assert line.startswith(sentence)
    assert "Traceback" not in done.output


def test_a_module_that_cannot_be_imported_ends_the_check(tmp_path):
    done = check(put(tmp_path / "m" / "1"), "--import", "no_such_module")
    assert done.exit_code == 1
    assert "--import: module 'no_such_module' cannot be imported (ModuleNotFoundError" in done.output


def test_a_broken_archive_is_named(tmp_path):
    folder = put(tmp_path / "m" / "1")
    (folder / "model.keras").write_bytes(b"no archive")
    done = check(folder)
    assert done.exit_code == 1
    assert "m/1 fails to load: model.keras: " in done.output


def test_a_model_and_a_repository_are_checked_version_by_version(tmp_path):
    shutil.copytree(FOLDER / "linear_regression" / "saved_model", tmp_path / "line" / "1")
    put(tmp_path / "line" / "2", loss="no_such_loss")
    for folder in (tmp_path, tmp_path / "line"):
        done = check(folder)
        assert done.exit_code == 1
        assert "line/1 loads" in done.output
        assert "line/2 fails to load: forwardpass.json: " in done.output


def test_a_folder_without_models_is_refused(tmp_path):
    done = check(tmp_path)
    assert done.exit_code == 1
    assert "expected a version, a model or a repository NAME/VERSION/, found none" in done.output


def test_a_process_checks_with_a_trial(tmp_path):
    folder = put(tmp_path / "m" / "1")
    command = [sys.executable, "-m", "forwardpass_server.app.cli", "check", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "guard: tried in a child process on 4 sizes of batch, oneDNN off" in shown


def test_the_shown_facts_of_a_model_equal_those_that_a_client_sees(tmp_path):
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    masked = keras.Sequential([keras.Input((None,)), keras.layers.Embedding(5, 2, mask_zero=True)])
    masked.save(folder / "model.keras")
    spec = {"x": {"dtype": "float32", "shape": [None, None]}, "y": {"dtype": "float32", "shape": [None, None, 2]}}
    (folder / "forwardpass.json").write_text(json.dumps({"input_spec": spec, "loss": "mse"}))
    done = check(folder)
    assert done.exit_code == 0, done.output
    shown = dict(line.strip().split(": ", 1) for line in done.output.splitlines() if line.startswith("  "))
    assert shown["prediction mask"].startswith("bool[None,None]; loss(output, label) counts masked positions unless")
    assert shown["weights"] == "1 arrays, 10 numbers, 0.00 MiB"


def test_a_tensorflow_without_a_private_interface_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(private_tensorflow, "_failure_of_inlining", lambda: "AttributeError: gone")
    done = check(put(tmp_path / "digits" / "3"))
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.startswith("Error: TensorFlow ")
    assert "batching needs its private _run_inline_graph_optimization, which failed (AttributeError: gone)" in line
