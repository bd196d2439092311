"""The container image: built, run as an orchestrator would run it, and called from outside."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import urllib.request

import pytest
from packaging.utils import canonicalize_name

import forwardpass_client
from support import images
from support.environments import ROOT
from support.manifests import find
from support.pins import pins

pytestmark = pytest.mark.image

# Removed from the image on purpose: see the Dockerfile.
LEFT_OUT = {"libclang"}


def example(*arguments: str) -> str:
    return subprocess.check_output([sys.executable, *arguments], text=True, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    built = images.build(tmp_path_factory.mktemp("image"))
    yield built
    images.remove(built)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    example("examples/digits.py", str(folder))
    # pytest's folders are root's alone.
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def container(image, repository, data):
    with images.start(image, repository, data) as running:
        yield running


def test_the_image_runs_without_a_name_or_a_right_and_says_what_it_is(image):
    config = images.inspect(image)
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["forwardpass-server"]
    assert config["Cmd"] == ["serve"]
    assert config["Healthcheck"]["Test"] == ["CMD", "forwardpass", "health", "127.0.0.1:8500"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert not [name for name in config["Env"] if name.startswith("PIP_")]


def test_the_example_model_is_served_to_a_caller_outside(container):
    metrics = ast.literal_eval(example("examples/call_digits.py", container.address(8500)))
    # Trained on real data, it knows the digits of writers that it has not seen.
    assert metrics["sparse_categorical_accuracy"] > 0.85


def test_prometheus_finds_the_metrics_outside(container):
    with urllib.request.urlopen(f"http://{container.address(9464)}/metrics") as response:
        assert b"grpc_server_started_total" in response.read()


def test_weights_that_are_put_are_kept_on_the_data_volume(container, data):
    with forwardpass_client.connect(container.address(8500)) as client:
        model = client.model("digits")
        handle = model.put_weights(model.initial_weights)
    assert list(data.glob(f"weights/**/*{handle.id}*"))


def test_nothing_else_can_be_written(container):
    for folder in ("/", "/etc", "/models", "/opt/forwardpass", "/var/tmp"):
        done = container.run("touch", f"{folder}/file")
        assert done.returncode == 1
        assert "Read-only file system" in done.stderr
    assert container.run("touch", "/tmp/file").returncode == 0


def test_health_is_checked_by_the_client_in_the_image(container):
    assert container.check_health() == 0
    done = container.run("forwardpass", "health", "127.0.0.1:8500", "--service", "model/digits")
    assert (done.returncode, done.stdout) == (0, "SERVING\n")
    assert container.run("forwardpass", "health", "127.0.0.1:1").returncode == 1


def test_the_image_holds_what_is_pinned_and_its_bill_of_materials_says_so(container):
    bill = json.loads(container.run("cat", "/opt/forwardpass/sbom.cdx.json").stdout)
    assert bill["bomFormat"] == "CycloneDX"
    listed = {canonicalize_name(component["name"]): component["version"] for component in bill["components"]}
    assert bill["metadata"]["component"]["name"] == "forwardpass"
    assert listed == {name: version for name, version in pins("server").items() if name not in LEFT_OUT}


def test_no_compiler_or_installer_is_in_the_environment(container):
    assert container.run("sh", "-c", "command -v cc gcc c++ make").stdout == ""
    assert "No module named pip" in container.run("python", "-m", "pip").stderr


def test_a_pod_of_the_deployment_runs_as_it_is_rendered(image, repository, tmp_path):
    with images.play(image, repository, find("base", "Deployment"), tmp_path) as container:
        done = container.run("forwardpass", "health", "localhost:8500", "--service", "model/digits")
        assert (done.returncode, done.stdout) == (0, "SERVING\n")
        assert container.run("id", "--user").stdout == "65532\n"
        assert container.run("touch", "/tmp/file").returncode == 0
        assert "Read-only file system" in container.run("touch", "/models/file").stderr
        assert container.run("printenv", "FORWARDPASS_DRAIN_DELAY").stdout == "10\n"


# The last one: it ends what the others call.
def test_sigterm_reaches_the_server_which_exits_with_0(container):
    assert container.terminate() == 0
