"""Models loaded, warmed and hashed."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import textwrap
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire import errors
from forwardpass.wire.description import Function
from forwardpass_server import FunctionalModel
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import examples, hashing, loading, tracing, warming
from forwardpass_server.models.execution import Execution
from support.golden import FOLDER, NAMES


@pytest.fixture(scope="module")
def loader():
    return loading.TensorFlowLoader("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_every_golden_model_is_loaded_with_its_hash(loader, name):
    folder = FOLDER / name / "saved_model"
    model = loader.load(ModelSource(name, 4, folder=folder))
    assert (model.description.identity.name, model.description.identity.version) == (name, 4)
    assert model.description.identity.content_hash == hashing.of_folder(folder)


def test_the_hash_depends_on_contents_names_and_folders(tmp_path):
    def write(files: dict[str, str]) -> bytes:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return hashing.of_folder(folder)

    variants = [
        {"a": "1", "b": "2"},
        {"a": "2", "b": "1"},
        {"a": "12"},
        {"a1": "", "b": "2"},
        {"a": "1", "c/b": "2"},
        {"a": "1b\x001\x002"},
    ]
    assert len({write(files) for files in variants}) == len(variants)
    assert write(variants[0]) == write(dict(reversed(variants[0].items())))


def test_a_factorys_hash_is_the_same_in_every_process():
    script = """
        import sys
        import tensorflow as tf
        from support import zoo
        from forwardpass_server.models import hashing, tracing
        for _ in range(int(sys.argv[1])):  # Other functions before it count on the names of its own.
            tf.function(lambda x: x).get_concrete_function(tf.constant(1))
        print(hashing.of_traced(tracing.trace(zoo.structures())).hex())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    hashes = [subprocess.check_output([*command, count], text=True, stderr=subprocess.DEVNULL) for count in ("0", "7")]
    assert hashes[0] == hashes[1]
    assert len(hashes[0].strip()) == 64


def test_other_weights_or_another_graph_have_another_hash():
    def of(value: float, factor: float) -> bytes:
        @tf.function
        def predict(model_weights, x, training):
            return x * model_weights[0][0] * factor

        spec = tf.TensorSpec([None], tf.float32)
        model = FunctionalModel(
            initial_weights=((np.float32(value),), ()),
            predict_on_batch_fn=predict,
            loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output - label),
            input_spec=(spec, spec),
        )
        return hashing.of_traced(tracing.trace(model))

    assert len({of(1, 1), of(2, 1), of(1, 2)}) == 3
    assert of(1, 1) == of(1, 1)


def test_files_behind_a_linked_folder_count(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "1"
    folder.mkdir()
    (folder / "variables").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    hashes = set()
    for text in ("one", "two"):
        (tmp_path / "elsewhere" / "data").write_text(text)
        hashes.add(hashing.of_folder(folder))
    assert len(hashes) == 2


def test_another_constant_or_another_name_has_another_hash():
    def of(constant: float, name: str) -> bytes:
        captured = tf.constant([constant] * 1000)

        @tf.function
        def predict(model_weights, x, training):
            return {name: x + tf.reduce_sum(captured)}

        spec = tf.TensorSpec([None], tf.float32)
        model = FunctionalModel(
            initial_weights=((), ()),
            predict_on_batch_fn=predict,
            loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output[name] - label),
            input_spec=(spec, spec),
        )
        return hashing.of_traced(tracing.trace(model))

    assert len({of(1.0, "u"), of(2.0, "u"), of(1.0, "v")}) == 3
    assert of(1.0, "u") == of(1.0, "u")


def test_files_that_change_while_they_are_read_are_refused(loader, tmp_path, monkeypatch):
    folder = tmp_path / "1"
    shutil.copytree(FOLDER / NAMES[0] / "saved_model", folder)
    original = tracing.trace

    def trace_and_change(*arguments):
        (folder / "late.txt").write_text("x")
        return original(*arguments)

    monkeypatch.setattr(tracing, "trace", trace_and_change)
    with pytest.raises(ModelLoadError, match="the files changed while they were read"):
        loader.load(ModelSource("m", 1, folder=folder))


def test_a_model_whose_description_clients_cannot_read_is_refused(loader, monkeypatch):
    class Pair(NamedTuple):
        trainable: tuple[np.ndarray, ...]
        non_trainable: tuple[np.ndarray, ...]

    spec = tf.TensorSpec([None], tf.float32)
    model = FunctionalModel(
        initial_weights=Pair((np.float32(1),), ()),
        predict_on_batch_fn=tf.function(lambda model_weights, x, training: x * model_weights[0][0]),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output - label),
        input_spec=(spec, spec),
    )
    monkeypatch.setattr(loading, "from_factory", lambda factory: model)
    with pytest.raises(errors.StructureMismatch, match="weights"):
        loader.load(ModelSource("m", 1, factory="a:b"))


def test_importing_the_loader_does_not_choose_a_device():
    # Once TensorFlow has started, a GPU's memory growth cannot be set any more, nor can this.
    script = """
        import tensorflow as tf
        from forwardpass_server.models import loading
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        print(loading.TensorFlowLoader("cpu:1").device)
    """
    found = subprocess.check_output(
        [sys.executable, "-c", textwrap.dedent(script)], text=True, stderr=subprocess.DEVNULL
    )
    assert found.strip() == "/device:CPU:1"


@pytest.mark.parametrize(
    "factory, error, message",
    [
        ("support.zoo", ModelLoadError, "expected module:function, got 'support.zoo'"),
        ("support.zoo:nothing", ModelLoadError, "support.zoo has no function 'nothing'"),
        ("support.zoo:DTYPES", ModelLoadError, "support.zoo has no function 'DTYPES'"),
        ("support.zoo:keras_batch", TypeError, "examples"),
        ("support.no_such_module:f", ModuleNotFoundError, "no_such_module"),
        ("collections:OrderedDict", ModelLoadError, "returned a OrderedDict, expected a FunctionalModel"),
    ],
)
def test_a_factory_that_returns_no_model_is_refused(factory, error, message):
    with pytest.raises(error, match=re.escape(message)):
        loading.from_factory(factory)


def test_a_factory_is_loaded(loader):
    model = loader.load(ModelSource("slow", 1, factory="support.zoo:slow"))
    assert model.description.format == "factory"
    assert model.run(Function.PREDICT_ON_BATCH, False, [np.int32([5])])[0].tolist() == [5]


def batched(model: FunctionalModel) -> list[bool]:
    traced = tracing.trace(model)
    execution = Execution(traced.functions, "/device:CPU:0")
    found = examples.find(execution, traced.spec, traced.initial_weights)
    spec = warming.with_batched_leaves(execution, found, traced.initial_weights)
    return [leaf.batched for leaf in (*spec.x.leaves, *spec.y.leaves)]


def two_inputs(predict) -> FunctionalModel:
    spec = tf.TensorSpec([None, 2], tf.float32)
    return FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=tf.function(lambda model_weights, x, training: predict(x["a"], x["b"])),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output) + tf.reduce_sum(label),
        input_spec=({"a": spec, "b": spec}, tf.TensorSpec([3], tf.float32)),
    )


def test_inputs_that_must_agree_share_the_batch():
    assert batched(two_inputs(lambda a, b: tf.concat([a, b], 1))) == [True, True, False]


def test_inputs_that_broadcast_do_not_share_the_batch_dimension():
    assert batched(two_inputs(lambda a, b: a + b)) == [False, False, False]


def test_inputs_with_independent_sizes_do_not_share_the_batch_dimension():
    assert batched(two_inputs(lambda a, b: tf.concat([a, b], 0))) == [False, False, False]


def test_independent_groups_of_inputs_do_not_share_a_batch_dimension():
    def predict(model_weights, x, training):
        messages = tf.gather(x["nodes"], x["source"])
        return x["nodes"] + tf.math.unsorted_segment_sum(messages, x["target"], tf.shape(x["nodes"])[0])

    edges = tf.TensorSpec([None], tf.int32)
    model = FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=tf.function(predict),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(tf.concat([output, label[:, None]], 1)),
        input_spec=(
            {"nodes": tf.TensorSpec([None, 2], tf.float32), "source": edges, "target": edges},
            tf.TensorSpec([None], tf.float32),
        ),
    )
    assert batched(model) == [False] * 4


def test_a_model_that_refuses_zeros_is_served(loader, caplog):
    with caplog.at_level(logging.WARNING):
        model = loader.load(ModelSource("picky", 1, factory=f"{__name__}:picky"))
    assert "picky/1: predict_on_batch was not warmed, since it refuses the example batch" in caplog.text
    assert model.run(Function.PREDICT_ON_BATCH, False, [np.float32([2])])[0].tolist() == [2]


def picky() -> FunctionalModel:
    @tf.function
    def predict(model_weights, x, training):
        with tf.control_dependencies([tf.debugging.assert_positive(x)]):
            return tf.identity(x)

    spec = tf.TensorSpec([None], tf.float32)
    return FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=predict,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(label),
        input_spec=(spec, spec),
    )


def test_an_untrusted_keras_file_runs_no_code(tmp_path, loader):
    import json

    import keras

    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Lambda(lambda x: x)])
    model.save(tmp_path / "model.keras")
    spec = {"x": {"dtype": "float32", "shape": [None, 2]}, "y": {"dtype": "float32", "shape": [None, 2]}}
    (tmp_path / "forwardpass.json").write_text(json.dumps({"input_spec": spec, "loss": "mse"}))
    with pytest.raises(ModelLoadError, match=r"model.keras: .*(safe_mode|unsafe)"):
        loader.load(ModelSource("lambda", 1, folder=tmp_path))


def test_files_that_are_broken_are_refused(tmp_path, loader):
    shutil.copytree(FOLDER / "no_metrics" / "saved_model", tmp_path / "1")
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"broken")
    with pytest.raises(Exception, match=r"."):
        loader.load(ModelSource("m", 1, folder=tmp_path / "1"))
