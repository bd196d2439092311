"""Runs graphs that may crash a process in a child process. Only the child imports TensorFlow."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any

_LOGGER = logging.getLogger(__name__)

# Importing TensorFlow takes 5 s, and many times that on a busy machine.
_START_S = 120.0

# The signals of a crash. SIGKILL is none of them: the kernel sends it when memory runs out.
_FATAL = frozenset({signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGTRAP})


class TrialEnded(BaseException):
    """The child process will not answer.

    A BaseException, so that code which catches all exceptions of a model does not catch this.
    """


class Killed(TrialEnded):
    """A graph crashed the child process with the signal `signal_name`."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


class TimedOut(TrialEnded):
    """A graph took too long in the child process."""


class Unusable(TrialEnded):
    """The child process cannot be started, or ended for another reason than a crash."""


class TrialProcess:
    """One child process. It is started on demand, and ends by itself when it is idle, and when this process ends.

    cores: how many TensorFlow uses in the child; its own environment variables take precedence. Used by one thread at a
    time.
    """

    def __init__(self, cores: int) -> None:
        self._environment = {
            "TF_NUM_INTRAOP_THREADS": str(cores),
            "TF_NUM_INTEROP_THREADS": str(cores),
            **os.environ,
            "PYTHONSAFEPATH": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # CPU only: the child would take hundreds of MB of a GPU's memory.
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def start(self) -> None:
        """Starts the process if it is not running, and does not wait for it. `ask` raises if the start failed."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = multiprocessing.Pipe()
        # Not a fork: this process has threads.
        command = [sys.executable, "-m", "forwardpass_server.models.trial_child", str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self._environment,
            )
        except OSError as error:
            ours.close()
            _LOGGER.warning("the child process that tries models cannot be started: %s", error.strerror)
        else:
            self._connection = ours
        finally:
            theirs.close()

    def ask(self, timeout_s: float, *message: Any, may_restart: bool = False) -> Any:
        """Sends a message and returns the answer.

        may_restart: starts another process if this one has just ended because it was idle. Raises TrialEnded.
        """
        self.start()
        if self._connection is None or self._process is None:
            raise Unusable("it cannot be started")
        try:
            self._connection.send(message)
            if not self._connection.poll(timeout_s):
                self.close()
                raise TimedOut
            return self._connection.recv()
        except (EOFError, OSError):
            status = self._status()
            self.close()
            if status == 0 and may_restart:
                return self.ask(timeout_s, *message)
            if -status in _FATAL:
                raise Killed(signal.Signals(-status).name) from None
            name = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise Unusable(f"it ended with {name}") from None

    def define(self, *arguments: Any) -> None:
        """Sends the functions for `run`. Waits until the process has started. Raises TrialEnded."""
        self.ask(_START_S, "define", *arguments, may_restart=True)

    def _status(self) -> int:
        assert self._process is not None
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:
            return 1

    def close(self) -> None:
        """Kills the process."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None
