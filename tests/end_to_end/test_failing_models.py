"""Models that fail in a call, on a server that goes on."""

from __future__ import annotations

import concurrent.futures
import json
import urllib.request

import keras
import numpy as np
import pytest
from click.testing import CliRunner

import forwardpass_client
from forwardpass_client import errors
from forwardpass_client.cli.commands import forwardpass
from support.servers import ServerProcess

# More floats than any machine has room for addresses.
_ABSURD = 2**46


def test_a_model_that_crashes_or_takes_all_memory_fails_its_own_call_and_no_other():
    factories = [f"--factory={name}=support.zoo:{name}" for name in ("crashing", "greedy", "patient")]
    with ServerProcess(*factories) as server, forwardpass_client.connect(server.address) as client:
        crashing, greedy, patient = map(client.model, ("crashing", "greedy", "patient"))

        def crash() -> None:
            with pytest.raises(errors.InternalError, match=r"the server failed; request [0-9a-f]{16}"):
                crashing.predict_on_batch(((), ()), np.float32([1]))

        def exhaust() -> None:
            with pytest.raises(errors.OutOfMemory):
                greedy.predict_on_batch(((), ()), [_ABSURD])

        def work() -> None:
            assert patient.predict_on_batch(patient.initial_weights, [3]).tolist() == [[6, 7]]

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            # TensorFlow waits ten seconds for memory to come back, on a thread that others may need.
            for done in [pool.submit(one) for one in (exhaust, exhaust, *(crash, work) * 20)]:
                done.result()
        assert crashing.predict_on_batch(((), ()), np.float32([0])).tolist() == [0]
        assert greedy.predict_on_batch(((), ()), [5]).tolist() == [5]
        assert client.is_ready()


def test_a_model_that_would_end_the_server_is_refused_and_descriptions_of_others_show_their_guard():
    factories = [f"--factory={name}=support.zoo:{name}" for name in ("killing", "slow")]
    with (
        ServerProcess(*factories, "--required-models", "none", environment={"FORWARDPASS_TRIAL": "true"}) as server,
        forwardpass_client.connect(server.address) as client,
    ):
        killing, slow = client.models()
        assert killing.state == "failed"
        assert (
            "predict_on_batch for training with arguments of shape [3,1] ends the process with SIGABRT" in killing.error
        )
        assert slow.state == "available"
        shown = CliRunner().invoke(forwardpass, ["describe", server.address, "slow"], env={"COLUMNS": "200"}).output
        assert "tried in a child process on 4 sizes of batch, oneDNN off" in " ".join(shown.split())
        assert server.process.poll() is None


def test_a_mistake_in_a_configuration_is_one_sentence_everywhere(tmp_path):
    folder = tmp_path / "mistaken" / "1"
    folder.mkdir(parents=True)
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(folder / "model.keras")
    spec = {"x": {"dtype": "float32", "shape": [None, 4]}, "y": {"dtype": "float32", "shape": [None, 2]}}
    (folder / "forwardpass.json").write_text(json.dumps({"input_spec": spec, "loss": "no_such_loss"}))
    with ServerProcess("--model-repository", str(tmp_path), "--required-models", "none") as server:
        with forwardpass_client.connect(server.address) as client:
            (found,) = client.models()
        page = urllib.request.urlopen(server.metrics_url.removesuffix("/metrics")).read().decode()
        log = server.wait_for_log("mistaken/1 failed to load: forwardpass.json: ")
    assert found.error.startswith("forwardpass.json: ")
    assert "no_such_loss" in found.error
    assert "no_such_loss" in page
    assert "Traceback" not in log
