"""Every example runs as its docstring says."""

from __future__ import annotations

import ast
import re
import textwrap

import numpy as np
import pytest

import forwardpass_client
from support.environments import ROOT
from support.examples import EXAMPLES, execute, run
from support.servers import ServerProcess


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that examples/digits.py has written a repository into, and what it printed."""
    folder = tmp_path_factory.mktemp("example")
    return folder, execute("examples/digits.py", str(folder))


@pytest.fixture(scope="module")
def repository(written):
    folder, done = written
    assert done.returncode == 0, done.stderr
    return folder


def test_the_digits_example_prints_its_folder_and_nothing_else(written):
    folder, done = written
    assert done.stdout == f"wrote {folder}/digits/1\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    "example, argument",
    [("call_digits.py", "address"), ("evaluate_clients.py", "address"), ("digits.py", "repository")],
)
def test_an_example_without_its_argument_prints_its_usage(example, argument):
    done = execute(f"examples/{example}")
    assert done.returncode == 2
    assert f"usage: {example} [-h] {argument}\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_example_that_is_a_program_is_run_without_arguments_here():
    programs = {path.name for path in EXAMPLES.glob("*.py") if "argparse" in path.read_text()}
    # The demo and federated_averaging.py need none. python_model.py is a module for `--factory` and `export`, and
    # local_server.py is one for other examples.
    assert programs == {"call_digits.py", "evaluate_clients.py", "digits.py", "demo.py", "federated_averaging.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} - programs == {"python_model.py", "local_server.py"}
    assert "sys.argv" not in "".join(path.read_text() for path in EXAMPLES.glob("*.py"))


def test_the_digits_model_is_trained_served_and_evaluated(repository):
    with ServerProcess("--model-repository", str(repository)) as server:
        metrics = ast.literal_eval(run("examples/call_digits.py", server.address))
    # Trained on real data, it knows the digits of writers that it has not seen.
    assert metrics["sparse_categorical_accuracy"] > 0.85


def test_the_weights_of_several_clients_are_evaluated_at_once(repository):
    with ServerProcess("--model-repository", str(repository)) as server:
        one = ast.literal_eval(run("examples/call_digits.py", server.address))["sparse_categorical_accuracy"]
        lines = run("examples/evaluate_clients.py", server.address).splitlines()
    accuracies = [float(re.search(r"sparse_categorical_accuracy (\S+)", line)[1]) for line in lines]
    assert [line.split("  ")[0] for line in lines] == [f"client {seed}" for seed in range(4)]
    # The first has the model's own weights, and the last has the most noise.
    assert accuracies[0] == pytest.approx(one, abs=1e-4)
    assert accuracies[0] > accuracies[3]


def test_the_demo_compares_and_exits_with_0_and_leaves_no_files(tmp_path):
    done = execute("examples/demo.py", TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    shown = done.stdout
    assert "The numbers are equal." in shown
    for function in ("predict_on_batch, training", "forward_pass, inference", "loss", "update_metrics_state"):
        assert function in shown
    commands = [line.strip() for line in shown.splitlines() if line.startswith("  /")]
    assert len(commands) == 3
    assert commands[0].split()[1:] == [str(EXAMPLES / "digits.py"), "models"]
    assert commands[1].endswith("serve --model-repository models")
    assert "forwardpass_client.connect" in commands[2]


def test_the_demo_fails_where_the_numbers_differ(tmp_path):
    # The same demo with a server that scales its predictions: the comparison must notice.
    script = tmp_path / "broken_demo.py"
    script.write_text(
        "import sys; sys.path.insert(0, 'examples')\n"
        "import demo\n"
        "compare = demo.compare\n"
        "class Wrong:\n"
        "    def __init__(self, model): self._model = model\n"
        "    def __getattr__(self, name): return getattr(self._model, name)\n"
        "    def predict_on_batch(self, *a, **k): return self._model.predict_on_batch(*a, **k) * 1.0001\n"
        "demo.compare = lambda local, remote, *rest: compare(local, Wrong(remote), *rest)\n"
        "demo.main()\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = execute(str(script), TMPDIR=str(temporary))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "local and remote differ" in done.stdout
    assert list(temporary.iterdir()) == []


def test_the_python_model_is_served(monkeypatch):
    # Its docstring's command is for the top of the repository.
    monkeypatch.chdir(ROOT)
    with ServerProcess("--factory", "logistic=examples.python_model:logistic_regression") as server:
        with forwardpass_client.connect(server.address) as client:
            model = client.model("logistic")
            x, y = np.float32([[1, 0, 0, 0], [0, 0, 0, -1]]), np.float32([1, 0])
            weights = ((np.float32([2, 0, 0, 3]), 0.0), ())
            output = model.forward_pass(weights, (x, y))
            state = model.initialize_metrics_state()
            state = model.update_metrics_state(state, y, output, sample_weight=[1.0, 3.0])
            assert model.finalize_metrics(state) == {"accuracy": 1.0}
            assert state == {"correct": 4.0, "seen": 4.0}
            expected = -np.log(1 / (1 + np.exp(-np.float32([2, 3])))).mean()
            assert output.loss == pytest.approx(expected, rel=1e-5)


def test_the_readmes_example_is_the_one_that_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = (EXAMPLES / "call_digits.py").read_text()
    data, calls = code[code.index("images, digits") :].split("with forwardpass_client.connect(address) as client:\n")
    for part in (data, textwrap.dedent(calls)):
        assert any(part.strip() in block for block in blocks), part
