"""The thin client beside the oldest and the newest packages that it promises to live with."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import pytest

from support.environments import NEWEST, OLDEST
from support.golden import FOLDER
from support.zoo import DTYPES

PROGRAM = pathlib.Path(__file__).parent / "programs" / "call_golden.py"


@pytest.mark.parametrize("environment", [OLDEST, NEWEST], ids=lambda environment: environment.name)
def test_the_client_gets_the_golden_numbers(server, environment):
    golden = FOLDER / "keras_cnn_emnist_head" / "golden.npz"
    done = subprocess.run(
        [str(environment.python()), str(PROGRAM), server.address, str(golden)],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    if environment is OLDEST:
        assert found["versions"]["protobuf"].startswith("4.25.")
        assert found["versions"]["grpcio"].startswith("1.60.")
        assert found["versions"]["numpy"].startswith("1.25.")
    # Computed by TensorFlow of another release than the server's: float32's last bits.
    assert max(found["worst"].values()) < 1e-6, found["worst"]
    assert found["refused"] == "x: expected float32[None,28,28,1], got float32[4,28,28,0]"
    assert found["not_found"] == "model"
    assert list(found["dtypes"]) == DTYPES
    assert found["dtypes"]["bfloat16"] == "float32"
    assert not {"tensorflow", "keras", "ml_dtypes", "click", "forwardpass_server"} & set(found["modules"])
