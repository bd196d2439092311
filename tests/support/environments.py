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


def _requirements(name: str) -> tuple[str, ...]:
    """What a file of requirements asks for."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


# The newest release of TFF that installs.
TFF = Environment("tff-0.87", (_requirements("tff-0.87.txt"), ("--no-deps", *_requirements("tff-0.87-no-deps.txt"))))

# The client's oldest and newest, as pyproject.toml promises them.
OLDEST = Environment("client-oldest", (("protobuf==4.25.*", "grpcio==1.60.*", "numpy==1.25.*"),))
NEWEST = Environment("client-newest", (("--upgrade", "protobuf", "grpcio", "numpy"),))
