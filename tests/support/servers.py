"""Real servers, each a process of its own on a free port."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from support.memory_groups import MemoryGroup

START_S = 240.0


def wait_until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    """Waits for what other processes bring about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _inherited() -> dict[str, str]:
    """The environment of the tests, without what `conftest` sets for TensorFlow in their own process."""
    return {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}


def read_metrics(url: str) -> dict[str, float]:
    """Every sample that Prometheus would scrape, by name and labels as they are written."""
    with urllib.request.urlopen(url) as response:
        text = response.read().decode()
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


class ServerProcess:
    """A `forwardpass-server serve` that has loaded its models. A context manager: leaving it kills the process.

    arguments: what else stands on the command line. environment: variables to add. prefix: a command that runs it.
    waits_for: how the line begins that says so; "not ready: " for a server that does not become ready. group: the
    control group that it is put into.

    Models are not tried in a child process unless the environment says so: its start takes seconds.
    """

    def __init__(
        self,
        *arguments: str,
        port: int = 0,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        waits_for: str = "ready on ",
        group: MemoryGroup | None = None,
    ) -> None:
        command = [
            *(group.entering if group is not None else ()),
            *prefix,
            sys.executable,
            "-m",
            "forwardpass_server.app.cli",
            "serve",
            "--port",
            str(port),
        ]
        self.process = subprocess.Popen(
            [*command, "--metrics-port", "0", "--drain-delay", "0.1", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**_inherited(), "FORWARDPASS_TRIAL": "false", **(environment or {})},
        )
        self.lines: list[str] = []
        self.log: list[str] = []
        self._log_thread = threading.Thread(target=self._read_log, daemon=True)
        self._log_thread.start()
        watchdog = threading.Timer(START_S, self.process.kill)
        watchdog.start()
        try:
            self.ready_line = self._line(
                waits_for, lambda line: line.startswith(waits_for) or not line.startswith("not ready: ")
            )
        finally:
            watchdog.cancel()
        self.address = self._line("listening on ").removeprefix("listening on ")
        self.metrics_url = self._line("metrics on ").removeprefix("metrics on ")

    def _line(self, start: str, is_expected: Callable[[str], bool] = lambda line: True) -> str:
        """The first line of stdout that starts so, waiting for it."""
        assert self.process.stdout is not None
        while not any(line.startswith(start) for line in self.lines):
            line = self.process.stdout.readline()
            assert line, "the server ended: " + "".join(self.log[-20:])
            # Whoever waits for a server that is not ready would wait for ever, unless it is brought about.
            assert is_expected(line), line + "".join(self.log[-20:])
            self.lines.append(line.strip())
        return next(line for line in self.lines if line.startswith(start))

    def wait_until_ready(self) -> str:
        """The line that says so, of a server that was not ready when its models were loaded."""
        return self._line("ready on ")

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    @property
    def management_address(self) -> str:
        """Of a server with a `--management-port`."""
        return self._line("management on ").removeprefix("management on ")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def metrics(self) -> dict[str, float]:
        """See `read_metrics`."""
        return read_metrics(self.metrics_url)

    def wait_for_log(self, text: str, timeout_s: float = 10) -> str:
        """The log, once it holds `text`: the pipe may lag behind what the server has answered."""
        deadline = time.monotonic() + timeout_s
        while text not in "".join(self.log):
            assert time.monotonic() < deadline, f"no {text!r} in the log: " + "".join(self.log[-20:])
            time.sleep(0.01)
        return "".join(self.log)

    def resident_bytes(self) -> int:
        return self._memory_bytes("VmRSS")

    def highest_resident_bytes(self) -> int:
        """The most that it has ever been."""
        return self._memory_bytes("VmHWM")

    def _memory_bytes(self, name: str) -> int:
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith(name))) * 1024

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        self._log_thread.join()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
