"""What the server is, and what it takes of the machine."""

from __future__ import annotations

import pathlib
import resource
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from forwardpass_server.telemetry.families import Families


class DeviceReading(NamedTuple):
    """A device at one moment. utilisation: the share of the time in which it worked, of the last second or so."""

    used_bytes: int
    total_bytes: int
    utilisation: float


ReadDevice = Callable[[], DeviceReading | None]
"""Reads the device; None where it cannot be read, as the CPU cannot."""

_DEVICE = (
    ("forwardpass_device_memory_used_bytes", "gauge", "The GPU's memory that is taken, by whomever."),
    ("forwardpass_device_memory_total_bytes", "gauge", "The GPU's memory."),
    ("forwardpass_device_utilisation_ratio", "gauge", "The share of the last second in which the GPU worked."),
)
ON_A_GPU = "On a GPU alone."

_PROCESS = (
    ("process_cpu_seconds_total", "counter", "Processor time that the process took, in seconds."),
    ("process_resident_memory_bytes", "gauge", "Memory of the process that is in RAM."),
    ("process_virtual_memory_bytes", "gauge", "Addresses that the process has mapped."),
    ("process_start_time_seconds", "gauge", "When the process started, in seconds since 1970."),
    ("process_open_fds", "gauge", "Files and sockets that are open."),
    ("process_max_fds", "gauge", "How many may be."),
)


def resident_bytes() -> int:
    """The memory of this process that is in RAM; 0 where the system does not say."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


class MachineMetrics:
    """Of one process and its device."""

    def __init__(self, families: Families) -> None:
        self.started = time.time()
        self.read_device: ReadDevice = lambda: None
        self._build = families.gauge(
            "forwardpass_build_info", "1, labelled with what runs.", ("version", "tensorflow", "device")
        )
        families.read(_DeviceCollector(self), _DEVICE, ON_A_GPU)
        families.read(prometheus.ProcessCollector(registry=None), _PROCESS)

    def build(self, version: str, tensorflow: str, device: str) -> None:
        """Shows what runs. device: as in "CPU:0"."""
        self._build.labels(version, tensorflow, device).set(1)


class _DeviceCollector(Collector):
    """Reads the device when it is scraped."""

    def __init__(self, machine: MachineMetrics) -> None:
        self._machine = machine

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [GaugeMetricFamily(name, meaning) for name, _, meaning in _DEVICE]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        reading = self._machine.read_device()
        if reading is not None:
            for (name, _, meaning), value in zip(_DEVICE, reading, strict=True):
                yield GaugeMetricFamily(name, meaning, value)
