"""Every code block of README, docs and deploy/README runs, in the order in which a reader meets it."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from support import manifests
from support.certificates import Signer
from support.code_blocks import Reader, blocks_of, commands_of, path_with
from support.environments import ROOT
from support.servers import ServerProcess

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    "deploy/README.md",
]

BLOCKS = {page: blocks_of(page, (ROOT / page).read_text()) for page in PAGES}

# Each block that does not run, by its page and first line. A block that is marked is added here, so that it is seen.
NOT_RUN = {
    "README.md": [
        "make demo       # trains a small model on real data, serves ",
    ],
    "CONTRIBUTING.md": [
        "make lint    # format, lint, types, layers, protocol",
    ],
    "docs/design.md": [
        "caller's process                          server process",
        "protos/forwardpass/v1/      .proto files and the Python gene",
    ],
    "docs/reliability.md": [
        "python benchmarks/rolling_restart.py --rounds 2",
        "python benchmarks/rollouts.py",
        "python benchmarks/hot_load.py",
        "python benchmarks/hostile.py",
        "python -m pytest tests/end_to_end/test_hostile_traffic.py --",
        "python benchmarks/memory.py --mib 100 --callers 3",
        "messages = (memory * (1 - 0.1) - base - weights - models) / ",
    ],
    "docs/scaling.md": [
        "forwardpass-server serve --model-repository /models --weight",
    ],
    "docs/security.md": [
        'buf curl --protocol grpc --http2-prior-knowledge -H "authori',
    ],
    "deploy/README.md": [
        "podman build --format docker --tag forwardpass:0.1.0 .",
        "podman build --format docker --tag forwardpass:0.1.0 \\",
        "podman run --rm --entrypoint cat forwardpass:0.1.0 /opt/forw",
        "podman run --detach --name forwardpass --read-only --tmpfs /",
        "cd deploy/prometheus",
        "podman push forwardpass:0.1.0 registry.example.com/forwardpa",
        "kubectl apply --kustomize cluster",
        "sed 's|image: |image: registry.example.com/|' deploy/kuberne",
        "kubectl --namespace forwardpass port-forward deployment/forw",
        "kubectl --namespace monitoring port-forward service/promethe",
        "kubectl --namespace forwardpass create secret generic forwar",
        "kubectl --namespace forwardpass apply edit-last-applied depl",
        "kubectl --namespace forwardpass exec deployment/forwardpass ",
    ],
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A model repository with the digits model."""
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run([sys.executable, str(ROOT / "examples" / "digits.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def server(digits):
    """The server of `make serve`."""
    with ServerProcess("--model-repository", str(digits)) as process:
        yield process


@pytest.fixture
def folder(page, tmp_path, digits):
    """The working directory: a checkout's examples and manifests, a certificate, and the models that the pages name."""
    for part in ("examples", "deploy"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    Signer(tmp_path)
    if page == "deploy/README.md":  # Its first command writes the models.
        return tmp_path
    models = tmp_path / "models"
    for version in ("1", "2"):
        shutil.copytree(digits / "digits" / "1", models / "digits" / version)
    if page == "README.md":  # It writes a forwardpass.json beside each of these.
        shutil.copytree(ROOT / "tests" / "data" / "tff" / "keras_cnn_emnist" / "saved_model", models / "emnist" / "1")
        write_keras_model(models / "mnist" / "1" / "model.keras")
    return tmp_path


def write_keras_model(path: pathlib.Path) -> None:
    import keras

    path.parent.mkdir(parents=True)
    layers = [keras.layers.Input((28, 28, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]
    keras.Sequential(layers).save(path)


def programs(page: str) -> list[pathlib.Path]:
    """The folders of the programs that a page runs and that are not the system's."""
    environment = pathlib.Path(sys.executable).parent
    return [environment, manifests.kubectl().parent] if page == "deploy/README.md" else [environment]


@pytest.mark.parametrize("page", [page for page in PAGES if any("not run" not in b.marks for b in BLOCKS[page])])
def test_the_blocks_of_a_page_run_in_order(page, folder, server):
    environment = {
        **os.environ,
        "PATH": path_with(*programs(page)),
        # Free ports, so that a page may name the default ones.
        "FORWARDPASS_PORT": "0",
        "FORWARDPASS_METRICS_PORT": "0",
        "FORWARDPASS_DRAIN_DELAY": "0",
        # The trial process takes seconds to start. Other tests try models.
        "FORWARDPASS_TRIAL": "false",
        "XDG_STATE_HOME": str(folder / "state"),
    }
    # The commands have to find modules of the working directory by themselves.
    environment.pop("PYTHONPATH", None)
    replacements = {
        "localhost:8500": server.address,
        "localhost:9464/metrics": server.metrics_url.removeprefix("http://"),
    }
    with Reader(folder, replacements, environment) as reader:
        for block in BLOCKS[page]:
            if "not run" not in block.marks:
                reader.run(block)


def test_the_blocks_that_do_not_run_are_listed():
    marked = {page: [b.title for b in blocks if "not run" in b.marks] for page, blocks in BLOCKS.items()}
    assert {page: lines for page, lines in marked.items() if lines} == NOT_RUN


def test_a_block_that_does_not_run_says_why():
    reasons = {
        block.place: block.marks["not run"] for found in BLOCKS.values() for block in found if "not run" in block.marks
    }
    assert reasons
    assert [place for place, reason in reasons.items() if len(reason.split()) < 3] == []


def test_most_blocks_run():
    ran = [block for found in BLOCKS.values() for block in found if "not run" not in block.marks]
    assert {block.page for block in ran} >= {"README.md", "docs/models.md", "docs/processes.md", "docs/security.md"}
    assert {block.language for block in ran} >= {"python", "shell", "json", "yaml", "text"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\n\n    make test\n", "page:3: an indented code block"),
        ("```\nmake test\n```\n", "page:1: expected one of the languages"),
        ("```python no-run\nx\n```\n", "page:1: expected a fence with a language alone"),
        ("<!-- not run: x y z -->\n\ntext\n", "page:3: a mark without a code block"),
        ("<!-- skip -->\n", "page:1: not a mark"),
        ("```shell\nmake test\n", "page: ends within a code block"),
    ],
)
def test_a_block_that_could_escape_the_tests_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        blocks_of("page", text)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nraise KeyError(1)\n```\n",
        "<!-- raises: KeyError -->\n```python\nlist()\n```\n",
        "```shell\nfalse | true\n```\n",
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        '```json\n{"a": 1}\n```\n',
    ],
)
def test_a_block_that_fails_is_found(text, tmp_path):
    blocks = blocks_of("page", text)
    with Reader(tmp_path, {}, dict(os.environ)) as reader:
        for block in blocks[:-1]:
            reader.run(block)
        with pytest.raises(AssertionError, match="page:"):
            reader.run(blocks[-1])


def test_commands_are_read_as_a_shell_reads_them():
    assert commands_of("a \\\n  b\n# c\n\nd\n") == ["a    b", "d"]
