"""Every example runs as its docstring says."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import forwardpass_client
from support.servers import ServerProcess

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    assert run("examples/digits.py", str(folder)).strip() == f"wrote {folder}/digits/1"
    return folder


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
    # The first has the model's own weights; the more noise, the less is known.
    assert accuracies[0] == pytest.approx(one, abs=1e-4)
    assert accuracies[0] > accuracies[3]


def test_the_demo_compares_and_exits_with_0():
    shown = run("examples/demo.py")
    assert "The same numbers." in shown
    for function in ("predict_on_batch, training", "forward_pass, inference", "loss", "update_metrics_state"):
        assert function in shown
    commands = [line.strip() for line in shown.splitlines() if line.startswith("  /")]
    assert len(commands) == 2
    assert "serve --model-repository" in commands[0]
    assert "forwardpass_client.connect" in commands[1]


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
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "local and remote differ" in done.stdout


def test_the_python_model_is_served(monkeypatch):
    with ServerProcess(
        "--factory", "logistic=examples.python_model:logistic_regression", environment={"PYTHONPATH": str(ROOT)}
    ) as server:
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
    start = code.index("with forwardpass_client.connect")
    shown = code[start:].replace("sys.argv[1]", '"localhost:8500"')
    assert any(shown.strip() in block for block in blocks)
