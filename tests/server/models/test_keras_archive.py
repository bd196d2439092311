"""Compiled .keras files: what they say, custom objects, and the same numbers at each load."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import keras
import pytest
import tensorflow as tf

from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import custom_objects, formats, model_config
from support.keras_outputs import STARS, WEIGHT, X_SPEC, X, labels, two_outputs

FLOAT = tf.float32


def saved(model: keras.Model, folder: pathlib.Path, config: dict | None = None) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "model.keras")
    if config is not None:
        (folder / "forwardpass.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("named", [True, False], ids=["by name", "in a list"])
def test_a_compiled_file_needs_no_configuration_and_equals_model_evaluate(tmp_path, named):
    model = two_outputs(named)
    loss = {"click": "binary_crossentropy", "stars": keras.losses.SparseCategoricalCrossentropy()}
    metrics = {"click": ["AUC", keras.metrics.Precision(name="p")], "stars": ["accuracy"]}
    weights = {"click": 2.0, "stars": 0.5}
    if not named:
        loss, metrics, weights = (list(value.values()) for value in (loss, metrics, weights))
    model.compile("adam", loss=loss, metrics=metrics, loss_weights=weights, weighted_metrics=None)
    made, format_name, _ = formats.read(saved(model, tmp_path))
    assert format_name == "keras"
    y = labels(named)
    stars = tf.TensorSpec([None], tf.int64)
    click = tf.TensorSpec([None, 1], FLOAT)
    assert made.input_spec == (X_SPEC, {"click": click, "stars": stars} if named else (click, stars))
    y = tf.nest.map_structure(lambda leaf: leaf[:, 0] if leaf is STARS else leaf, y)
    expected = model.evaluate(
        X, y if named else list(y), sample_weight=WEIGHT, batch_size=16, verbose=0, return_dict=True
    )
    output = made.forward_pass(made.initial_weights, (X, y), training=False)
    # A graph may sum in another order: last bits of float32.
    assert float(made.loss(output.predictions, y, WEIGHT)) == pytest.approx(expected["loss"], rel=1e-5)
    # compile() counts weights in weighted_metrics alone.
    state = made.update_metrics_state(made.initialize_metrics_state(), y, output, WEIGHT)
    found = {name: float(value) for name, value in made.finalize_metrics(state).items()}
    metrics_of_keras = {name: value for name, value in expected.items() if not name.endswith("loss")}
    assert found == pytest.approx(metrics_of_keras, rel=1e-5)


def one_output() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, "softmax")])


def test_the_configuration_overrides_key_by_key(tmp_path):
    model = one_output()
    model.compile(loss="mse", metrics=["mae"])
    made, _, _ = formats.read(saved(model, tmp_path, {"loss": "sparse_categorical_crossentropy", "metrics": ["AUC"]}))
    assert made.input_spec[1] == tf.TensorSpec([None], tf.int64)
    assert list(made.initialize_metrics_state()) == ["auc"]
    spec = {"x": {"dtype": "float32", "shape": [None, 6]}, "y": {"dtype": "float64", "shape": [None, 3]}}
    made, _, _ = formats.read(saved(model, tmp_path, {"input_spec": spec}))
    assert made.input_spec[1] == tf.TensorSpec([None, 3], tf.float64)
    assert list(made.initialize_metrics_state()) == ["mae"]


@pytest.mark.parametrize(
    "loss, shape",
    [
        ("mse", [None, 3]),
        ("MeanSquaredError", [None, 3]),
        ("categorical_crossentropy", [None, 3]),
        (keras.losses.Huber(delta=2.0), [None, 3]),
        ("sparse_categorical_crossentropy", [None]),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), [None]),
        ("crossentropy", None),
        ("ctc", None),
        ("circle", None),
    ],
)
def test_the_label_spec_is_derived_from_the_loss_if_it_is_unambiguous(tmp_path, loss, shape):
    model = one_output()
    model.compile(loss=loss)
    saved(model, tmp_path)
    if shape is None:
        with pytest.raises(ModelLoadError, match=r"model\.keras needs a forwardpass\.json beside it with input_spec"):
            formats.read(tmp_path)
    else:
        assert formats.read(tmp_path)[0].input_spec == (X_SPEC, tf.TensorSpec([None, *shape[1:]], _dtype(shape)))


def _dtype(shape: list) -> tf.DType:
    return FLOAT if shape[1:] else tf.int64


def test_an_invalid_keras_file_is_refused_by_name(tmp_path):
    (tmp_path / "model.keras").write_text("none")
    with pytest.raises(ModelLoadError, match=r"^model\.keras: not a \.keras file of Keras 3 .*model\.save"):
        formats.read(tmp_path)


def test_a_wrong_loss_in_the_configuration_is_refused_in_one_line(tmp_path):
    model = one_output()
    model.compile(loss="mse")
    saved(model, tmp_path, {"loss": "msee"})
    with pytest.raises(ModelLoadError, match=r"^forwardpass\.json: loss: Could not interpret loss identifier: msee"):
        formats.read(tmp_path)


def with_noise() -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    hidden = keras.layers.RandomRotation(0.2)(keras.layers.RandomFlip()(inputs))
    hidden = keras.layers.Dropout(0.5)(keras.layers.Flatten()(hidden))
    hidden = keras.layers.GaussianNoise(0.1)(keras.layers.Dropout(0.5, seed=3)(hidden))
    model = keras.Model(inputs, keras.layers.Dense(1, "sigmoid")(hidden))
    model.compile(loss="binary_crossentropy", metrics=["AUC", "accuracy"])
    return model


def script(code: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environment or {})}, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_every_load_in_every_process_gives_the_same_weights_names_and_training_predictions(tmp_path):
    saved(with_noise(), tmp_path)
    code = """
        import sys, hashlib, pathlib, numpy as np, keras
        from forwardpass_server.models import formats
        for _ in range(int(sys.argv[2])):  # What a process has made before must not show.
            keras.layers.Dropout(0.5), keras.metrics.AUC()
        for _ in range(2):
            model = formats.read(pathlib.Path(sys.argv[1]))[0]
            weights = model.initial_weights
            x = np.ones((4, 8, 8, 3), np.float32)
            predictions = model.predict_on_batch(weights, x, True)
            digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in (*weights[0], *weights[1])))
            print(digest.hexdigest(), np.asarray(predictions).tolist(), list(model.initialize_metrics_state()))
    """
    lines = [line for count in ("0", "3") for line in script(code, str(tmp_path), count).splitlines()]
    assert len(lines) == 4
    assert len(set(lines)) == 1


def test_default_seeds_differ_between_layers_and_given_seeds_are_kept(tmp_path):
    made, _, _ = formats.read(saved(with_noise(), tmp_path))
    seeds = [int(weight[0]) for weight in made.initial_weights[1] if weight.shape == (2,)]
    assert len(set(seeds)) == len(seeds) == 5
    assert 3 in seeds


SHOP = """
    import keras

    @keras.saving.register_keras_serializable(package="shop")
    class Scale(keras.layers.Layer):
        def __init__(self, factor=1.0, **kwargs):
            super().__init__(**kwargs)
            self.factor = factor

        def call(self, x):
            return x * self.factor

        def get_config(self):
            return {**super().get_config(), "factor": self.factor}

    @keras.saving.register_keras_serializable(package="shop")
    class Pinball(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return keras.ops.maximum(0.9 * (y_true - y_pred), -0.1 * (y_true - y_pred))

    @keras.saving.register_keras_serializable(package="shop")
    class Bias(keras.metrics.Mean):
        def update_state(self, y_true, y_pred, sample_weight=None):
            return super().update_state(y_pred - y_true, sample_weight)

    def model():
        made = keras.Sequential([keras.Input((3,)), Scale(2.0), keras.layers.Dense(1)])
        made.compile(loss=Pinball(), metrics=[Bias(name="bias")])
        return made

    def factory():
        import tensorflow as tf
        from forwardpass_server import functional_model_from_keras
        return functional_model_from_keras(model(), "mse", (tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1])))
"""

LOAD = """
    import json, pathlib, sys
    from forwardpass_server.models.loading import TensorFlowLoader
    from forwardpass_server.calls.model import ModelSource
    asked = json.loads(sys.argv[1])
    loader = TensorFlowLoader("cpu", imports=asked["imports"], factories=asked["factories"])
    for order in asked["order"]:
        source = {"factory": order} if ":" in order else {"folder": pathlib.Path(order)}
        try:
            print(*loader.load(ModelSource("m", 1, **source)).description.spec.metrics.tree.names or ["loaded"])
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
"""

SPECS = {"x": {"dtype": "float32", "shape": [None, 3]}, "y": {"dtype": "float32", "shape": [None, 1]}}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Folders with a module `shop` and a compiled model of it: without a configuration, and with one that names it."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.py").write_text(textwrap.dedent(SHOP))
    code = """
        import shop, sys
        shop.model().save(sys.argv[1])
    """
    for name, config in (("plain", {}), ("named", {"imports": ["shop"]})):
        (folder / name).mkdir()
        (folder / name / "forwardpass.json").write_text(json.dumps({"input_spec": SPECS, **config}))
        script(code, str(folder / name / "model.keras"), environment={"PYTHONPATH": str(folder)})
    return folder


def load(shop: pathlib.Path, *order: str, imports: list[str] | None = None) -> list[str]:
    order = [one if ":" in one else str(shop / one) for one in order]
    asked = {"imports": imports or [], "factories": [one for one in order if ":" in one], "order": order}
    paths = os.pathsep.join([str(shop), os.environ["PYTHONPATH"]])
    return script(LOAD, json.dumps(asked), environment={"PYTHONPATH": paths}).splitlines()


REFUSED = (
    "ModelLoadError: model.keras: the custom class 'Scale' of module shop is not registered: name the module that "
    'registers it by --import MODULE, or by "imports" in forwardpass.json'
)


@pytest.mark.parametrize("order", [("plain", "named", "shop:factory"), ("shop:factory", "named", "plain")])
def test_a_custom_object_is_found_only_by_models_that_name_its_module_in_any_load_order(shop, order):
    found = dict(zip(order, load(shop, *order), strict=True))
    assert found == {"plain": REFUSED, "named": "bias", "shop:factory": "loaded"}


def test_a_module_that_the_operator_imports_is_for_all_models(shop):
    assert load(shop, "plain", imports=["shop"]) == ["bias"]


@pytest.mark.parametrize(
    "name, objects",
    [("loss", {"class_name": "shop>Pinball", "config": {}}), ("metrics", [{"class_name": "shop>Bias", "config": {}}])],
)
def test_a_custom_object_of_the_configuration_is_named_when_it_is_unknown(tmp_path, name, objects):
    model = one_output()
    model.compile(loss="mse")
    saved(model, tmp_path, {name: objects})
    with pytest.raises(
        ModelLoadError, match=r"^forwardpass\.json: the custom \w+ 'shop>\w+' is not registered: .*--imp"
    ):
        formats.read(tmp_path)


def test_a_missing_module_is_refused_by_name(tmp_path):
    saved(one_output(), tmp_path, {"imports": ["no_such_module"]})
    with pytest.raises(
        ModelLoadError, match=r"^forwardpass\.json: imports: module 'no_such_module' cannot be imported"
    ):
        formats.read(tmp_path)


@pytest.mark.parametrize("imports", ["shop", [3], [""]])
def test_imports_are_an_array_of_names(tmp_path, imports):
    (tmp_path / "forwardpass.json").write_text(json.dumps({"imports": imports}))
    with pytest.raises(ModelLoadError, match=r"^forwardpass\.json: imports: expected an array of names of modules"):
        model_config.read(tmp_path / "forwardpass.json")


def test_objects_registered_while_a_model_is_read_stay_registered():
    before = custom_objects.registered()
    with custom_objects.only({}, []):
        assert custom_objects.registered() == {}

        @keras.saving.register_keras_serializable(package="meanwhile")
        class Late(keras.layers.Layer):
            pass

    assert custom_objects.registered() == {**before, "meanwhile>Late": Late}
    del keras.saving.get_custom_objects()["meanwhile>Late"]


def test_settings_of_the_users_home_and_environment_change_nothing(tmp_path):
    (tmp_path / "home" / ".keras").mkdir(parents=True)
    (tmp_path / "home" / ".keras" / "keras.json").write_text(
        json.dumps({"floatx": "float64", "epsilon": 0.1, "backend": "jax", "image_data_format": "channels_first"})
    )
    code = """
        import pathlib, sys
        from forwardpass_server.app import cli
        cli._configure_logging("warning")
        from forwardpass_server.models.loading import TensorFlowLoader
        import keras
        TensorFlowLoader("cpu")
        print(keras.config.backend(), keras.config.floatx(), keras.config.epsilon(), keras.config.image_data_format())
    """
    environment = {"HOME": str(tmp_path / "home"), "KERAS_BACKEND": "jax"}
    assert script(code, environment=environment) == "tensorflow float32 1e-07 channels_last"


def test_another_keras_backend_raises_an_error_that_says_what_to_set():
    code = """
        try:
            from forwardpass_server import functional_model_from_keras
        except ImportError as error:
            print(error)
    """
    # This backend is not installed.
    said = script(code, environment={"KERAS_BACKEND": "torch"})
    assert "set KERAS_BACKEND=tensorflow before Keras is imported" in said
