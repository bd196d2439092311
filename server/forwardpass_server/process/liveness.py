"""Liveness of the device: a small operation on it, repeated."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

_LOGGER = logging.getLogger(__name__)


class TriedDevice(Protocol):
    """A device that can be probed."""

    def try_out(self) -> None:
        """Runs a small operation and waits for its result. Raises if the device fails; full memory is no failure."""


class Liveness:
    """Probes a device on a thread of its own. A device that hangs blocks only that thread.

    every_s: seconds between two probes. timeout_s: a probe that takes longer marks the device as dead, until a probe
    succeeds again.
    """

    def __init__(self, device: TriedDevice, every_s: float, timeout_s: float) -> None:
        self._device = device
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._has_failed = False
        # When the running probe began, by time.monotonic; None between probes.
        self._trying_since: float | None = None
        self._ended = threading.Event()
        # A daemon: a device that hangs must not prevent the process from ending.
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def start(self) -> None:
        """Starts the probes."""
        self._thread.start()

    def end(self) -> None:
        """Stops after the running probe."""
        self._ended.set()

    @property
    def is_alive(self) -> bool:
        """Whether the last probe succeeded and the running one is within its timeout."""
        since = self._trying_since
        hangs = since is not None and time.monotonic() - since > self._timeout_s
        return not self._has_failed and not hangs

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self._trying_since = time.monotonic()
            has_failed = False
            try:
                self._device.try_out()
            except Exception:  # Any exception: a working device raises none.
                has_failed = True
                if not self._has_failed:
                    _LOGGER.exception("the device failed a small operation")
            self._has_failed, self._trying_since = has_failed, None
