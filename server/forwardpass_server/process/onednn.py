"""Decides whether TensorFlow uses oneDNN, before TensorFlow is imported."""

from __future__ import annotations

import os

VARIABLE = "TF_ENABLE_ONEDNN_OPTS"

CHOICES = ("auto", "on", "off")


def decide(setting: str) -> str:
    """Sets TensorFlow's environment variable, which it reads at its import, and returns a sentence for the log.

    setting: one of CHOICES. "auto" keeps what the environment says, and otherwise turns oneDNN off: TensorFlow 2.21
    corrupts its heap where oneDNN multiplies a batch of matrices by one matrix (TensorFlow issue 117700), which ends
    the process. What oneDNN gains is in docs/benchmarks.md.
    """
    given = os.environ.get(VARIABLE)
    if setting == "auto":
        if given is not None:
            return f"oneDNN is as the environment says: {VARIABLE}={given}"
        os.environ[VARIABLE] = "0"
        return "oneDNN is off: TensorFlow 2.21 may end the process with it (--onednn on overrides)"
    os.environ[VARIABLE] = "1" if setting == "on" else "0"
    overridden = f", in place of {VARIABLE}={given}" if given not in (None, os.environ[VARIABLE]) else ""
    return f"oneDNN is {setting} (--onednn){overridden}"
