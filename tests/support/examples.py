"""Runs examples as a user does."""

from __future__ import annotations

import os
import subprocess
import sys

from support.environments import ROOT

EXAMPLES = ROOT / "examples"

# What a user's shell has not set. The tests set it, and TensorFlow prints less where it is set.
QUIET = "TF_CPP_MIN_LOG_LEVEL"


def execute(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    environment.pop(QUIET, None)
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
        env=environment,
    )


def run(*arguments: str, **variables: str) -> str:
    done = execute(*arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
