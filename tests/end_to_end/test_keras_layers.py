"""Every public Keras layer, served from a `.keras` file and compared with local Keras."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import forwardpass_client
from support import keras_layers
from support.servers import ServerProcess

# Several servers: one of all models would take longer to start than any other in the tests.
GROUPS = 4
_SORTED = sorted(keras_layers.CASES)
# Group by group: the server of one is ended before the next is started.
NAMES = [name for group in range(GROUPS) for name in _SORTED[group::GROUPS]]

# As a share of the largest number: the served graph fuses operations that run one by one in local Keras.
TOLERANCE = 1e-5


def test_each_public_layer_is_served_or_listed_with_a_reason():
    assert keras_layers.public_layers() == {*keras_layers.CASES, *keras_layers.NOT_SERVED}


def _spec(tensor: Any) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape)}


def _write(folder: pathlib.Path, name: str) -> None:
    """A version folder with the layer's model."""
    keras.utils.set_random_seed(0)
    model = keras_layers.CASES[name].model()
    inputs = [_spec(tensor) for tensor in model.inputs]
    output = model.outputs[0]
    config = {
        "input_spec": {"x": inputs if len(inputs) > 1 else inputs[0], "y": {**_spec(output), "dtype": "float32"}},
        "loss": "mse",
    }
    version = folder / name / "1"
    version.mkdir(parents=True)
    model.save(version / "model.keras")
    (version / "forwardpass.json").write_text(json.dumps(config))


class Servers:
    """One server at a time, over the models of one group."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self._tmp_path_factory = tmp_path_factory
        self._group: int | None = None
        self._running = contextlib.ExitStack()

    def serve(self, group: int) -> None:
        """Ends the server of another group, and starts that of this one."""
        if group == self._group:
            return
        self.close()
        self._group = group
        self.folder = self._tmp_path_factory.mktemp("layers")
        for name in _SORTED[group::GROUPS]:
            _write(self.folder, name)
        server = self._running.enter_context(ServerProcess("--model-repository", str(self.folder)))
        self.client = self._running.enter_context(forwardpass_client.connect(server.address))

    def close(self) -> None:
        self._running.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    found = Servers(tmp_path_factory)
    yield found
    found.close()


def _assert_close(found: Any, local: Any) -> None:
    found, local = np.asarray(found), np.asarray(local)
    assert (found.dtype, found.shape) == (local.dtype, local.shape)
    if found.dtype.kind != "f":
        assert found.tolist() == local.tolist()
        return
    scale = max(float(np.abs(local).max(initial=0)), 1e-6)
    np.testing.assert_allclose(found, local, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_gives_the_numbers_of_local_keras(servers, name):
    servers.serve(_SORTED.index(name) % GROUPS)
    folder, remote = servers.folder, servers.client.model(name)
    local = keras.saving.load_model(folder / name / "1" / "model.keras", compile=False)
    local.compile(loss="mse")
    x = keras_layers.CASES[name].x(np.random.default_rng(1))
    tensors = [tf.convert_to_tensor(one) for one in x] if isinstance(x, list) else tf.convert_to_tensor(x)
    weights = remote.initial_weights

    expected = local(tensors, training=False)
    x = tuple(x) if isinstance(x, list) else x
    _assert_close(remote.predict_on_batch(weights, x, training=False), expected)

    in_training, _ = local.stateless_call(*weights, tensors, training=True)
    found = remote.predict_on_batch(weights, x, training=True)
    if name in {*keras_layers.UNSEEDED, *keras_layers.TRACED_OTHERWISE}:
        assert found.shape == in_training.shape
    else:
        _assert_close(found, in_training)
    assert bool(remote.description.warnings) == (name in keras_layers.TRACED_OTHERWISE)

    y = np.random.default_rng(2).standard_normal(expected.shape, np.float32)
    output = remote.forward_pass(weights, (x, y), training=False)
    _assert_close(output.predictions, expected)
    local(tensors, training=False)  # Collects the losses that layers add to this very call.
    _assert_close(output.loss, local.compute_loss(tensors, y, expected))
