"""A child process that runs what may end a process. Imports no TensorFlow: the child does."""

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

# Importing TensorFlow takes 5 s, and many times that on a machine that is busy with other things.
_START_S = 120.0

# What a defect of a kernel ends a process with. SIGKILL is not among them: it comes from whoever has no memory left.
_FATAL = frozenset({signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGTRAP})


class TrialEnded(BaseException):
    """No answer will come from the child process.

    No Exception, since code that forgives whatever a model raises must not forgive this.
    """


class Killed(TrialEnded):
    """What the child process ran ended it; `signal_name` says how."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


class TimedOut(TrialEnded):
    """What the child process ran took too long."""


class Unusable(TrialEnded):
    """The child process cannot be started, or ended for a reason that is not what it ran."""


class TrialProcess:
    """One child process, started when it is needed; it ends by itself when it is idle, and when this process ends.

    cores: over how many TensorFlow spreads its work there, unless its own variables say otherwise. For one thread at a
    time.
    """

    def __init__(self, cores: int) -> None:
        self._environment = {
            "TF_NUM_INTRAOP_THREADS": str(cores),
            "TF_NUM_INTEROP_THREADS": str(cores),
            **os.environ,
            "PYTHONSAFEPATH": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # For the CPU alone: on a GPU the process would take hundreds of MB of the GPU's memory.
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def start(self) -> None:
        """Starts the process unless it runs, without waiting for it. A failure shows in `ask`."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = multiprocessing.Pipe()
        # A new program, never a fork: this process has threads.
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
        """The answer to a message. may_restart: an idle process may just have ended, so one more is tried.

        Raises TrialEnded.
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
        """Says what `run` runs. Waits until the process has started. Raises TrialEnded."""
        self.ask(_START_S, "define", *arguments, may_restart=True)

    def _status(self) -> int:
        assert self._process is not None
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:
            return 1

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None
