"""Virtual environments with other versions than ours: made once and kept under .cache."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "environments"


@dataclasses.dataclass(frozen=True)
class Environment:
    """One environment. installs: the arguments of one `pip install` after another."""

    name: str
    installs: tuple[tuple[str, ...], ...]

    def python(self) -> pathlib.Path:
        """The environment's interpreter, with everything installed, this checkout's client last."""
        digest = hashlib.sha256(repr((self.installs, sys.version)).encode()).hexdigest()[:12]
        folder = CACHE / f"{self.name}-{digest}"
        python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            for arguments in self.installs:
                _pip(python, *arguments)
            (folder / "complete").touch()
        # As a user gets it: from a built distribution, and anew each time, for it is what is tested.
        _pip(python, "--no-deps", "--force-reinstall", str(ROOT))
        return python


def _pip(python: pathlib.Path, *arguments: str) -> None:
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"pip install {' '.join(arguments)}: {done.stderr[-2000:]}")


# The newest release of TFF that installs. It pins packages that no longer fit each other: hence piece by piece.
TFF = Environment(
    "tff-0.87",
    (
        ("--no-deps", "tensorflow-federated==0.87.0"),
        (
            "tensorflow==2.14.1",
            "jax==0.4.18",
            "jaxlib==0.4.18",
            "attrs~=23.1",
            "cachetools~=5.3",
            "dm-tree==0.1.8",
            "dp-accounting==0.4.3",
            "google-vizier==0.1.11",
            "portpicker~=1.6",
            "scipy>=1.9,<1.12",
            "tensorflow-model-optimization==0.7.5",
            "tensorflow-privacy==0.9.0",
            "tqdm~=4.64",
            "numpy~=1.25",
            "googleapis-common-protos==1.61.0",
            "grpcio>=1.60,<1.75",
            "setuptools<70",
        ),
        # With a newer one TFF cannot save.
        ("--no-deps", "typing-extensions==4.5.0"),
    ),
)

# The client's oldest and newest, as pyproject.toml promises them.
OLDEST = Environment("client-oldest", (("protobuf==4.25.*", "grpcio==1.60.*", "numpy==1.25.*"),))
NEWEST = Environment("client-newest", (("--upgrade", "protobuf", "grpcio", "numpy"),))
