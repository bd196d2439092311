"""The container image, built by buildah over a base of Debian's packages, and run by podman."""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from support.environments import ROOT

_BASE = "localhost/forwardpass-base:bookworm"
_IMAGE = "localhost/forwardpass:test"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_START_S = 120.0

# The image's.
_USER = 65532

# What an index needs to be reached. Paths of this machine, such as pip's constraints, mean nothing in a container.
_PIP_KEYS = ("index-url", "extra-index-url", "proxy", "retries", "timeout", "trusted-host")

# crun, podman's own choice, wants what a machine in a machine may lack, as do limits above the machine's own.
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""


def build(folder: pathlib.Path) -> str:
    """Builds the Dockerfile's image for CPUs. Returns its name. folder: for what the build reads beside."""
    if subprocess.run(["buildah", "inspect", _BASE], capture_output=True, check=False).returncode:
        _build_base(folder)
    (folder / "pip.conf").write_text(_pip_configuration())
    _run(
        *("buildah", "bud", "--isolation", "chroot", "--network", "host"),
        # OCI's own format knows no health checks.
        *("--format", "docker"),
        *("--build-arg", f"BASE={_BASE}", "--tag", _IMAGE),
        *("--secret", f"id=pip.conf,src={folder}/pip.conf", "--secret", f"id=certificates,src={_CERTIFICATES}"),
        str(ROOT),
    )
    return _IMAGE


def remove(image: str) -> None:
    _run("buildah", "rmi", image)


def inspect(image: str) -> dict[str, Any]:
    """The image's configuration, as Docker calls it; its Healthcheck; its Size in bytes."""
    (found,) = json.loads(_run("podman", "image", "inspect", image))
    return {**found["Config"], "Size": found["Size"], "Healthcheck": found["Healthcheck"]}


def _build_base(folder: pathlib.Path) -> None:
    """Debian with Python, the least that the Dockerfile asks of its base."""
    archive = folder / "base.tar"
    include = "--include=ca-certificates,python3,python3-venv"
    _run("mmdebstrap", "--variant=minbase", include, "bookworm", str(archive))
    container = _run("buildah", "from", "scratch").strip()
    _run("buildah", "add", container, str(archive), "/")
    _run("buildah", "commit", "--rm", container, _BASE)
    archive.unlink()


def _pip_configuration() -> str:
    """A pip.conf with which pip in a container reaches the index that pip reaches here."""
    found = {}
    for line in _run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        # "global.index-url" of a file, ":env:.index-url" of the environment, which comes last and has the last word.
        key = name.rpartition(".")[2]
        text = " ".join(word for word in ast.literal_eval(value).split() if not word.startswith(("file:", "/")))
        if key in _PIP_KEYS and text:
            found[key] = text
    # The certificates of this machine: an index may have a signer of its own.
    found["cert"] = _CERTIFICATES
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in found.items())


class Container:
    """A container that serves a repository, and has loaded its models. A context manager: leaving it removes it.

    remove: the command that does. `lines`: what the server said until then.
    """

    def __init__(self, name: str, remove: Sequence[str]) -> None:
        self._id = name
        self._remove = remove
        self.lines: list[str] = []
        try:
            self._wait_until_ready()
        except BaseException:
            self.remove()
            raise

    def _wait_until_ready(self) -> None:
        command = ["podman", "logs", "--follow", self._id]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_env()) as logs:
            assert logs.stdout is not None
            watchdog = threading.Timer(_START_S, logs.kill)
            watchdog.start()
            try:
                for line in logs.stdout:
                    self.lines.append(line)
                    if line.startswith("ready on "):
                        return
            finally:
                watchdog.cancel()
                logs.kill()
        raise AssertionError("the container was never ready: " + "".join(self.lines[-20:]))

    def address(self, port: int) -> str:
        """Where a port of the container is reached."""
        return _run("podman", "port", self._id, f"{port}/tcp").strip()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the container, as its user."""
        command = ("podman", "exec", self._id, *command)
        return subprocess.run(command, capture_output=True, text=True, check=False, env=_env())

    def check_health(self) -> int:
        """The exit status of the image's own health check."""
        command = ["podman", "healthcheck", "run", self._id]
        return subprocess.run(command, capture_output=True, check=False, env=_env()).returncode

    def terminate(self) -> int:
        """SIGTERM, and the exit code; 137 where it had to be killed after 30 s."""
        _run("podman", "stop", "--time", "30", self._id)
        return int(_run("podman", "wait", self._id))

    def remove(self) -> None:
        _run(*self._remove)

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def start(image: str, repository: pathlib.Path, data: pathlib.Path, *arguments: str) -> Container:
    """Runs the image as an orchestrator would: read-only, without a right.

    repository: is mounted read-only. data: a folder for what it writes. arguments: further ones of `podman run`.
    """
    os.chown(data, _USER, _USER)
    name = _run(
        *("podman", "run", "--detach", "--health-interval=disable"),
        *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp"),
        *("--cap-drop", "all", "--security-opt", "no-new-privileges"),
        *("--volume", f"{repository}:/models:ro", "--volume", f"{data}:/data"),
        *("--env", "FORWARDPASS_INSECURE=true", "--env", "FORWARDPASS_WEIGHTS_FOLDER=/data/weights"),
        *("--publish", "127.0.0.1::8500", "--publish", "127.0.0.1::9464"),
        *arguments,
        image,
    ).strip()
    return Container(name, ("podman", "rm", "--force", "--time", "0", name))


def play(image: str, deployment: dict[str, Any], volumes: dict[str, pathlib.Path], folder: pathlib.Path) -> Container:
    """Runs one pod of a Deployment by `podman play kube`. podman knows neither gRPC probes nor fsGroup.

    volumes: folders that stand for volumes of the pod, by name. Those to write into are given to the image's user.
    folder: for what podman reads.
    """
    played = copy.deepcopy(deployment)
    played["spec"]["replicas"] = 1
    pod = played["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container["image"] = image
    pod["volumes"] = [
        {"name": volume["name"], "hostPath": {"path": str(volumes[volume["name"]])}}
        if volume["name"] in volumes
        else volume
        for volume in pod["volumes"]
    ]
    for mount in container["volumeMounts"]:
        if mount["name"] in volumes and not mount.get("readOnly"):
            os.chown(volumes[mount["name"]], _USER, _USER)
    path = folder / "deployment.json"
    path.write_text(json.dumps(played))
    _run("podman", "play", "kube", "--replace", str(path))
    name = f"{deployment['metadata']['name']}-pod-0-{container['name']}"
    return Container(name, ("podman", "play", "kube", "--down", str(path)))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_env())
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@functools.cache
def _env() -> dict[str, str]:
    path = ROOT / ".cache" / "containers.conf"
    path.parent.mkdir(exist_ok=True)
    path.write_text(_CONTAINERS_CONF)
    return {**os.environ, "CONTAINERS_CONF": str(path)}
