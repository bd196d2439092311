"""A server process on this machine, for the examples that start one themselves."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple


class LocalServer(NamedTuple):
    """address: host and port. metrics_url: of the server's counters."""

    address: str
    metrics_url: str


@contextlib.contextmanager
def serve(repository: pathlib.Path) -> Iterator[LocalServer]:
    """Serves a model repository on free loopback ports inside the block, from when the server is ready."""
    command = [sys.executable, "-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        [*command, "--model-repository", str(repository), "--log-level", "error"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield _wait(process)
    finally:
        process.terminate()
        process.communicate()


def _wait(process: subprocess.Popen[str]) -> LocalServer:
    """Waits until the server is ready. Raises SystemExit where it ends before."""
    assert process.stdout is not None
    found = {}
    for line in process.stdout:
        for name in ("listening on ", "metrics on "):
            if line.startswith(name):
                found[name] = line.removeprefix(name).strip()
        if line.startswith("ready"):
            return LocalServer(found["listening on "], found["metrics on "])
    raise SystemExit(f"the server ended with {process.wait()} before it was ready")
