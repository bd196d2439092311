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
