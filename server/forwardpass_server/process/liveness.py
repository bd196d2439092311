"""Whether the device still works: a small operation on it, tried again and again."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

_LOGGER = logging.getLogger(__name__)


class TriedDevice(Protocol):
    """A device that can be asked for a sign of life."""

    def try_out(self) -> None:
        """Runs a small operation and waits for its result. Raises where the device fails; being full is no failure."""


class Liveness:
    """Tries a device on a thread of its own, which a device that hangs keeps.

    every_s: seconds between one trial and the next. timeout_s: how long one may take before the device counts as dead;
    it counts as alive again as soon as one succeeds.
    """

    def __init__(self, device: TriedDevice, every_s: float, timeout_s: float) -> None:
        self._device = device
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._has_failed = False
        # By time.monotonic, of a trial that has not ended yet.
        self._trying_since: float | None = None
        self._ended = threading.Event()
        # A device that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def start(self) -> None:
        """Begins to try the device."""
        self._thread.start()

    def end(self) -> None:
        """Ends it after the trial that runs."""
        self._ended.set()

    @property
    def is_alive(self) -> bool:
        """Whether the last trial succeeded, and the one that runs has time left."""
        since = self._trying_since
        hangs = since is not None and time.monotonic() - since > self._timeout_s
        return not self._has_failed and not hangs

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self._trying_since = time.monotonic()
            has_failed = False
            try:
                self._device.try_out()
            except Exception:  # Whatever it is: a device that works raises nothing.
                has_failed = True
                if not self._has_failed:
                    _LOGGER.exception("the device failed a small operation")
            self._has_failed, self._trying_since = has_failed, None
