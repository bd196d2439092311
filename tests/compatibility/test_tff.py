"""Real TFF, in an environment of its own: it saves models, our server serves them, our client replaces its object."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import pytest

from support.environments import TFF
from support.servers import ServerProcess

PROGRAMS = pathlib.Path(__file__).parent / "programs"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    python = TFF.python()
    output = tmp_path_factory.mktemp("output")

    def run(program: str, *arguments: str) -> str:
        # Into a file: TFF's worker processes outlive the program and would hold a pipe open.
        with (output / program).open("w+") as out, (output / f"{program}.log").open("w+") as log:
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            done = subprocess.run(
                [str(python), str(PROGRAMS / program), *arguments], stdout=out, stderr=log, env=environment, check=False
            )
            log.seek(0)
            assert done.returncode == 0, log.read()[-4000:]
            out.seek(0)
            return out.read()

    return run


def test_a_program_written_for_tff_gets_the_same_numbers_from_our_object(run, tmp_path):
    run("save_models.py", str(tmp_path))
    with ServerProcess("--model-repository", str(tmp_path)) as server:
        found = json.loads(run("call_from_tff.py", server.address, str(tmp_path)).splitlines()[-1])
    assert found["versions"][0] == "0.87.0"
    assert len(found["worst"]) == 2 * 13
    # TensorFlow 2.14 there and 2.21 here: kernels sum in another order. Float32's last bits.
    assert max(found["worst"].values()) < 1e-6, found["worst"]


def test_training_under_a_tape_of_tff_is_that_of_its_own_model(run, tmp_path):
    run("save_models.py", str(tmp_path))
    arguments = ["--model-repository", str(tmp_path), "--factory", "linear=support.trainable_models:linear"]
    with ServerProcess(*arguments) as server:
        found = json.loads(run("train_under_tff.py", server.address, str(tmp_path)).splitlines()[-1])
    assert found["losses"].keys() == found["worst"].keys() == {"dict_inputs", "keras_model"}
    for losses in found["losses"].values():
        assert sum(losses[-3:]) < sum(losses[:3])
    # Gradients differ in float32's last bits, as above; 15 steps add them up.
    assert max(found["worst"].values()) < 1e-5, found["worst"]
    # Quoted in the docstring of forwardpass_client.tensorflow.functional_model.
    assert "Failed to run computation: No OpKernel was registered to support Op 'PyFunc'" in found["refused"]


def test_federated_averaging_of_tff_and_on_a_server_agree(run, tmp_path):
    run("save_models.py", str(tmp_path))
    with ServerProcess("--model-repository", str(tmp_path)) as server:
        found = json.loads(run("federated_averaging.py", server.address).splitlines()[-1])
    # Not closer: TensorFlow 2.14 there and 2.21 here sum in another order, and TFF averages changes of weights where
    # the server averages weights. Both round float32's last bits otherwise, and each round starts from the result.
    assert {name: len(rounds) for name, rounds in found["worst"].items()} == {"dict_inputs": 5, "keras_model": 5}
    assert max(max(rounds) for rounds in found["worst"].values()) < 1e-5, found["worst"]
    # A run that learned nothing would agree too.
    assert min(found["moved"].values()) > 0.05, found["moved"]
