"""Real Redis servers, each a process of its own on a free port."""

from __future__ import annotations

import pathlib
import shutil
import signal
import socket
import subprocess
import time
from typing import Any

import redis

START_S = 30.0


class RedisProcess:
    """A Redis that writes every step to the disk before it answers. A context manager: leaving it kills the process.

    folder: where it keeps its data; what is in there is there after `kill` and `start`.
    arguments: what else stands on the command line.
    """

    def __init__(self, folder: pathlib.Path, *arguments: str, password: str = "") -> None:
        if shutil.which("redis-server") is None:
            raise RuntimeError("the tests of the Redis session store need one: apt-get install redis-server")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"
        self._command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self._command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        self._command += [*(("--requirepass", password) if password else ()), *arguments]
        self.start()

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + START_S
        with self.client() as client:
            while True:
                try:
                    client.ping()
                except redis.ConnectionError:
                    assert self.process.poll() is None, self._output()
                    assert time.monotonic() < deadline, "redis-server does not answer"
                    time.sleep(0.01)
                else:
                    return

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def pause(self) -> None:
        """It answers no more, and its connections stay."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()
        self._output()

    def _output(self) -> str:
        assert self.process.stdout is not None
        with self.process.stdout:
            return str(self.process.stdout.read())

    def __enter__(self) -> RedisProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.returncode is None:
            self.kill()
