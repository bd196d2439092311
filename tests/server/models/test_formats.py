"""Version folders and the forwardpass.json in them."""

from __future__ import annotations

import json
import shutil

import pytest
import tensorflow as tf

from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import formats, model_config
from support import zoo
from support.golden import FOLDER


@pytest.fixture
def keras_folder(tmp_path):
    zoo.keras_cnn(1).save(tmp_path / "any_name.keras")
    return tmp_path


def write(folder, content) -> None:
    (folder / "forwardpass.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_keras_file_with_its_configuration_is_read(keras_folder):
    write(keras_folder, zoo.KERAS_CONFIG)
    model, format_name, _ = formats.read(keras_folder)
    assert format_name == "keras"
    assert list(model.initialize_metrics_state()) == [
        "sparse_categorical_accuracy",
        "sparse_top_k_categorical_accuracy",
    ]


def test_hidden_files_beside_a_keras_file_are_ignored(keras_folder):
    write(keras_folder, zoo.KERAS_CONFIG)
    for name in ("._any_name.keras", ".DS_Store"):
        (keras_folder / name).write_bytes(b"\0\5\26\7")
    assert formats.read(keras_folder)[1] == "keras"


@pytest.mark.parametrize("name", ["input_spec", "loss"])
def test_a_keras_file_needs_its_configuration(keras_folder, name):
    write(keras_folder, {key: value for key, value in zoo.KERAS_CONFIG.items() if key != name})
    with pytest.raises(ModelLoadError, match=rf"any_name\.keras needs a forwardpass\.json beside it with {name}"):
        formats.read(keras_folder)


@pytest.mark.parametrize(
    "name, format_name",
    [("linear_regression_v052", "tff-0.51"), ("no_metrics", "tff-0.53"), ("linear_regression_head", "tff-head")],
)
def test_the_tff_version_of_a_model_is_recognized(name, format_name):
    assert formats.read(FOLDER / name / "saved_model")[1] == format_name


def test_the_operators_metrics_override_saved_ones(tmp_path):
    shutil.copytree(FOLDER / "keras_cnn_emnist_head" / "saved_model", tmp_path, dirs_exist_ok=True)
    write(tmp_path, {"metrics": {"mine": "SparseCategoricalAccuracy"}})
    assert list(formats.read(tmp_path)[0].initialize_metrics_state()) == ["mine"]


def test_a_setting_without_effect_is_refused(tmp_path):
    shutil.copytree(FOLDER / "no_metrics" / "saved_model", tmp_path, dirs_exist_ok=True)
    write(tmp_path, {"loss": "mse"})
    with pytest.raises(ModelLoadError, match=r"\['loss'\] cannot be set"):
        formats.read(tmp_path)


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["a.keras", "b.keras"]], ids=["nothing", "notes", "two"])
def test_a_folder_without_one_model_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(ModelLoadError, match=r"expected a saved_model\.pb or one \.keras file, found"):
        formats.read(tmp_path)


def test_the_specs_of_a_configuration_are_read():
    config = read_text(
        {
            "input_spec": {
                "x": {"a": {"dtype": "float32", "shape": [None, 2]}, "b": [{"dtype": "string", "shape": []}]},
                "y": {"dtype": "bfloat16", "shape": [3]},
            },
            "sample_weight_spec": {"dtype": "float32", "shape": [None, None]},
        }
    )
    assert config.input_spec == (
        {"a": tf.TensorSpec([None, 2], tf.float32), "b": (tf.TensorSpec([], tf.string),)},
        tf.TensorSpec([3], tf.bfloat16),
    )
    assert config.sample_weight_spec == tf.TensorSpec([None, None], tf.float32)


def read_text(content, tmp="/tmp"):
    import pathlib
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder), content)
        return model_config.read(pathlib.Path(folder) / "forwardpass.json")


X = {"dtype": "float32", "shape": [None]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "expected JSON"),
        ("[]", "expected an object with keys among"),
        ({"losss": "mse"}, r"expected an object with keys among .*, got \['losss'\]"),
        ({"input_spec": [X, X]}, "input_spec: expected an object with keys x and y"),
        ({"input_spec": {"x": X}}, "input_spec: expected an object with keys x and y"),
        ({"input_spec": {"x": X, "y": 3}}, r"input_spec\.y: expected a tensor or a structure, got 3"),
        ({"input_spec": {"x": {"dtype": "float", "shape": []}, "y": X}}, r"input_spec\.x\.dtype: .*got 'float'"),
        ({"input_spec": {"x": [{"a": {**X, "shape": [-1]}}], "y": X}}, r"input_spec\.x\[0\]\.a\.shape: .*got \[-1\]"),
        ({"input_spec": {"x": {**X, "shape": 3}, "y": X}}, r"input_spec\.x\.shape: .*got 3"),
        ({"input_spec": {"x": {**X, "shape": [True]}, "y": X}}, r"input_spec\.x\.shape: .*got \[True\]"),
        ({"vectorize": True}, r'vectorize: expected "exact", "rounding" or false, got True'),
        ({"vectorize": 0}, r'vectorize: expected "exact", "rounding" or false, got 0'),
        ({"vectorize": "always"}, r'vectorize: expected "exact", "rounding" or false, got \'always\''),
        ({"vectorize": ["exact"]}, r"vectorize: expected .*got \['exact'\]"),
    ],
)
def test_an_invalid_configuration_is_refused_with_its_place(content, message):
    with pytest.raises(ModelLoadError, match=rf"^forwardpass\.json: {message}"):
        read_text(content)


def test_no_file_is_an_empty_configuration(tmp_path):
    assert model_config.read(tmp_path / "forwardpass.json") == model_config.ModelConfig()
