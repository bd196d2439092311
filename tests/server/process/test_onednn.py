"""Whether TensorFlow uses oneDNN."""

from __future__ import annotations

import os

import pytest

from forwardpass_server.process import onednn


@pytest.mark.parametrize(
    "setting, given, value, sentence",
    [
        ("auto", None, "0", "oneDNN is off: TensorFlow 2.21 may end the process with it"),
        ("auto", "1", "1", "oneDNN is set by the environment: TF_ENABLE_ONEDNN_OPTS=1"),
        ("auto", "0", "0", "oneDNN is set by the environment: TF_ENABLE_ONEDNN_OPTS=0"),
        ("on", None, "1", "oneDNN is on (--onednn)"),
        ("on", "0", "1", "oneDNN is on (--onednn), in place of TF_ENABLE_ONEDNN_OPTS=0"),
        ("off", "1", "0", "oneDNN is off (--onednn), in place of TF_ENABLE_ONEDNN_OPTS=1"),
        ("off", None, "0", "oneDNN is off (--onednn)"),
    ],
)
def test_the_setting_decides_and_is_reported(setting, given, value, sentence, monkeypatch):
    if given is None:
        monkeypatch.setenv(onednn.VARIABLE, "")
        monkeypatch.delenv(onednn.VARIABLE)
    else:
        monkeypatch.setenv(onednn.VARIABLE, given)
    said = onednn.decide(setting)
    assert said.startswith(sentence)
    assert os.environ[onednn.VARIABLE] == value
