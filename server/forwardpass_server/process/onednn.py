"""Decides whether TensorFlow uses oneDNN, before TensorFlow is imported."""

from __future__ import annotations

import os

VARIABLE = "TF_ENABLE_ONEDNN_OPTS"

CHOICES = ("auto", "on", "off")


def decide(setting: str) -> str:
    """Sets the environment variable that TensorFlow reads when it is imported. Returns a sentence for the log.

    setting: one of CHOICES. "auto" keeps the value of the environment; without one it turns oneDNN off. The reason:
    with oneDNN, TensorFlow 2.21 corrupts its heap when it multiplies a batch of matrices by one matrix (TensorFlow
    issue 117700), which ends the process. docs/benchmarks.md shows the gain of oneDNN.
    """
    given = os.environ.get(VARIABLE)
    if setting == "auto":
        if given is not None:
            return f"oneDNN is set by the environment: {VARIABLE}={given}"
        os.environ[VARIABLE] = "0"
        return "oneDNN is off: TensorFlow 2.21 may end the process with it (--onednn on overrides)"
    os.environ[VARIABLE] = "1" if setting == "on" else "0"
    overridden = f", in place of {VARIABLE}={given}" if given not in (None, os.environ[VARIABLE]) else ""
    return f"oneDNN is {setting} (--onednn){overridden}"
