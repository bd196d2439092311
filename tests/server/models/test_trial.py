"""Models tried in a child process before they are served."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

from forwardpass_server import FunctionalModel, functional_model_from_keras
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import tracing, trial_process
from forwardpass_server.models.trial import Trial
from forwardpass_server.models.trial_process import TrialProcess
from support import zoo
from support.servers import wait_until


@pytest.fixture(scope="module")
def trial():
    process = TrialProcess(2)
    yield Trial(process, call_s=30)
    process.close()


def judge(trial: Trial, model: FunctionalModel):
    return trial.judge("m/1", tracing.trace(model), None)


def test_a_model_that_ends_the_process_is_refused_with_function_shape_and_signal(trial):
    place = r"predict_on_batch for training with arguments of shape \[3,1\] ends the process with SIGABRT"
    with pytest.raises(ModelLoadError, match=place):
        judge(trial, zoo.killing())
    # The next model gets a new child process.
    assert judge(trial, zoo.slow()).guard.startswith("tried in a child process on 4 sizes of batch")


def test_a_model_that_does_not_end_is_refused():
    process = TrialProcess(2)
    trial = Trial(process, call_s=3)
    try:
        # The first answer may take long on a busy machine, and is no part of what is tested.
        judge(trial, zoo.slow())
        with pytest.raises(ModelLoadError, match=r"with arguments of shape \[0,3\] does not end within 3 s"):
            judge(trial, zoo.hanging())
    finally:
        process.close()


def test_sizes_that_the_model_accepts_are_found(trial):
    model = keras.Sequential([keras.Input((None, 5)), keras.layers.Conv1D(4, 5)])
    spec = (tf.TensorSpec([None, None, 5], tf.float32), tf.TensorSpec([None, None, 4], tf.float32))
    verdict = judge(trial, functional_model_from_keras(model, "mse", spec))
    assert [shape.other for shape in verdict.found.shapes] == [8, 9]
    assert verdict.found.predicted == [(3, 4, 4)]


def test_functions_that_cannot_be_moved_to_another_process_are_named(trial, caplog):
    guard = judge(trial, zoo.crashing()).guard
    assert "not tried: forward_pass (calls Python), predict_on_batch (calls Python)" in guard
    assert "m/1: not tried in a child process: forward_pass (calls Python)" in caplog.text


def test_every_data_type_reaches_the_child_process_unchanged(trial):
    guard = judge(trial, zoo.every_dtype()).guard
    assert "refused" not in guard
    assert "not tried" not in guard


def test_an_export_contains_the_constants_of_its_model(trial):
    table = tf.constant(np.arange(5, dtype=np.float32))
    model = FunctionalModel(
        initial_weights=((), ()),
        predict_on_batch_fn=tf.function(lambda model_weights, x, training: tf.gather(table, x)),
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        input_spec=(tf.TensorSpec([None], tf.int32), tf.TensorSpec([None], tf.float32)),
    )
    assert "refused" not in judge(trial, model).guard


def test_a_child_process_that_cannot_be_started_fails_no_load(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    verdict = judge(Trial(TrialProcess(2)), zoo.slow())
    assert verdict.guard.startswith("not tried: the child process cannot be used: it cannot be started")
    assert "m/1 was not tried in a child process" in caplog.text


def test_a_child_process_that_is_killed_from_outside_fails_no_load():
    process = TrialProcess(2)
    trial = Trial(process)
    try:
        judge(trial, zoo.slow())
        process._process.send_signal(signal.SIGSTOP)
        process._process.send_signal(signal.SIGKILL)
        process._process.wait()
        # It ended between two models: the next one starts another.
        assert judge(trial, zoo.slow()).guard.startswith("tried")
    finally:
        process.close()


def test_the_child_process_ends_with_its_parent_even_while_it_computes(tmp_path):
    script = """
        import pathlib, sys
        from forwardpass_server.models import tracing
        from forwardpass_server.models.trial import Trial
        from forwardpass_server.models.trial_process import TrialProcess
        from support import zoo
        process = TrialProcess(2)
        trial = Trial(process, call_s=600)
        trial.judge("m/1", tracing.trace(zoo.slow()), None)
        print(process._process.pid, flush=True)
        trial.judge("m/2", tracing.trace(zoo.hanging()), None)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        # Nothing but the result of the script: the child process writes to no stream of its parent's.
        assert parent.stdout.read() == ""
    wait_until(lambda: not pathlib.Path(f"/proc/{child}").exists() or _is_zombie(child))


def _is_zombie(pid: int) -> bool:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_importing_the_process_needs_no_tensorflow():
    code = f"import sys; import {trial_process.__name__}; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
