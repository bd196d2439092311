"""Metrics of the process, its device and its build."""

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
    """A device at one moment. utilisation: the busy share of about the last second, 0 to 1."""

    used_bytes: int
    total_bytes: int
    utilisation: float


ReadDevice = Callable[[], DeviceReading | None]
"""Reads the device. Returns None if it cannot be read, as for a CPU."""

_DEVICE = (
    ("forwardpass_device_memory_used_bytes", "gauge", "Used memory of the GPU, by all processes."),
    ("forwardpass_device_memory_total_bytes", "gauge", "Total memory of the GPU."),
    ("forwardpass_device_utilisation_ratio", "gauge", "Share of the last second in which the GPU was busy."),
)
ON_A_GPU = "Only on a GPU."

_PROCESS = (
    ("process_cpu_seconds_total", "counter", "Processor time used by the process, in seconds."),
    ("process_resident_memory_bytes", "gauge", "Resident memory of the process."),
    ("process_virtual_memory_bytes", "gauge", "Virtual memory of the process."),
    ("process_start_time_seconds", "gauge", "When the process started, in seconds since 1970."),
    ("process_open_fds", "gauge", "Open files and sockets."),
    ("process_max_fds", "gauge", "Limit of open files and sockets."),
)


def resident_bytes() -> int:
    """The resident memory of this process; 0 if the system does not report it."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


class MachineMetrics:
    """The metrics of one process and its device."""

    def __init__(self, families: Families) -> None:
        self.started = time.time()
        self.read_device: ReadDevice = lambda: None
        self._build = families.gauge(
            "forwardpass_build_info",
            "Always 1; the labels hold the versions and the device.",
            ("version", "tensorflow", "device"),
        )
        families.read(_DeviceCollector(self), _DEVICE, ON_A_GPU)
        families.read(prometheus.ProcessCollector(registry=None), _PROCESS)

    def build(self, version: str, tensorflow: str, device: str) -> None:
        """Sets the labels of the build. device: such as "CPU:0"."""
        self._build.labels(version, tensorflow, device).set(1)


class _DeviceCollector(Collector):
    """Reads the device at each scrape."""

    def __init__(self, machine: MachineMetrics) -> None:
        self._machine = machine

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """The families without values."""
        return [GaugeMetricFamily(name, meaning) for name, _, meaning in _DEVICE]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The present values; nothing if the device cannot be read."""
        reading = self._machine.read_device()
        if reading is not None:
            for (name, _, meaning), value in zip(_DEVICE, reading, strict=True):
                yield GaugeMetricFamily(name, meaning, value)
