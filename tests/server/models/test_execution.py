"""Traced models run on a device."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow as tf

from forwardpass.wire import dtypes, errors
from forwardpass.wire.description import Function
from forwardpass_server.errors import DeviceNotFound
from forwardpass_server.models import device, tracing
from forwardpass_server.models.execution import Execution
from support import zoo


def execution(*functions: tf.function) -> Execution:
    """Runs each function, of float32[None] to one tensor, under the number of its position."""
    concrete = [function.get_concrete_function(tf.TensorSpec([None], tf.float32)) for function in functions]
    keys = list(Function)[: len(functions)]
    return Execution({(key, False): one for key, one in zip(keys, concrete, strict=True)}, "/device:CPU:0")


def run(function, values) -> np.ndarray:
    listed = tf.function(lambda x: [function(x)])
    return execution(listed).run(Function(1), False, [np.float32(values)])[0]


def test_arrays_of_every_dtype_are_returned_unchanged():
    traced = tracing.trace(zoo.every_dtype())
    runner = Execution(traced.functions, "/device:CPU:0")
    arrays = []
    for leaf in traced.spec.x.leaves:
        values = [b"a", b""] if leaf.data_type is dtypes.STRING else [0, 1]
        arrays.append(np.array(values, leaf.dtype))
    found = runner.run(Function.PREDICT_ON_BATCH, False, [np.float32(1), *arrays])
    assert [(one.dtype, one.tolist()) for one in found] == [(other.dtype, other.tolist()) for other in arrays]


def test_a_number_of_any_dtype_is_an_array_without_dimensions():
    for name in zoo.DTYPES:
        if name not in ("string", "bool"):
            found = run(lambda x, name=name: tf.cast(tf.reduce_sum(x), name), [1, 2])
            assert (found.shape, found.dtype.name, int(found.real)) == ((), name, 3)


@pytest.mark.parametrize("offset", [0, 1, 4, 16, 63, 64])
def test_unaligned_arrays_are_read_correctly(offset):
    data = bytes(64 + offset) + np.arange(1000, dtype=np.float32).tobytes()
    askew = np.frombuffer(data, np.float32, 1000, 64 + offset)
    assert run(lambda x: x * 2, askew).tolist() == (np.arange(1000) * 2).tolist()
    runner = execution(tf.function(lambda x: [x * 2]))
    assert runner.run(Function(1), False, [askew])[0].tolist() == (np.arange(1000) * 2).tolist()


def test_an_input_that_is_shared_outlives_the_array_that_was_passed():
    runner = execution(tf.function(lambda x: [x]))
    results = [runner.run(Function(1), False, [np.full(10_000, index, np.float32)])[0] for index in range(50)]
    assert [(float(one.min()), float(one.max())) for one in results] == [(index, index) for index in range(50)]


def refusal(function, values) -> str:
    with pytest.raises(errors.ModelRefusedInput) as caught:
        run(function, values)
    return str(caught.value)


def test_a_refusal_keeps_shapes_and_the_node_but_no_values():
    message = refusal(lambda x: x + tf.ones([7]), [1234.5, 1])
    assert message.startswith("Incompatible shapes: [")
    assert "[2]" in message
    assert "[7]" in message


def test_a_value_out_of_range_is_not_repeated():
    message = refusal(lambda x: tf.gather([1.0, 2.0], tf.cast(x, tf.int32)), [987654])
    assert message.startswith("indices[0] = # is not in [0, 2)")


def test_values_printed_by_a_failed_assertion_are_not_in_the_error():
    def check(x):
        tf.debugging.assert_less(x, 3.0, message="too large")
        return x

    message = refusal(check, [987654])
    assert "too large" in message
    assert "987654" not in message


def to_number(text: bytes) -> errors.ModelRefusedInput:
    function = tf.function(lambda x: [tf.strings.to_number(x)])
    concrete = function.get_concrete_function(tf.TensorSpec([None], tf.string))
    with pytest.raises(errors.ModelRefusedInput) as caught:
        Execution({(Function(1), False): concrete}, "/device:CPU:0").run(Function(1), False, [np.array([text], object)])
    return caught.value


def test_an_error_of_tensorflow_with_bytes_that_are_not_text_is_still_a_refusal():
    assert str(to_number(b"\xff\xfe abc")) == errors.ModelRefusedInput.sentence


def test_a_refusal_that_quotes_a_long_text_is_short():
    assert len(str(to_number(b"[[{{node " * 100_000))) < 5000


def test_too_large_a_result_is_out_of_memory():
    with pytest.raises(errors.OutOfMemory):
        run(lambda x: tf.zeros(tf.cast(x, tf.int64)), [2.0**44])


@pytest.mark.parametrize("wanted", ["tpu", "cpu:x", "", "gpu:99", "cpu:99"])
def test_a_missing_device_is_refused(wanted):
    with pytest.raises(DeviceNotFound, match=r"device: expected .*, got " + repr(wanted)):
        device.choose(wanted)


def test_auto_selects_the_cpu_without_a_gpu():
    assert device.choose("auto") in ("/device:CPU:0", "/device:GPU:0")


def test_tensorflow_uses_so_many_cores_unless_its_own_variables_say_otherwise():
    script = """
        import os, sys, tensorflow as tf
        from forwardpass_server.models import device
        device.use_cores(int(sys.argv[1]))
        tf.function(tf.linalg.matmul)(tf.ones([300, 300]), tf.ones([300, 300]))
        print(len(os.listdir("/proc/self/task")))
    """

    def threads(cores: int, **variables: str) -> int:
        command = [sys.executable, "-c", textwrap.dedent(script), str(cores)]
        return int(subprocess.check_output(command, text=True, env={**os.environ, **variables}))

    alone = threads(1)
    # Of each of its two pools.
    assert threads(4) == alone + 2 * 3
    assert threads(4, TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1") == alone


def test_a_model_runs_on_the_device_that_was_chosen():
    # A second logical CPU stands for a second GPU: devices are told apart the same way.
    script = """
        import numpy as np, tensorflow as tf
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        from forwardpass.wire.description import Function
        from forwardpass_server.models import device, execution
        from forwardpass_server.models.execution import Execution
        chosen = device.choose("cpu:1")
        assert chosen == "/device:CPU:1", chosen
        function = tf.function(lambda x: [x * 2]).get_concrete_function(tf.TensorSpec([None], tf.float32))
        devices = []
        call = execution._call
        def recorded(args, Tout, f):
            results = call(args=args, Tout=Tout, f=f)
            devices.extend(tensor.device for tensor in [*args, *results])
            return results
        execution._call = recorded
        runner = Execution({(Function(1), False): function}, chosen)
        assert runner.run(Function(1), False, [np.float32([1, 2])])[0].tolist() == [2, 4]
        assert [name[-5:] for name in devices] == ["CPU:1", "CPU:1"], devices
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
