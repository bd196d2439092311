"""Versions that come, change and go in the repository of a real server, under callers."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import threading
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import forwardpass_client
from forwardpass_client import errors
from forwardpass_server import FunctionalModel, save_functional_model
from support.servers import ServerProcess, wait_until


def times(factor: float) -> FunctionalModel:
    """Multiplies by its number, so that versions can be told from one another."""

    @tf.function
    def predict_on_batch(model_weights, x, training):
        return x * tf.constant(factor, tf.float32) * model_weights[0][0]

    zero = {"total": tf.constant(0.0)}
    return FunctionalModel(
        initial_weights=((np.float32(1),), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        metrics_fns=(
            tf.function(lambda: zero),
            tf.function(
                lambda state, labels, batch_output, sample_weight=None: {
                    "total": state["total"] + tf.reduce_sum(batch_output.predictions)
                }
            ),
            lambda state: state,
        ),
        input_spec=(tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


def write(folder: pathlib.Path, version: int, factor: float) -> None:
    """Puts a version there at once, as `mv` does."""
    beside = folder / f".{version}"
    save_functional_model(times(factor), beside)
    if (folder / str(version)).exists():
        shutil.rmtree(folder / str(version))
    beside.rename(folder / str(version))


def label(folder: pathlib.Path, **labels: int) -> None:
    (folder / "forwardpass-versions.json").write_text(json.dumps({"labels": labels}))


def predictions(client: forwardpass_client.Client, weights: Any) -> list[float]:
    """Of version 2; none where it is changed between the look at it and the call."""
    with contextlib.suppress(errors.ModelChanged):
        return client.model("times", 2).predict_on_batch(weights, [3.0]).tolist()
    return []


def test_versions_come_change_and_go_under_callers_that_notice_nothing(tmp_path):
    folder = tmp_path / "times"
    folder.mkdir()
    write(folder, 1, 1)
    label(folder, stable=1)
    with ServerProcess("--model-repository", str(tmp_path), "--repository-poll", "0.2") as server:
        with forwardpass_client.connect(server.address) as client:
            first = client.model("times", label="stable")
            weights = first.initial_weights
            stop, errors_met, calls = threading.Event(), [], []

            def call() -> None:
                with first.metrics_session() as session:
                    try:
                        while not stop.is_set():
                            assert first.predict_on_batch(weights, [3.0]).tolist() == [3]
                            session.forward_pass(weights, ([1.0], [0.0]))
                            calls.append(1)
                        assert session.result() == {"total": len(calls)}
                    except Exception as error:
                        errors_met.append(error)

            caller = threading.Thread(target=call)
            caller.start()

            write(folder, 2, 2)
            label(folder, stable=1, canary=2)
            wait_until(lambda: client.model("times").version == 2, 60)
            second = client.model("times", label="canary")
            assert second.predict_on_batch(weights, [3.0]).tolist() == [6]
            assert [found.labels for found in client.models()] == [("stable",), ("canary",)]

            # Another content under the same name is another model: its client is told.
            write(folder, 2, 5)
            wait_until(lambda: predictions(client, weights) == [15], 60)
            with pytest.raises(errors.ModelChanged):
                second.predict_on_batch(weights, [3.0])

            for file in (folder / "2").glob("*.pb"):
                file.write_bytes(b"broken")
            wait_until(lambda: client.models()[1].error != "", 60)
            assert client.models()[1].state == "available"
            assert client.model("times", 2).predict_on_batch(weights, [3.0]).tolist() == [15]

            shutil.rmtree(folder / "2")
            label(folder, stable=1)
            wait_until(lambda: len(client.models()) == 1, 60)
            with pytest.raises(errors.ModelVersionNotFound, match="label of model 'times': expected one of stable"):
                client.model("times", label="canary")
            before = len(calls)
            wait_until(lambda: len(calls) > before + 5 or bool(errors_met))
            stop.set()
            caller.join(30)
            assert errors_met == []


def test_a_version_and_a_label_are_refused_together(client):
    with pytest.raises(ValueError, match="expected a version or a label, got both"):
        client.model("keras_cnn", 1, label="stable")
    with pytest.raises(errors.ModelVersionNotFound, match="expected none: the model has no labels, got 'stable'"):
        client.model("keras_cnn", label="stable")
