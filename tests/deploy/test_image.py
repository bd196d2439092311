"""The container image: built, run as an orchestrator would run it, and called from outside."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import trustme
from packaging.utils import canonicalize_name

import forwardpass_client
from support import images
from support.collectors import SpanCollector
from support.environments import ROOT
from support.manifests import find
from support.pins import pins
from support.servers import wait_until

pytestmark = pytest.mark.image

# Removed from the image on purpose: see the Dockerfile.
LEFT_OUT = {"libclang"}


# Counts a batch in a new session, or resumes one; says which it is, and what it has counted.
COUNT_OR_RESUME = """
import sys, numpy, forwardpass_client
with forwardpass_client.connect("localhost:8500") as client:
    model = client.model("digits")
    session = model.metrics_session(*sys.argv[1:])
    if not sys.argv[1:]:
        batch = numpy.zeros((4, 8, 8, 1), numpy.float32), numpy.zeros(4, numpy.int64)
        session.forward_pass(model.initial_weights, batch)
    print(session.id, session.updates, session.result())
"""


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
def collector():
    # Where a container reaches it, too.
    with SpanCollector("0.0.0.0") as running:
        yield running


@pytest.fixture(scope="module")
def container(image, repository, data, collector):
    endpoint = f"FORWARDPASS_TRACE_ENDPOINT=http://host.containers.internal:{collector.port}"
    with images.start(image, repository, data, "--memory", "2g", "--env", endpoint) as running:
        yield running


def test_the_image_runs_as_an_unnamed_user_without_capabilities_and_has_labels(image):
    config = images.inspect(image)
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["forwardpass-server"]
    assert config["Cmd"] == ["serve"]
    assert config["Healthcheck"]["Test"] == ["CMD", "forwardpass", "health", "127.0.0.1:8500"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert not [name for name in config["Env"] if name.startswith("PIP_")]
    # Debian and Python take 0.2 GB, TensorFlow for CPUs 1.1 GB.
    assert config["Size"] < 1.6e9


def test_the_example_model_is_served_to_a_caller_outside(container):
    metrics = ast.literal_eval(example("examples/call_digits.py", container.address(8500)))
    # Trained on real data, it knows the digits of writers that it has not seen.
    assert metrics["sparse_categorical_accuracy"] > 0.85


def test_prometheus_finds_the_metrics_outside(container):
    with urllib.request.urlopen(f"http://{container.address(9464)}/metrics") as response:
        assert b"grpc_server_started_total" in response.read()


def test_spans_reach_a_collector_outside(container, collector):
    example("examples/call_digits.py", container.address(8500))
    wait_until(lambda: any(span.name == "execute" for span in collector.spans))


def test_weights_use_a_quarter_of_the_containers_memory(container):
    assert "weights: up to 512 MiB on CPU:0, kept in /data/weights\n" in container.lines


def test_sessions_and_weights_are_kept_on_the_data_volume(container, data):
    with forwardpass_client.connect(container.address(8500)) as client:
        model = client.model("digits")
        handle = model.put_weights(model.initial_weights)
        with model.metrics_session() as session:
            session.forward_pass(handle, (np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, np.int64)), training=False)
            assert session.result()
    assert list(data.glob(f"weights/**/*{handle.id}*"))
    assert (data / "sessions.sqlite3").exists()


def test_other_folders_of_the_container_are_read_only(container):
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


def test_the_image_and_its_bill_of_materials_hold_exactly_the_pinned_packages(container):
    bill = json.loads(container.run("cat", "/opt/forwardpass/sbom.cdx.json").stdout)
    assert bill["bomFormat"] == "CycloneDX"
    listed = {canonicalize_name(component["name"]): component["version"] for component in bill["components"]}
    assert bill["metadata"]["component"]["name"] == "forwardpass"
    assert listed == {name: version for name, version in pins("server").items() if name not in LEFT_OUT}


def test_no_compiler_or_installer_is_in_the_environment(container):
    assert container.run("sh", "-c", "command -v cc gcc c++ make").stdout == ""
    assert "No module named pip" in container.run("python", "-m", "pip").stderr


def test_a_pod_of_the_deployment_runs_as_it_is_rendered(image, repository, tmp_path):
    (tmp_path / "data").mkdir()
    volumes = {"models": repository, "data": tmp_path / "data"}
    with images.play(image, find("base", "Deployment"), volumes, tmp_path) as container:
        done = container.run("forwardpass", "health", "localhost:8500", "--service", "model/digits")
        assert (done.returncode, done.stdout) == (0, "SERVING\n")
        assert container.run("id", "--user").stdout == "65532\n"
        assert "Read-only file system" in container.run("touch", "/models/file").stderr
        assert container.run("printenv", "FORWARDPASS_DRAIN_DELAY").stdout == "10\n"


def test_a_session_on_a_volume_survives_its_pod(image, repository, tmp_path):
    (tmp_path / "data").mkdir()
    volumes = {"models": repository, "data": tmp_path / "data"}
    deployment = find("overlays/volume", "Deployment")
    told = ""
    for _ in range(2):
        before = told
        with images.play(image, deployment, volumes, tmp_path) as container:
            done = container.run("python", "-c", COUNT_OR_RESUME, *before.split()[:1])
        assert done.returncode == 0, done.stderr
        told = done.stdout
    assert told == before
    assert told.split()[1] == "1"


def test_with_tls_the_commands_of_the_probes_reach_the_server_and_others_do_not(image, repository, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", common_name="forwardpass")
    for name in ("data", "tls"):
        (tmp_path / name).mkdir()
    authority.cert_pem.write_to_path(tmp_path / "tls" / "ca.crt")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls" / "tls.crt")
    certificate.private_key_pem.write_to_path(tmp_path / "tls" / "tls.key")
    deployment = find("overlays/tls", "Deployment")
    volumes = {"models": repository, "data": tmp_path / "data", "tls": tmp_path / "tls"}
    with images.play(image, deployment, volumes, tmp_path) as container:
        (server,) = deployment["spec"]["template"]["spec"]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            done = container.run(*server[probe]["exec"]["command"])
            assert (done.returncode, done.stdout) == (0, "SERVING\n"), done.stderr
        assert container.run("forwardpass", "health", "localhost:8500").returncode == 1
        assert container.run("forwardpass", "health", "localhost:8500", "--ca", "/tls/ca.crt").returncode == 1


# The last one: it ends what the others call.
def test_sigterm_reaches_the_server_which_exits_with_0(container):
    assert container.terminate() == 0
