"""The command forwardpass, against the real server."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

from forwardpass_client.cli import npz
from forwardpass_client.cli.commands import forwardpass
from forwardpass_server.access import tokens
from forwardpass_server.access.tokens import Role
from support import zoo
from support.certificates import Signer
from support.golden import golden
from support.servers import ServerProcess


@pytest.fixture
def run(server):
    def run(command: str, *arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(forwardpass, [command, server.address, *map(str, arguments)])
        assert done.exit_code == code, done.output
        return done.output

    return run


def test_models_are_listed_with_their_states(run):
    shown = run("models")
    assert "keras_cnn_emnist_head" in shown
    assert "failed" in shown
    assert "notes.txt" in shown


def test_health_exits_with_0_if_the_server_or_model_is_serving_and_with_1_otherwise(run):
    assert run("health") == "SERVING\n"
    assert run("health", "--service", "model/keras_cnn") == "SERVING\n"
    assert run("health", "--service", "model/broken", code=1) == "NOT_SERVING\n"
    assert "NOT_FOUND" in run("health", "--service", "model/none", code=1)


def test_health_exits_with_1_if_no_server_listens():
    done = CliRunner().invoke(forwardpass, ["health", "127.0.0.1:1", "--timeout", "5"])
    assert done.exit_code == 1
    assert "cannot be reached" in done.output


def test_health_imports_no_tensorflow(server):
    code = (
        "import sys; from click.testing import CliRunner; from forwardpass_client.cli.commands import forwardpass;"
        f"assert CliRunner().invoke(forwardpass, ['health', {server.address!r}]).exit_code == 0;"
        "assert not {'tensorflow', 'keras', 'forwardpass_server'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_is_described(run):
    shown = run("describe", "keras_cnn", "--version", 1)
    assert "keras_cnn/1" in shown
    assert "float32[None,6,6,1]" in shown
    assert "1 available, 2 available" in shown
    assert "loss with sample_weight" in shown
    shown = " ".join(run("describe", "no_metrics").split())
    assert "no: no TFF release saves metrics" in shown


def test_predictions_are_written_and_equal_the_sdks(run, client, tmp_path):
    x, y = zoo.keras_batch(10)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    run("weights", "keras_cnn", "-o", tmp_path / "weights.npz")
    run(
        "predict",
        "keras_cnn",
        "--data",
        tmp_path / "data.npz",
        "-o",
        tmp_path / "out.npz",
        "--batch-size",
        4,
        "--weights",
        tmp_path / "weights.npz",
    )
    model = client.model("keras_cnn")
    expected = model.predict_on_batch(model.initial_weights, x, training=False)
    # Batches of another size are summed in another order: float32's last bits.
    assert np.allclose(np.load(tmp_path / "out.npz")["predictions"], expected, rtol=0, atol=1e-6)
    with np.load(tmp_path / "weights.npz") as weights:
        assert sorted(weights.files)[:2] == ["non_trainable/0", "non_trainable/1"]
        assert np.array_equal(weights["trainable/0"], model.initial_weights[0][0])


def test_no_examples_have_no_predictions_in_a_file_of_exactly_that_name(run, tmp_path):
    np.savez(tmp_path / "data.npz", x=zoo.keras_batch(0)[0])
    run("predict", "keras_cnn", "--data", tmp_path / "data.npz", "-o", tmp_path / "out")
    assert np.load(tmp_path / "out")["predictions"].shape == (0, 5)


def test_weights_are_put_named_fetched_and_deleted(run, client, tmp_path):
    model = client.model("keras_cnn")
    weights = tmp_path / "weights.npz"
    run("weights", "keras_cnn", "-o", weights)
    (weights_id,) = [
        line for line in run("put-weights", "keras_cnn", weights, "--lease", 60).split() if len(line) == 64
    ]
    assert weights_id == model.put_weights(model.initial_weights).id
    x, y = zoo.keras_batch(20)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    run("predict", "keras_cnn", "--data", tmp_path / "data.npz", "-o", tmp_path / "out", "--weights", weights_id)
    expected = model.predict_on_batch(model.initial_weights, x, training=False)
    assert np.allclose(np.load(tmp_path / "out")["predictions"], expected, rtol=0, atol=1e-6)
    run("weights", "keras_cnn", "-o", tmp_path / "again.npz", "--id", weights_id)
    with np.load(weights) as one, np.load(tmp_path / "again.npz") as other:
        assert one.files == other.files
        assert all(np.array_equal(one[name], other[name]) for name in one.files)
    run("delete-weights", "keras_cnn", weights_id)
    shown = run("evaluate", "keras_cnn", "--data", tmp_path / "data.npz", "--weights", weights_id, code=1)
    assert f"does not hold weights {weights_id}" in shown


def test_weights_are_combined_by_their_ids(run, client, tmp_path):
    model = client.model("keras_cnn")
    handle = model.put_weights(model.initial_weights)
    terms = [f"{handle.id}:0.5", f"{handle.id}:-1e0", f"{handle.id}:1"]
    output = run("combine", *terms, "--float64", "--integers", "first", "--save", tmp_path / "half.npz")
    expected = client.combine([(handle, 0.5), (handle, -1), (handle, 1)], float64=True)
    assert output.split()[0] == expected.id
    # A long path may be broken over lines.
    assert f"arraysto{tmp_path / 'half.npz'}" in "".join(output.split())
    with np.load(tmp_path / "half.npz") as file:
        for index, leaf in enumerate(model.initial_weights[0]):
            assert np.array_equal(file[f"trainable/{index}"], leaf * np.float32(0.5))
    for wrong, sentence in (
        ("half", "expected ID:COEFFICIENT such as 00000000...:0.5, got 'half'"),
        (f"{handle.id}:half", "got 'half' as the coefficient"),
        ("ab:1", "weights_id"),
        (f"{'ab' * 32}:1", "does not hold weights"),
        (f"{handle.id}:nan", "expected a finite number"),
    ):
        assert sentence in " ".join(run("combine", wrong, code=1).split())


def test_a_string_that_a_file_would_cut_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names: a string that ends in a NUL"):
        npz.save(tmp_path / "out.npz", {"names": np.array([b"a\0"], object)})


def test_arrays_in_files_are_named_by_the_path_of_their_leaf(run, tmp_path):
    expected = golden("dict_inputs")
    x, _ = expected.batch("")
    np.savez(tmp_path / "data.npz", **{f"x/{name}": value for name, value in x.items()})
    names = ["trainable/0", "trainable/1", "trainable/2"]
    np.savez(tmp_path / "weights.npz", **dict(zip(names, expected.weights()[0], strict=True)))
    run(
        "predict",
        "dict_inputs",
        "--data",
        tmp_path / "data.npz",
        "-o",
        tmp_path / "out.npz",
        "--weights",
        tmp_path / "weights.npz",
    )
    assert np.allclose(np.load(tmp_path / "out.npz")["predictions"], expected.array("predict_infer"), rtol=1e-6)


@pytest.mark.parametrize("examples, batch_sizes", [(5, [2, 2, 1]), (2, [2]), (0, [0])])
def test_predictions_of_whole_batches_have_one_entry_for_each_batch(run, tmp_path, examples, batch_sizes):
    x = np.arange(examples, dtype=np.float32)
    rows = np.repeat(x[:, None], 4, 1)
    np.savez(tmp_path / "data.npz", **{"x/rows": rows, "x/scale": np.float32(2)})
    run("predict", "whole_batch", "--data", tmp_path / "data.npz", "-o", tmp_path / "out.npz", "--batch-size", 2)
    starts = np.cumsum([0, *batch_sizes[:-1]])
    columns = [2 * rows[start : start + size].sum(0) for start, size in zip(starts, batch_sizes, strict=True)]
    # Small whole numbers: exact.
    with np.load(tmp_path / "out.npz") as found:
        assert found["predictions/rows"].tolist() == (2 * rows).tolist()
        assert found["predictions/sum"].tolist() == [column.sum() for column in columns]
        assert found["predictions/columns"].tolist() == [column.tolist() for column in columns]


def test_scalar_predictions_are_written(run, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.float32([1, 2, 3]))
    for batch_size, expected in ((2, [3, 3]), (256, [6])):
        run("predict", "plain_sum", "--data", tmp_path / "data.npz", "-o", tmp_path / "out", "--batch-size", batch_size)
        assert np.load(tmp_path / "out")["predictions"].tolist() == expected


def test_predictions_of_every_dtype_are_written(run, client, tmp_path):
    spec = client.model("every_dtype").input_spec[0]
    arrays = {
        f"x/{name}": np.array([0, 1]).astype(np.float32 if name == "bfloat16" else leaf.dtype)
        for name, leaf in spec.items()
        if name != "string"
    }
    np.savez(tmp_path / "data.npz", **arrays, **{"x/string": np.array([b"a", b"bc"])})
    run("predict", "every_dtype", "--data", tmp_path / "data.npz", "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as found:
        assert found["predictions/string"].tolist() == [b"a", b"bc"]
        assert all(found[f"predictions/{name}"].tolist() == [0, 1] for name in spec if name != "string")


def test_an_evaluation_shows_the_metrics(run, client, tmp_path):
    x, y = zoo.keras_batch(50)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    shown = run("evaluate", "keras_cnn", "--data", tmp_path / "data.npz", "--batch-size", 16)
    model = client.model("keras_cnn")
    output = model.forward_pass(model.initial_weights, (x, y), training=False)
    state = model.update_metrics_state(model.initialize_metrics_state(), y, output)
    accuracy = model.finalize_metrics(state)["sparse_categorical_accuracy"]
    rows = [line.split() for line in shown.splitlines()]
    assert ["sparse_categorical_accuracy", str(accuracy)] in rows
    assert ["examples", "50"] in rows
    assert "examples/s" in shown


def test_several_weights_have_a_row_of_metrics_each(run, client, tmp_path):
    model = client.model("keras_cnn")
    x, y = zoo.keras_batch(50)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    run("weights", "keras_cnn", "-o", tmp_path / "one.npz")
    other = model.put_weights(tuple([leaf * -1 for leaf in part] for part in model.initial_weights))
    arguments = ["--data", tmp_path / "data.npz", "--batch-size", 16, "--weights", tmp_path / "one.npz"]
    with_both = run("evaluate", "keras_cnn", *arguments, "--weights", other.id)
    batches = [(x[start : start + 16], y[start : start + 16]) for start in range(0, 50, 16)]
    rows = [line.split() for line in with_both.splitlines() if "e+" not in line]
    for weights in (model.initial_weights, other):
        expected = [str(value) for value in model.evaluate(weights, batches).values()]
        assert any(row[-3:] == [*expected, "50"] for row in rows), with_both


def test_sample_weights_in_the_file_are_passed_to_the_metrics(run, client, tmp_path):
    x, y, sample_weight = zoo.curves_batch(70, 0)
    np.savez(tmp_path / "data.npz", x=x, y=y, sample_weight=sample_weight)
    shown = run("evaluate", "curves", "--data", tmp_path / "data.npz", "--batch-size", 100)
    model = client.model("curves")
    metrics = model.evaluate(model.initial_weights, [(x, y, sample_weight)])
    rows = [line.split() for line in shown.splitlines()]
    assert all([name, str(value)] in rows for name, value in metrics.items())


class Interrupted:
    """`forwardpass evaluate` as a process of its own, over more examples than it will see. signals: of Ctrl-C."""

    def __init__(self, server, arguments, *, signals: int) -> None:
        command = [sys.executable, "-m", "forwardpass_client.cli", "evaluate", server.address, *map(str, arguments)]
        evaluations = session_updates(server)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while session_updates(server) < evaluations + 100:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
        self.shown, self.errors = process.communicate(timeout=60)
        self.code = process.returncode
        match = re.search(
            r"([\d,]+) of ([\d,]+) examples have counted. To go on:\n  (forwardpass evaluate .*)\n", self.errors
        )
        assert match, self.errors
        self.counted, self.total = (int(match[index].replace(",", "")) for index in (1, 2))
        self.command = shlex.split(match[3])


def session_updates(server) -> float:
    return server.metrics()['forwardpass_session_updates_total{outcome="applied"}']


# The second signal may come when the first has done its work, or be one with it.
@pytest.mark.parametrize("signals, codes", [(1, {130}), (2, {1, 130})])
def test_an_interrupted_evaluation_continues_with_the_command_that_it_prints(server, run, tmp_path, signals, codes):
    examples = 9_000
    x, y = zoo.counting_batch(7, examples)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    np.savez(tmp_path / "other weights.npz", **{"trainable/0": np.ones(10, np.float32)})
    run("weights", "counting", "-o", tmp_path / "one.npz")
    arguments = ["counting", "--data", tmp_path / "data.npz", "--batch-size", 3, "--weights", tmp_path / "one.npz"]
    left = Interrupted(server, [*arguments, "--weights", tmp_path / "other weights.npz"], signals=signals)
    assert left.code in codes
    assert 0 < left.counted < left.total == examples
    assert left.shown == ""
    done = subprocess.run(
        [sys.executable, "-m", "forwardpass_client.cli", *left.command[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    # Of each weights, every example once.
    assert sum(row[-4:] == [str(examples), str(7 * examples), f"{examples:.1f}", str(examples)] for row in rows) == 2
    # It has closed its sessions.
    shown = run(*left.command[1:2], *left.command[3:], code=1)
    assert "was closed" in shown


def test_sessions_continue_only_with_the_same_data_and_weights(run, client, tmp_path):
    model = client.model("counting")
    x, y = zoo.counting_batch(1, 10)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    with model.metrics_session() as session:
        for _ in range(3):
            session.forward_pass(model.initial_weights, (x, y))
        arguments = ["counting", "--data", tmp_path / "data.npz", "--session", session.id]
        assert "has counted 3 batches, but the data have 2" in run("evaluate", *arguments, "--batch-size", 5, code=1)
        shown = run("evaluate", *arguments, "--session", session.id, code=2)
        assert "--session: expected 1, one for each --weights, got 2" in shown
        assert model.metrics_session(session.id).updates == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("evaluate", "no_metrics", "--data", "{}/emnist.npz"), "expected an array 'x'"),
        (("evaluate", "keras_cnn", "--data", "{}/ragged.npz"), "the same number of examples in each array, got [3, 4]"),
        (("predict", "keras_cnn", "--data", "{}/text", "-o", "{}/out"), "expected an .npz file"),
        (("predict", "nonsense", "--data", "{}/ragged.npz", "-o", "{}/out"), "got 'nonsense'"),
        (("predict", "keras_cnn", "--data", "{}/pickled.npz", "-o", "{}/out"), "without pickled objects"),
        (("predict", "keras_cnn", "--data", "{}/cut.npz", "-o", "{}/out"), "expected an .npz file"),
        (("predict", "keras_cnn", "--data", "{}/good.npz", "-o", "/dev/full"), "cannot be written"),
        (("describe", "keras_cnn", "--version", "9"), "got 9"),
        (("predict", "keras_cnn", "--data", "{}/good.npz", "-o", "{}/out", "--weights", "{}/none"), "No such file"),
        (("delete-weights", "keras_cnn", "12"), "weights_id: expected 64 hexadecimal digits"),
    ],
)
def test_errors_of_the_command_line_are_one_line(run, tmp_path, arguments, message):
    np.savez(tmp_path / "emnist.npz", y=[1])
    np.savez(tmp_path / "ragged.npz", x=zoo.keras_batch(3)[0], y=[1, 2, 3, 4])
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    np.savez(tmp_path / "good.npz", x=zoo.keras_batch(3)[0])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-30])
    (tmp_path / "text").write_text("x")
    shown = run(arguments[0], *(argument.format(tmp_path) for argument in arguments[1:]), code=1)
    assert message in shown
    assert len(shown.strip().splitlines()) == 1
    assert shown.strip().startswith("Error: ")


def test_an_unreachable_server_is_reported_in_one_line_with_a_nonzero_exit_status():
    done = subprocess.run(
        [sys.executable, "-m", "forwardpass_client.cli", "models", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The server cannot be reached: check its address")
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_click_the_command_says_what_to_install():
    code = "import sys; sys.modules['click'] = None; from forwardpass_client.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "forwardpass: the command line needs click: pip install 'forwardpass[cli]'\n"


def test_a_server_with_tls_and_tokens_is_called(tmp_path):
    signer = Signer(tmp_path / "signer")
    secret, token = tokens.create("alice", [Role.CALL], None)
    (tmp_path / "tokens").write_text(token.line() + "\n")
    tls = signer.tls("bob")
    (tmp_path / "bob.pem").write_bytes(tls.certificate)
    (tmp_path / "bob.key").write_bytes(tls.key)
    arguments = ("--factory", "slow=support.zoo:slow", *signer.arguments(mutual=True))
    with ServerProcess(*arguments, "--tokens", str(tmp_path / "tokens")) as server:
        call = ["models", server.address, "--ca", str(signer.ca)]
        certificate = ["--cert", str(tmp_path / "bob.pem"), "--key", str(tmp_path / "bob.key")]
        assert "slow" in CliRunner().invoke(forwardpass, [*call, *certificate]).output
        environment = {"FORWARDPASS_TOKEN": secret}
        assert "slow" in CliRunner().invoke(forwardpass, [*call, *certificate], env=environment).output
        refused = CliRunner().invoke(forwardpass, [*call, *certificate, "--token", "nonsense"])
        assert refused.exit_code == 1
        assert refused.output == "Error: the server does not know this token: ask its operator for a valid one\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--token", "secret"), "token: expected tls with it"),
        (("--ca", __file__, "--cert", __file__), "tls: expected a certificate and its key"),
    ],
)
def test_options_that_exclude_each_other_are_refused_in_one_line(arguments, message):
    done = CliRunner().invoke(forwardpass, ["models", "example.org:1", *arguments])
    assert done.exit_code == 1
    assert message in done.output
    assert "secret" not in done.output


def test_every_command_that_calls_a_server_takes_the_connection_options():
    for command in forwardpass.commands.values():
        names = {parameter.name for parameter in command.params}
        assert {"host", "tls", "ca", "cert", "key", "token", "allow_insecure_token"} <= names
